"""BAGEL: one model with a language and a vision tower, whose layers are checkpointed as wholes."""

from __future__ import annotations

import dataclasses
import logging

from torch import nn

from ...activation_checkpointing import checkpoint_module, is_checkpointed
from ...core.model_view import ModelView
from ..context import ParallelizeContext
from .family import FamilyParallelizationStrategy

logger = logging.getLogger(__name__)

#: Where the layers of the two towers are.
BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS = (
    "model.language_model.model.layers",
    "model.vit_model.vision_model.encoder.layers",
)

_CLASS = "BagelForUnifiedMultimodal"


class BagelParallelizationStrategy(FamilyParallelizationStrategy):
    """``BagelForUnifiedMultimodal``: the layers of both towers are the FSDP2 units and the checkpoints."""

    def plan(self, context: ParallelizeContext) -> None:
        """Decide as for every model, with the layers of both towers."""
        super().plan(context)
        layers = bagel_layers(ModelView.of(context.model).inner)
        if layers and context.layer_classes is None:
            context.structure = dataclasses.replace(context.structure, layers=layers)  # type: ignore[type-var]


def bagel_layers(model: nn.Module) -> list[nn.Module]:
    """The layers in both lists, in order; a list that is missing or no ``ModuleList`` is left out with a warning."""
    layers: list[nn.Module] = []
    for path in BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS:
        found: object = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):
            layers += found
        else:
            logger.warning("%s has no list of layers at %s, so none are checkpointed there", type(model).__name__, path)
    return layers


def apply_bagel_full_layer_activation_checkpointing(model: nn.Module) -> bool:
    """Put a checkpoint around each whole layer of both towers of a BAGEL model, in place. Repeating it changes nothing.

    Args:
        model: any model; one whose class, or a base of it, is not ``BagelForUnifiedMultimodal`` is left alone.

    Returns:
        True if the model has such layers, which now are checkpointed; False means that the caller has to find other
        ones.
    """
    inner = ModelView.of(model).inner
    if _CLASS not in {cls.__name__ for cls in type(inner).__mro__}:
        return False
    layers = bagel_layers(inner)
    for layer in layers:
        if not is_checkpointed(layer):
            checkpoint_module(layer)
    return bool(layers)
