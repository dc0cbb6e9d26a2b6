"""A module around Hugging Face models gets the plan and the layers of each of them."""

import filecmp
from abc import ABC
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.meshes import MESHES
from harness.models import build_model
from harness.pool import run_distributed
from harness.training import batches_for, data_rank
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard
from transformers import BertConfig, BertModel

from hf_automodel_parallel import AutoParallelismConfig


class Part(ABC, nn.Module):
    """As sentence-transformers has it: ABC comes first, so that FSDP2 cannot extend the class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model = model

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
        return {**features, "tokens": self.auto_model(**inputs).last_hidden_state}


class Sentences(nn.Sequential):
    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        (part,) = self
        return part(features)["tokens"].mean(1)

    def save_pretrained(self, path: str, model_name: str | None = None) -> None:
        self[0].auto_model.save_pretrained(path)


class Two(nn.Module):
    """Models of two kinds, one with a plan of its own and one without, and a head of the user."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(128, 8)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        states = [model(**features).last_hidden_state.mean(1) for model in (self.first, self.second)]
        return self.head(torch.cat(states, -1))


def bert() -> nn.Module:
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(config, add_pooling_layer=False)


def around(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Sentences(Part(bert())) if name == "sentences" else Two(build_model("llama").model, bert())


def features(parts: int) -> list[dict[str, torch.Tensor]]:
    rows = batches_for(build_model("llama"), parts)
    return [{"input_ids": row["input_ids"], "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch).pow(2).mean()


def one_step(sizes: dict[str, int], dp_size: int, names: list[str], directory: str) -> dict[str, Any]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    results = {}
    for name in names:
        model = around(name)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loss = loss_of(model, features(dp_size)[data_rank(accelerator)])
        accelerator.backward(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        units = [path for path, module in model.named_modules() if isinstance(module, FSDPModule)]
        on_tp = [n for n, p in model.named_parameters() if "tp" in sizes_of(p) and isinstance(p.placements[-1], Shard)]
        if name == "sentences":  # its class writes the files
            model.save_pretrained(directory, "name")
            dist.barrier()
        results[name] = (total.item() / dist.get_world_size(), full_grads(model), units, on_tp)
        accelerator.free_memory()
    return results


def sizes_of(parameter: Any) -> tuple[str, ...]:
    return parameter.device_mesh.mesh_dim_names


@pytest.mark.parametrize("mesh", ["fsdp2", "tp2_fsdp2"])
def test_gradients_and_files_equal_one_process(mesh, tmp_path):
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, one_step, sizes, dp_size, ["sentences", "two"], str(tmp_path / "found"))[0]
    around("sentences").save_pretrained(tmp_path / "expected")
    assert filecmp.cmp(tmp_path / "expected/model.safetensors", tmp_path / "found/model.safetensors", shallow=False)
    for name, (loss, gradients, units, on_tp) in results.items():
        reference = around(name)
        losses = [loss_of(reference, batch) for batch in features(dp_size)]
        torch.stack(losses).mean().backward()
        assert_losses_equal(loss, torch.stack(losses).mean().item())
        assert_gradients_equal(gradients, {key: p.grad for key, p in reference.named_parameters()})
        models = ["0.auto_model.encoder.layer"] if name == "sentences" else ["first.layers", "second.encoder.layer"]
        assert {f"{model}.{index}" for model in models for index in range(2)} <= set(units), units
        for model in models if "tp" in mesh else ():
            assert any(key.startswith(f"{model}.1") for key in on_tp), (model, on_tp)
