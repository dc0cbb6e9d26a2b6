"""Selective activation checkpointing without parallelism."""

from __future__ import annotations

from torch import nn

from .activation_checkpointing import SELECTIVE, checkpoint_module, switch_cache_off
from .compile import compile_layers
from .core.forward_stack import ForwardSlot, ForwardStack
from .core.model_structure import find_layers
from .core.model_view import ModelView
from .errors import UnsupportedError

# The slots that can contain a checkpoint of a layer; GRAPH_FALLBACK adds one if it runs the layer uncompiled.
_CHECKPOINTS = (ForwardSlot.CHECKPOINT, ForwardSlot.GRAPH_CHECKPOINT, ForwardSlot.GRAPH_FALLBACK)


def apply_selective_activation_checkpointing(model: nn.Module, *, enable_compile: bool = False) -> None:
    """Put a selective checkpoint around each layer of ``model``, in place. Needs no process group.

    For a single device, or for code with its own sharding. In ``Accelerator.prepare``,
    ``AutoParallelismConfig(activation_checkpointing="selective")`` does the same. Training forwards get
    ``use_cache=False``; config and state dict do not change.

    Args:
        model: a model with repeated layers, plain or PEFT-wrapped.
        enable_compile: also compile each layer, in place, with the checkpoint inside of its graph, where the compiler
            sees which results to save.

    Raises:
        UnsupportedError: the model has no layers, or it is checkpointed already, by this function or by its own
            ``gradient_checkpointing_enable()``.
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
