"""A parameter without dimensions (a temperature) is replicated: averaged, clipped, stepped, saved and resumed."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, full_grads, full_parameters
from harness.meshes import MESHES, run_on_mesh
from harness.models import build_model
from harness.oracle import train_steps
from harness.training import batches_for, data_rank
from torch import nn
from transformers.modeling_outputs import ModelOutput

from hf_automodel_parallel import AutoParallelismConfig

CLIP = 0.5


class Scaled(nn.Module):
    """A language model with a temperature, which only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.temperature = build_model("llama"), nn.Parameter(torch.tensor(0.7))

    def forward(self, scaled: bool, **batch: torch.Tensor) -> ModelOutput:
        loss = self.model(**batch).loss
        return ModelOutput(loss=loss * self.temperature.exp() if scaled else loss)


def micro_batches(dp_size: int) -> list[list[dict[str, Any]]]:
    """Two for each data-parallel rank; the first rank alone uses the temperature, and only in its second one."""
    rows = batches_for(build_model("llama"), 2 * dp_size)
    return [[rows[2 * r] | {"scaled": False}, rows[2 * r + 1] | {"scaled": r == 0}] for r in range(dp_size)]


def train(sizes: dict[str, int], dp_size: int, directory: str) -> dict[str, Any]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = Scaled()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0))
    first, second = micro_batches(dp_size)[data_rank(accelerator)]
    with accelerator.no_sync(model):
        accelerator.backward(model(**first).loss / 2)
    accelerator.backward(model(**second).loss / 2)
    gradients = full_grads(model)
    norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    stepped = full_parameters(model)
    accelerator.save_state(directory)
    accelerator.backward(model(**second).loss)
    optimizer.step()
    moved = full_parameters(model)["temperature"]
    accelerator.load_state(directory)
    return {
        "gradients": gradients,
        "norm": float(norm),
        "stepped": stepped,
        "moved": moved,
        "resumed": full_parameters(model)["temperature"],
        "shape": tuple(model.temperature.shape),
    }


@pytest.mark.parametrize("mesh", ["fsdp2", "tp2_fsdp2"])
def test_equal_to_one_process(mesh, tmp_path):
    got = run_on_mesh(mesh, train, str(tmp_path / "state"))[0]
    batches = [batch for rank in micro_batches(MESHES[mesh][2]) for batch in rank]
    reference = Scaled()
    torch.stack([reference(**batch).loss for batch in batches]).mean().backward()
    assert_gradients_equal(got["gradients"], {name: p.grad for name, p in reference.named_parameters()})
    reference = Scaled()
    (step,) = train_steps(reference, [batches], max_grad_norm=CLIP)
    assert got["norm"] == pytest.approx(step["grad_norm"], rel=1e-5)
    want = reference.temperature.detach()
    assert got["shape"] == () and want != 0.7 and torch.allclose(got["stepped"]["temperature"], want, rtol=1e-6)
    assert got["moved"] != got["stepped"]["temperature"] and got["resumed"] == got["stepped"]["temperature"]


class Line(nn.Module):
    """Has no other parameters than scalars, so that FSDP2 has nothing to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * self.slope + self.offset}


POINTS = torch.arange(8.0)


def fit(sizes: dict[str, int], dp_size: int, own_backward: bool) -> dict[str, Any]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = Line()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for part in POINTS.chunk(dp_size)[data_rank(accelerator)].chunk(2):  # accumulated
        loss = model(part)["y"].square().mean() / 2
        loss.backward() if own_backward else accelerator.backward(loss)
    return full_grads(model)


@pytest.mark.parametrize("own_backward", [False, True])
def test_a_model_of_scalars_alone(own_backward):
    model = Line()
    model(POINTS)["y"].square().mean().backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for gradients in run_on_mesh("fsdp2", fit, own_backward):
        assert_gradients_equal(gradients, want)
