"""What a forward keeps for its backward, counted by torch's MemTracker on ranks that do not exist."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from hf_automodel_parallel.compat import start_simulated_ranks
from hf_automodel_parallel.core.model_structure import find_layers
from hf_automodel_parallel.core.model_view import ModelView
from hf_automodel_parallel.core.options import ParallelOptions
from hf_automodel_parallel.strategies.context import ParallelizeContext
from hf_automodel_parallel.strategies.default import DefaultParallelizationStrategy

from .models import build_model, lora, make_batches


class Tracker(MemTracker):
    """MemTracker for parameters that are no leaves: in flight they are views of DTensors, on which it cannot set its
    hooks.
    """

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """A process group of ``size`` ranks whose collectives do nothing; this process is rank 0."""
    start_simulated_ranks(size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(name: str, tp: int, layers: int, adapter: dict[str, Any] | None, changes: Any, **options: Any) -> nn.Module:
    """A model of :mod:`harness.models` on a tp axis of ``tp`` fake ranks, prepared by the default strategy.

    Args:
        changes: called with the model before.
        options: fields of :class:`ParallelOptions`, such as ``sequence_parallel``; ``values``: of the model's
            config.
    """
    model: nn.Module = build_model(name, num_key_value_heads=tp, num_hidden_layers=layers, **options.pop("values", {}))
    model = model if adapter is None else lora(model, **adapter)  # type: ignore[arg-type]
    changes(model)
    mesh = init_device_mesh("cpu", (1, tp), mesh_dim_names=("dp_shard_cp", "tp"))
    context = ParallelizeContext(model, mesh, torch.device("cpu"), ParallelOptions(**options), sums_after_backward=True)
    context.fsdp.mp_policy = MixedPrecisionPolicy()
    strategy = DefaultParallelizationStrategy()
    strategy.plan(context)
    strategy.carry_out(context)
    return model


class _Follows(torch.autograd.Function):
    """``output`` as if it had been computed from ``x``, without keeping anything."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:  # type: ignore[override]
        return None, None


def leave_blocks_out(model: nn.Module) -> None:
    """Let attention and MLP blocks keep nothing, so that a forward keeps what norms, residuals and dropout keep
    alone.
    """

    def without(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            with torch.no_grad():
                output = forward(*args, **kwargs)
            if isinstance(output, tuple):
                return (_Follows.apply(x, output[0]), *output[1:])
            return _Follows.apply(x, output)

        return call

    for layer in find_layers(ModelView.of(model).inner):
        for block in (layer.self_attn, layer.mlp):
            block.forward = without(block.forward)  # type: ignore[method-assign]


def kept_per_layer(name: str, tp: int, length: int, changes: Any = lambda _: None, **options: Any) -> int:
    """Bytes that one layer keeps of a forward of 4 x ``length`` tokens: the difference between two layers and one.

    The rest of the arguments is that of :func:`sharded`.
    """
    totals = []
    for layers in (1, 2):
        model = sharded(name, tp, layers, None, changes, **options)
        batch = make_batches(1, 4, length, 128, seed=3)[0]
        model(**batch, use_cache=False)  # a first time, for what is set up once
        gc.collect()
        tracker = Tracker()
        tracker.track_external(model)
        with tracker, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            before = _now(tracker)
            loss = model(**batch, use_cache=False).loss
            gc.collect()
            totals.append(_now(tracker) - before)
        del loss
    return totals[1] - totals[0]


def _now(tracker: MemTracker) -> int:
    return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("current").values())
