"""``mixed_precision="bf16"`` against one process under autocast: loss, outputs and every gradient.

The bound is one process's own rounding: how far its autocast is from its float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.compare import full_grads
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import data_rank, trainable
from parity.cells import Cell
from torch.distributed.fsdp import MixedPrecisionPolicy

from hf_automodel_parallel import AutoParallelismConfig

Gradients = dict[str, torch.Tensor | None]

CELLS = [
    Cell("llama", mesh="tp2"),
    Cell("bert/masked", mesh="tp2", plan="head", checkpointing="full"),
    Cell("bert/sequence", mesh="fsdp2", plan="head", compiled=True),
    Cell("llama", "lora", mesh="fsdp2", checkpointing="full"),
    Cell("llama/reward", mesh="tp2_fsdp2", plan="head"),
    Cell("llama", mesh="tp2_fsdp2", checkpointing="own", compiled=True),
]


def loss_of(cell: Cell, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss that the class computes, in float64."""
    logits = logits.detach()[:].double()
    if cell.model.endswith("reward"):
        return F.mse_loss(logits.squeeze(-1), labels.double())
    if cell.plan != "head":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def one_step(cell: Cell) -> tuple[float, float, Gradients, set[torch.dtype]]:
    """Mean loss, the same from the logits that the model returned, gradients, dtypes of loss and logits."""
    _, sizes, dp_size = MESHES[cell.mesh]
    config = AutoParallelismConfig(**sizes, **cell.options("aot_eager"))
    accelerator = Accelerator(parallelism_config=config, mixed_precision="bf16")
    model = cell.build()
    if cell.checkpointing == "own":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    (batches,) = cell.batches(model, dp_size)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    batch = batches[data_rank(accelerator)]
    output = model(**batch)
    losses = torch.stack([output.loss.detach().double(), loss_of(cell, output.logits, batch["labels"])])
    accelerator.backward(output.loss)
    dist.all_reduce(losses)
    own, from_logits = (losses / dist.get_world_size()).tolist()
    return own, from_logits, full_grads(model), {output.loss.dtype, output.logits.dtype}


@functools.cache
def references(model: str, adapter: str, plan: str, parts: int) -> list[Gradients]:
    """The gradients of one process, in float32 and under autocast."""
    cell, found = Cell(model, adapter, plan=plan), []
    for enabled in (False, True):
        built = cell.build()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(loss_and_grads(built, cell.batches(built, parts)[0])[1])
    return found


def distance(got: Gradients, want: Gradients) -> float:
    """The norm of the difference of all gradients."""
    return math.sqrt(sum((g - want[n]).double().square().sum().item() for n, g in got.items() if g is not None))


def test_bf16_rounds_no_more_than_one_process_under_autocast():
    """The residual stream is bfloat16 here and float32 under autocast, so the bound is twice its rounding."""
    wrong = []
    for cell in CELLS:
        world, _, dp_size = MESHES[cell.mesh]
        loss, from_logits, gradients, dtypes = run_distributed(world, one_step, cell, timeout=280)[0]
        exact, low = references(cell.model, cell.adapter, cell.plan, dp_size)
        if dtypes != {torch.float32} or abs(loss / from_logits - 1) > 1e-6:
            wrong.append(f"{cell}: {dtypes}, loss {loss}, from its logits {from_logits}")
        if [n for n, g in gradients.items() if g is None] != [n for n, g in exact.items() if g is None]:
            wrong.append(f"{cell}: other gradients")
        elif distance(gradients, exact) > 2 * distance(low, exact):
            wrong.append(f"{cell}: gradients off by {distance(gradients, exact)}, autocast {distance(low, exact)}")
    assert not wrong, wrong


def dtypes_under(policy: Any) -> dict[str, Any]:
    """The policy that is used, and the dtypes of loss and logits."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, mixed_precision_policy=policy
    )
    config = AutoParallelismConfig(dp_shard_size=2)
    accelerator = Accelerator(parallelism_config=config, mixed_precision="bf16", fsdp_plugin=plugin)
    cell = Cell("llama/reward", plan="head")
    model = cell.build()
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    output = model(**cell.batches(model, 2)[0][data_rank(accelerator)])
    used = accelerator.state.fsdp_plugin.mixed_precision_policy
    return {"policy": used, "dtypes": {output.loss.dtype, output.logits.dtype}}


@pytest.mark.core
def test_a_policy_of_the_user_decides_the_dtypes():
    low, wide = torch.bfloat16, torch.float32
    of_accelerate = MixedPrecisionPolicy(low, low, low)
    for given, used, dtype in (
        (None, MixedPrecisionPolicy(low, wide, wide), wide),
        (of_accelerate, MixedPrecisionPolicy(low, wide, wide), wide),  # with a GPU Accelerate fills it in before
        (MixedPrecisionPolicy(low, low), MixedPrecisionPolicy(low, low), low),
    ):
        for found in run_distributed(2, dtypes_under, given):
            assert found == {"policy": used, "dtypes": {dtype}}
