"""Selective activation checkpointing alone, without any parallelism."""

from __future__ import annotations

from torch import nn

from .activation_checkpointing import SELECTIVE, checkpoint_module, switch_cache_off
from .compile import compile_layers
from .core.forward_stack import ForwardSlot, ForwardStack
from .core.model_structure import find_layers
from .core.model_view import ModelView
from .errors import UnsupportedError

# Where the checkpoint of a layer can stand; the fallback has one of its own.
_CHECKPOINTS = (ForwardSlot.CHECKPOINT, ForwardSlot.GRAPH_CHECKPOINT, ForwardSlot.GRAPH_FALLBACK)


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
        slot in ForwardStack.of(layer) for layer in layers for slot in _CHECKPOINTS
    ):
        raise UnsupportedError(
            f"the layers of {type(model).__name__} are checkpointed already; they would be recomputed twice. "
            f"Checkpoint them once: leave out gradient_checkpointing_enable() or this call."
        )
    if enable_compile:
        compile_layers(layers, SELECTIVE)
    else:
        for layer in layers:
            checkpoint_module(layer, SELECTIVE)
    switch_cache_off(inner)
