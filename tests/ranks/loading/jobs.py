"""What the ranks run in the tests of streaming load."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.collectives import C10D_OPERATORS, FUNCTIONAL_OPERATORS
from harness.compare import full_grads, mean_over_ranks
from harness.models import build_model, lora
from harness.training import batches_for, data_rank, trainable
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_automodel_parallel import AutoParallelismConfig, from_pretrained
from hf_automodel_parallel.errors import AutoParallelError
from hf_automodel_parallel.parallelizer import fsdp2_strategy_parallelize

CLASSES = {"lm": AutoModelForCausalLM, "classes": AutoModelForSequenceClassification}

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}

#: name -> (directory, class, options of from_pretrained, LoRA or None or "file")
CELLS: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "llama": ("llama", "lm", {}, None),
    "tied": ("llama_tied", "lm", {}, None),
    "fused experts from a file for each": ("mixtral", "lm", {}, None),
    "packed projections": ("phi3", "lm", {}, None),
    "cast": ("llama", "lm", {"dtype": torch.bfloat16}, None),
    "a head that the files do not have": ("llama", "classes", {"num_labels": 3}, None),
    "fresh LoRA": ("llama", "lm", {}, LORA),
    "fresh LoRA, cast, a head trained whole": (
        "llama",
        "lm",
        {"dtype": torch.bfloat16},
        LORA | {"modules_to_save": ["lm_head"]},
    ),
    "DoRA, whose norms need the weights": ("llama", "lm", {}, LORA | {"use_dora": True}),
    "LoRA on fused experts": ("mixtral", "lm", {}, LORA | {"target_parameters": ["mlp.experts.down_proj"]}),
    "an adapter from a file": ("llama", "lm", {}, "file"),
}


def build(root: str, cell: str, streamed: bool) -> nn.Module:
    """The model of a cell, read in slices or by transformers, from the same random numbers."""
    directory, kind, options, adapter = CELLS[cell]
    torch.manual_seed(7)
    path = str(Path(root) / directory)
    cls = CLASSES[kind]
    model = from_pretrained(cls, path, **options) if streamed else cls.from_pretrained(path, **options)
    if adapter == "file":
        return PeftModel.from_pretrained(model, str(Path(root) / "adapter"), is_trainable=True)
    return model if adapter is None else get_peft_model(model, LoraConfig(**adapter))


def differences(root: str, cells: list[str], sizes: dict[str, int]) -> dict[str, list[str]]:
    """Cell -> parameters and buffers that are not, in every bit, those of transformers' loading."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
        expected = build(root, cell, streamed=False)
        model = build(root, cell, streamed=True)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
        want = dict(expected.named_parameters(remove_duplicate=False)) | dict(expected.named_buffers())
        got = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        wrong = sorted(want.keys() ^ got.keys())
        for name in sorted(want.keys() & got.keys()):  # the same order on every rank
            tensor = got[name].full_tensor() if isinstance(got[name], DTensor) else got[name]
            same = tensor.dtype == want[name].dtype and torch.equal(tensor, want[name])
            if not same or got[name].requires_grad != want[name].requires_grad:
                wrong.append(name)
        sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
        if not sharded or any(p.device.type != "cpu" for p in model.parameters()):
            wrong.append("not sharded, or left without values")
        found[cell] = wrong
        accelerator.free_memory()
    return found


def streamed_gradients(path: str, sizes: dict[str, int], dp_size: int, adapter: bool) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of one step of a model that was read in slices."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = from_pretrained(AutoModelForCausalLM, path).train()
    model = lora(model) if adapter else model
    batches = batches_for(model, dp_size)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    loss = model(**batches[data_rank(accelerator)], use_cache=False).loss
    accelerator.backward(loss)
    return mean_over_ranks(loss), full_grads(model)


def without_accelerator(path: str) -> tuple[list[str], str | None]:
    """Parameters that differ when a strategy parallelises a model without an Accelerator; its error on a second try."""
    mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp_replicate", "dp_shard_cp", "tp"))
    model = from_pretrained(AutoModelForCausalLM, path)
    want = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    error = None
    try:
        fsdp2_strategy_parallelize(model, mesh, tp_shard_plan={"model.layers.*.no_such_module": "colwise"})
    except AutoParallelError as caught:
        error = str(caught)
    fsdp2_strategy_parallelize(model, mesh, mp_policy=MixedPrecisionPolicy())
    return [name for name, p in model.named_parameters() if not torch.equal(p.full_tensor(), want[name])], error


