"""The classes whose instances megatron-fsdp gathers and frees together."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

from torch import nn

from ...core.model_structure import find_structure
from ...errors import ConfigError, UnsupportedError
from ...fsdp.shard import separable


def unit_classes(model: nn.Module, given: Sequence[str | type[nn.Module]] | None) -> list[type[nn.Module]]:
    """The unit classes of ``model``.

    Args:
        model: the model, plain or PEFT-wrapped.
        given: classes, import paths or class names; None for the repeated layers, and the whole model if it has none.

    Raises:
        ConfigError: a class does not occur in the model.
        UnsupportedError: a unit would contain another one, or a parameter that is also used outside of it.
    """
    if given is None:
        layers = find_structure(model).layers
        whole = {id(layer) for layer in separable(model, layers)}
        shared = {type(layer) for layer in layers if id(layer) not in whole}
        classes = [cls for cls in dict.fromkeys(map(type, layers)) if cls not in shared]
        return classes or [type(model)]
    classes = list(dict.fromkeys(_find(model, item) for item in given))
    units = [module for module in model.modules() if isinstance(module, tuple(classes))]
    for unit in units:
        inner = next((m for m in unit.modules() if m is not unit and isinstance(m, tuple(classes))), None)
        if inner is not None:
            raise UnsupportedError(
                f"megatron_fsdp_unit_modules: {type(unit).__name__} contains {type(inner).__name__}; megatron-fsdp "
                f"would free the inner one while the outer one needs it. Name one of the two."
            )
    whole = {id(unit) for unit in separable(model, units)}
    for unit in units:
        if id(unit) not in whole and unit is not model and any(True for _ in unit.parameters()):
            raise UnsupportedError(
                f"megatron_fsdp_unit_modules: a {type(unit).__name__} shares a parameter with modules outside of it, "
                f"which megatron-fsdp would free under them. Leave it out, or untie the parameter."
            )
    return classes


def _find(model: nn.Module, item: str | type[nn.Module]) -> type[nn.Module]:
    """The class that ``item`` means."""
    present = {type(module): None for module in model.modules()}
    if isinstance(item, type):
        if any(issubclass(cls, item) for cls in present):
            return item
    else:
        path, _, name = item.rpartition(".")
        by_name = [cls for cls in present if cls.__name__ == name and path in ("", cls.__module__)]
        if by_name:
            return by_name[0]
        cls = _imported(path, name) if path else None
        if isinstance(cls, type) and any(issubclass(known, cls) for known in present):
            return cls
    shown = item if isinstance(item, str) else f"{item.__module__}.{item.__qualname__}"
    names = sorted({cls.__name__ for cls in present})
    near = difflib.get_close_matches(shown.rpartition(".")[2], names, n=3, cutoff=0.4)
    raise ConfigError(
        f"megatron_fsdp_unit_modules names {shown!r}, but {type(model).__name__} has no module of this class"
        + (f"; did you mean {', '.join(near)}?" if near else f". Its classes: {', '.join(names[:8])}.")
    )


def _imported(path: str, name: str) -> object:
    try:
        return getattr(importlib.import_module(path), name, None)
    except ImportError:
        return None
