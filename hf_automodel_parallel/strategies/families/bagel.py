"""BAGEL: a language model and a vision encoder in one model; the entire layers of both are checkpointed."""

from __future__ import annotations

import dataclasses
import logging

from torch import nn

from ...activation_checkpointing import checkpoint_module, is_checkpointed
from ...core.model_view import ModelView
from ..context import ParallelizeContext
from .family import FamilyParallelizationStrategy

logger = logging.getLogger(__name__)

#: Paths of the layers of the language model and of the vision encoder.
BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS = (
    "model.language_model.model.layers",
    "model.vit_model.vision_model.encoder.layers",
)

_CLASS = "BagelForUnifiedMultimodal"


class BagelParallelizationStrategy(FamilyParallelizationStrategy):
    """``BagelForUnifiedMultimodal``: layers of language model and vision encoder are FSDP units and checkpointed."""

    def plan(self, context: ParallelizeContext) -> None:
        """Decide as for every model, with the layers of language model and vision encoder."""
        super().plan(context)
        layers = bagel_layers(ModelView.of(context.model).inner)
        if layers and context.layer_classes is None:
            context.structure = dataclasses.replace(context.structure, layers=layers)  # type: ignore[type-var]


def bagel_layers(model: nn.Module) -> list[nn.Module]:
    """The layers in both lists, in order; a path without a ``ModuleList`` is left out with a warning."""
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
    """Checkpoint each entire layer of language model and vision encoder of a BAGEL model, in place. Idempotent.

    Args:
        model: any model; it is not changed unless its class, or a base class, is ``BagelForUnifiedMultimodal``.

    Returns:
        True if the model has such layers, which are now checkpointed. False: the caller has to find the layers.
    """
    inner = ModelView.of(model).inner
    if _CLASS not in {cls.__name__ for cls in type(inner).__mro__}:
        return False
    layers = bagel_layers(inner)
    for layer in layers:
        if not is_checkpointed(layer):
            checkpoint_module(layer)
    return bool(layers)
