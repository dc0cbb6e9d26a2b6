"""Selective activation checkpointing alone, without any parallelism."""

from __future__ import annotations

from torch import nn

from .activation_checkpointing import _MARK, checkpoint_module, is_checkpointed, selective_contexts, switch_cache_off
from .core.model_structure import find_layers
from .core.model_view import ModelView
from .errors import UnsupportedError


def apply_selective_activation_checkpointing(model: nn.Module, *, enable_compile: bool = False) -> None:
    """Put selective checkpoints around the layers of ``model``, in place, without any parallelism or process group.

    For one device, or for code that shards by itself; ``AutoParallelismConfig(activation_checkpointing="selective")``
    does the same inside ``Accelerator.prepare``. Training forwards get ``use_cache=False``; config and state dict keep
    their content.

    Args:
        model: a model with repeated layers, plain or PEFT-wrapped.
        enable_compile: compile each layer as well, in place, with the checkpoint inside of its graph, where the
            compiler sees which operators to keep.

    Raises:
        UnsupportedError: no layers are found, the model is checkpointed already, by this function or by its own
            ``gradient_checkpointing_enable()``, or later layers read keys that earlier ones write.
    """

    inner = ModelView.of(model).inner
    layers = find_layers(inner)
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} has no repeated layers that could be checkpointed.")
    if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()) or any(
        hasattr(layer, _MARK) or is_checkpointed(layer) for layer in layers
    ):
        raise UnsupportedError(
            f"the layers of {type(model).__name__} are checkpointed already; they would be recomputed twice. "
            f"Checkpoint them once: leave out gradient_checkpointing_enable() or this call."
        )
    if enable_compile:
        from .compile import compile_layers

        compile_layers(layers, "selective", selective_contexts)
    else:
        for layer in layers:
            checkpoint_module(layer, selective_contexts)
    for layer in layers:
        setattr(layer, _MARK, True)
    switch_cache_off(inner)