class Losses(TrainerCallback):
    """Keeps what the Trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def trainer_losses(root: str, out: str, cell: str, sizes: dict[str, int]) -> list[list[float]]:
    """The losses of three steps of the stock Trainer, of a model in memory and of one read in slices."""
    result = []
    for streamed in (False, True):
        model = build(root, cell, streamed)
        arguments = TrainingArguments(
            out,
            max_steps=3,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            parallelism_config=AutoParallelismConfig(**sizes),
        )
        rows = [{key: value[0] for key, value in batches_for(model, 1, rows=1, seed=s)[0].items()} for s in range(12)]
        seen = Losses()
        Trainer(model, arguments, train_dataset=rows, callbacks=[seen]).train()
        result.append(seen.losses)
    return result


def refused(root: str, damage: str) -> tuple[float, str]:
    """Seconds and message of the error that a damage on rank 1 alone, or after loading, leads to on this rank."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    mine = Path(root) / (damage if dist.get_rank() == 1 and damage not in ("later", "meta") else "llama")
    dist.barrier()
    begin = time.monotonic()
    try:
        if damage == "meta":
            config = AutoConfig.from_pretrained(mine)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        else:
            model = from_pretrained(AutoModelForCausalLM, str(mine))
        shard = sorted(mine.glob("*.safetensors"))[1]
        if damage == "later":
            if dist.get_rank() == 0:
                os.truncate(shard, shard.stat().st_size - 100)
            dist.barrier()
        kept = list(model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        try:
            accelerator.prepare(model, optimizer)
        finally:
            held = optimizer.param_groups[0]["params"]
            unchanged = all(a is b is c for a, b, c in zip(kept, model.parameters(), held, strict=True))
            message = "" if unchanged else "the model was changed; "
    except AutoParallelError as error:
        return time.monotonic() - begin, locals().get("message", "") + f"{type(error).__name__}: {error}"
    return time.monotonic() - begin, "no error"


def efficient_loading(path: str) -> tuple[list[str], int]:
    """Accelerate's cpu_ram_efficient_loading: what differs from the files, and elements this rank held before
    prepare.
    """
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    os.environ["FSDP_VERSION"] = "2"
    try:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=True, state_dict_type="FULL_STATE_DICT"
        )
        config = AutoParallelismConfig(tp_size=2)
        accelerator = Accelerator(parallelism_config=config, fsdp_plugin=plugin)
        results = []
        for streamed in (False, True):
            model = (
                from_pretrained(AutoModelForCausalLM, path) if streamed else AutoModelForCausalLM.from_pretrained(path)
            )
            model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
            results.append({name: p.full_tensor() for name, p in model.named_parameters()})
            accelerator.free_memory()
    finally:
        for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_VERSION"):
            os.environ.pop(name, None)
    want = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    wrong = [name for result in results for name, tensor in result.items() if not torch.equal(tensor, want[name])]
    return wrong, sum(len(result) for result in results)


class FloatsSent(TorchDispatchMode):
    """Counts the floating-point numbers that collectives are given: values, not fingerprints and pickled objects."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in C10D_OPERATORS or func.name() in FUNCTIONAL_OPERATORS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.count += sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
        return func(*args, **(kwargs or {}))


def values_sent_by_prepare(path: str, case: str) -> int:
    """Floating-point numbers that the ranks exchange while a model is prepared."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, check_optimizer=False))
    model = (from_pretrained if case == "streamed" else _stock)(AutoModelForCausalLM, path)
    if case == "one differs" and dist.get_rank() == 1:
        model.lm_head.weight.data += 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with FloatsSent() as sent:
        accelerator.prepare(model, optimizer)
    return sent.count


def _stock(cls: Any, path: str) -> nn.Module:
    return cls.from_pretrained(path)


def shard_with(directory: Path, key: str) -> Path:
    return directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][key]


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncated(directory: Path) -> Path:
    shard = shard_with(directory, "lm_head.weight")
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard


def missing_shard(directory: Path) -> Path:
    shard = shard_with(directory, "lm_head.weight")
    shard.unlink()
    return shard


def save_checkpoints(root: Path) -> Path:
    """Checkpoints in several files, and an adapter."""
    for name in ("llama", "llama_tied", "mixtral", "phi3"):
        build_model(name).save_pretrained(root / name, max_shard_size="100KB")
    adapter = get_peft_model(build_model("llama"), LoraConfig(**LORA | {"init_lora_weights": False}))
    adapter.save_pretrained(root / "adapter")
    return root
