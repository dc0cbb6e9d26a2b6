"""What replicas (parameters that FSDP2 does not manage) need of the other steps: one all-reduce, and local tensors."""

from __future__ import annotations

import torch
from torch import nn

from ..fsdp.adapter_placement import adapter_layers
from ..fsdp.replicas import replicas
from ..tensor_parallel.apply import make_local_in_forward
from .context import ParallelizeContext


def join_axes_of_replicas(context: ParallelizeContext) -> None:
    """Let one all-reduce complete the gradients of replicas, over the data-parallel axes and over tp."""
    if context.replicas is None:
        return
    partial: set[nn.Parameter] = set()
    if context.tensor_parallel is not None:
        partial = context.tensor_parallel.partial.hand_over(context.replicas.parameters)
    context.replicas.join_axes(context.group, context.tp_mesh, partial)


def compute_dtypes(context: ParallelizeContext) -> dict[tuple[nn.Module, str], torch.dtype]:
    """Module and name of each replica -> the dtype that it is cast to for compute."""
    found = {}
    for name in replicas(context.model, context.fsdp.replicated_adapters):
        dtype = context.fsdp.compute_dtype(name)
        if dtype is not None:
            path, _, key = name.rpartition(".")
            found[context.model.get_submodule(path), key] = dtype
    return found


def make_replicas_local(context: ParallelizeContext, layers: list[nn.Module], parts: list[nn.Module]) -> None:
    """Without tensor parallelism: replicas are local tensors during forwards.

    Args:
        context: the model after FSDP2.
        layers: the decoder layers.
        parts: modules inside of them that are recomputed separately.
    """
    names = replicas(context.model, context.fsdp.replicated_adapters)
    if not names:
        return
    inside = {module for layer in layers for module in layer.modules()}
    # PEFT's layers outside of the decoder layers, because they read the weights of their adapters themselves.
    outside = [layer for layer in adapter_layers(context.model) if layer not in inside]
    dtypes = {name: context.fsdp.compute_dtype(name) for name in names}
    make_local_in_forward(context.model, [*layers, *parts, *outside], dtypes)
