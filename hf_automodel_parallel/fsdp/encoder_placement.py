"""Where the parameters of towers go: what was asked for, checked against the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ..core.modality_encoders import PLACEMENTS
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..core.model_structure import ModelStructure
    from .options import ShardingOptions


def placement(
    model: nn.Module, structure: ModelStructure, options: ShardingOptions, layer_classes: list[str] | None
) -> str | None:
    """One of :data:`.find.PLACEMENTS` for the towers of ``model``.

    Args:
        model: the model, before sharding.
        structure: its parts.
        options: with what was asked for as ``towers``, None for nothing.
        layer_classes: names of layer classes if the user gave them; those of towers among them mean "layers".

    Raises:
        ConfigError: there is no tower, or none that can be placed like this.
    """
    asked = options.towers
    if asked is None:
        return "layers" if layer_classes and structure.tower_layers else PLACEMENTS[0]
    if not structure.towers:
        raise ConfigError(
            f"towers={asked!r}: {type(model).__name__} has no tower, that is, no layers outside of its language part "
            f"that take images or sound. Leave towers out."
        )
    if asked != "replicated":
        return asked
    whole = frozen_parameters(structure.towers)
    if not whole:
        raise ConfigError(
            "towers='replicated': no parameter of the towers is frozen, and nobody would average the gradients of "
            "trained copies. Freeze the towers before prepare, or use towers='root'."
        )
    dtype = options.mp_policy.param_dtype
    others = {p.dtype for p in whole if p.is_floating_point()} - {dtype}
    if dtype is not None and others:
        raise ConfigError(
            f"towers='replicated': the frozen parameters are stored in {others.pop()}, but mixed precision computes in "
            f"{dtype}, and FSDP2 does not cast what it does not manage. Store the towers in {dtype} before prepare, or "
            "use towers='root'."
        )
    return asked


def replicated_parameters(structure: ModelStructure, options: ShardingOptions) -> set[nn.Parameter]:
    """The parameters that FSDP2 leaves alone under ``options``, because each rank has them whole."""
    return frozen_parameters(structure.towers) if options.towers == "replicated" else set()


def frozen_parameters(towers: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters of ``towers`` that are not trained."""
    return {p for tower in towers for p in tower.parameters() if not p.requires_grad}
