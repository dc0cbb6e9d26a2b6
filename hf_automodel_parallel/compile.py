"""Per-layer ``torch.compile``, in place, after everything else: only the arithmetic of a layer is inside the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import compat
from .activation_checkpointing import Checkpointed
from .tensor_parallel.in_flight import Region


def compile_layers(
    layers: list[nn.Module], checkpoint_inside: bool = False, selective_checkpoint: bool = False, **options: Any
) -> None:
    """Compile the forward of each layer, in place.

    What is compiled is the ``forward``, not the module: FSDP2's hooks, the exchange of DTensors for local tensors and an
    activation checkpoint around the layer stay outside, so the graph holds plain tensors, checkpoints compose, and no name
    in the model changes (no ``_orig_mod``). Layers of one class share their graphs.

    Args:
        layers: the layers, after tensor parallelism and FSDP2 have been applied.
        checkpoint_inside: parts of the layers are checkpointed, so checkpoints are inside of what is compiled.
        selective_checkpoint: put a selective checkpoint inside of what is compiled, so that the compiler sees the operators
            it has to keep.
        options: passed to ``torch.compile`` (``backend``, ``mode``, ``dynamic``, ``fullgraph``, ``options``).
    """
    for layer in layers:
        forward = layer.forward
        region = forward if isinstance(forward, Region) else None
        body: Callable[..., Any] = forward if region is None else region.body
        if selective_checkpoint:
            body = Checkpointed(body, selective=True)
        compiled = torch.compile(body, **options)
        if checkpoint_inside or selective_checkpoint:
            compiled = _with_checkpoints_inside(compiled)
        if region is None:
            layer.forward = compiled  # type: ignore[method-assign]
        else:
            region.body = compiled


def _with_checkpoints_inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``function`` where the compiler accepts a checkpointed region that notes something outside of it.

    The only such note is which inputs share a boundary; the recomputation need not take it again.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with compat.dynamo_side_effects_under_checkpoint():
            return function(*args, **kwargs)

    return call
