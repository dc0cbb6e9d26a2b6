"""Where the repeated layers of a model are: the units of FSDP2 and the regions of tensor parallelism."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from torch import nn

from . import compat
from .errors import ConfigError
from .plan.names import unwrapped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that sharding treats apart.

    Attributes:
        layers: the repeated layers in forward order, each once.
        embedding: the input embedding, if any.
        head: modules at the end that are used together (final norm and output projection), may be empty.
        tied: the output projection shares its weight with the input embedding.
    """

    layers: list[nn.Module]
    embedding: nn.Module | None
    head: list[nn.Module]
    tied: bool


def dissect(model: nn.Module, layer_classes: list[str] | None = None) -> Anatomy:
    """Find layers, embedding and head of ``model``.

    Args:
        model: the model, plain or PEFT-wrapped.
        layer_classes: class names of the layers if the user gave them, else ``_no_split_modules`` and, failing that, the
            longest ``ModuleList`` are used.

    Raises:
        ConfigError: a class name given by the user does not occur in the model.
    """
    inner, _ = unwrapped(model)
    layers = find_layers(inner, layer_classes)
    inside = {id(m) for layer in layers for m in layer.modules()}

    def outside(module: nn.Module | None) -> nn.Module | None:
        return None if module is None or id(module) in inside or module is inner else module

    embedding = outside(compat.input_embedding_module(inner))
    projection = outside(compat.lm_head_module(inner))
    norm = outside(_final_norm(inner, layers))
    tied = False
    if embedding is not None and projection is not None:
        shared = {id(p) for p in embedding.parameters()} & {id(p) for p in projection.parameters()}
        tied = bool(shared)
    head = [m for m in (norm, projection) if m is not None and any(True for _ in m.parameters())]
    return Anatomy(layers, embedding, head, tied)


def find_layers(model: nn.Module, layer_classes: list[str] | None = None) -> list[nn.Module]:
    """The repeated layers of ``model`` in the order of its module tree, without duplicates; empty if there are none."""
    wanted = set(layer_classes) if layer_classes else compat.no_split_module_names(model)
    found = [m for m in model.modules() if type(m).__name__ in wanted and any(True for _ in m.parameters())]
    if layer_classes:
        missing = wanted - {type(m).__name__ for m in found}
        if missing:
            raise ConfigError(
                f"transformer_cls_names_to_wrap={sorted(layer_classes)!r}: no module of class {', '.join(sorted(missing))} in "
                f"{type(model).__name__}. Its most frequent classes: "
                f"{', '.join(name for name, _ in Counter(type(m).__name__ for m in model.modules()).most_common(6))}."
            )
    if not found:
        found = _longest_module_list(model)
    return found


def _longest_module_list(model: nn.Module) -> list[nn.Module]:
    best: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best):
            candidates = [m for m in module if compat.has_implemented_forward(m) and any(True for _ in m.parameters())]
            if len(candidates) == len(module):
                best = candidates
    if best:
        logger.info("layers: no _no_split_modules matched; using the longest ModuleList (%d modules)", len(best))
    return best


def _final_norm(model: nn.Module, layers: list[nn.Module]) -> nn.Module | None:
    """The norm between the last layer and the output projection: a sibling of the list that holds the layers."""
    if not layers:
        return None
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    container = parents.get(layers[-1])
    base = parents.get(container) if container is not None else None
    if base is None:
        return None
    norms = [child for child in base.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None


def all_frozen(module: nn.Module) -> bool:
    """True if there are parameters below ``module`` and none of them is trained."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
