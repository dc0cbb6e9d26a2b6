"""Dropout on the ranks, recorded, and replayed in one process. Functions here are sent to the worker pool by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensor

from harness.compare import full_grads, mean_over_ranks
from harness.training import batches_for, build, data_rank, trainable
from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.tensor_parallel.dropout_rng import ShardedDropout


@contextmanager
def recorded_masks() -> Iterator[list[torch.Tensor]]:
    """What every active dropout kept, in the order of the calls; not of runs without values (while a model is
    planned).
    """
    masks: list[torch.Tensor] = []
    real, real_sharded = torch.nn.functional.dropout, ShardedDropout.forward

    def dropout(input, p=0.5, training=True, inplace=False):
        output = real(input, p, training, inplace)
        if training and p > 0 and not isinstance(output, FakeTensor):
            masks.append((output != 0).detach())
        return output

    def forward(self, input):
        output = real_sharded(self, input)
        if self.training and self.p > 0 and not isinstance(output, FakeTensor):
            masks.append((output != 0).detach())
        return output

    torch.nn.functional.dropout, ShardedDropout.forward = dropout, forward
    try:
        yield masks
    finally:
        torch.nn.functional.dropout, ShardedDropout.forward = real, real_sharded


@contextmanager
def replayed_masks(masks: list[torch.Tensor]) -> Iterator[None]:
    """Let the dropouts of one process keep what `masks` say, in the order of the calls."""
    left = list(masks)
    real = torch.nn.functional.dropout

    def dropout(input, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return input
        return input * left.pop(0) / (1 - p)

    torch.nn.functional.dropout = dropout
    try:
        yield
    finally:
        torch.nn.functional.dropout = real
    assert not left, f"{len(left)} masks were not used"


def gradients_and_masks(
    name: str,
    sizes: dict[str, Any],
    adapter: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    dp_size: int = 1,
    hf_checkpointing: dict[str, Any] | None = None,
    seed_after: bool = False,
) -> tuple[float, dict[str, torch.Tensor | None], list[list[torch.Tensor]]]:
    """Loss, gradients, and the masks of every rank's first forward; each rank has seeds of its own."""
    rank = dist.get_rank()
    torch.manual_seed(1000 + rank)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build(name, adapter, **(overrides or {})).train()
    if hf_checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=hf_checkpointing)
    batches = batches_for(model, dp_size)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    if seed_after:
        torch.manual_seed(2000 + rank)
    with recorded_masks() as masks:
        loss = model(**batches[data_rank(accelerator)], use_cache=False).loss
        forward = len(masks)
        accelerator.backward(loss)
    after = torch.rand(4)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (masks[:forward], after))
    size = accelerator.parallelism_config.tp_size
    for start in range(0, len(everyone), size):
        group = everyone[start : start + size]
        assert all(torch.equal(group[0][1], other[1]) for other in group), "the ranks' common numbers went apart"
    return mean_over_ranks(loss), full_grads(model), [masks for masks, _ in everyone]
