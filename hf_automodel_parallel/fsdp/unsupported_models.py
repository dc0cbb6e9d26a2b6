"""LayerDrop: in training each rank skips layers that it has drawn, and a layer that is an FSDP2 unit is gathered from
all ranks.

Seen from the source of the forwards around the layers. Where transformers itself runs every layer under FSDP, it is
told that the module is sharded; everything else is refused, before a rank waits for a layer that the others have
skipped.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .. import compat
from ..errors import UnsupportedError

#: A probability of dropping layers, as forwards read it from themselves or from their config.
_READ = re.compile(r"\bself((?:\.\w+)*\.\w*layerdrop)\b")

#: A layer that is run like on all ranks, but whose output is thrown away, has no gradient on this rank alone.
_THROWN_AWAY = re.compile(r"if skip_the_layer:\s*continue")


def refuse_layer_drop(model: nn.Module, units: list[nn.Module]) -> None:
    """Raise :class:`UnsupportedError` if a module that is in training mode would skip some of ``units`` at random.

    Args:
        model: the model, before sharding; it is only read.
        units: the layers that become units of their own.
    """
    for name, module, fields in _dropping(model, units):
        if not compat.runs_all_layers_under_fsdp(type(module)) or _THROWN_AWAY.search(_source(type(module).forward)):
            _check(module, name, fields)


def keep_layers_together(model: nn.Module, units: list[nn.Module]) -> None:
    """Let transformers run all ``units`` where it can, and check the others again whenever they run."""
    for name, module, fields in list(_dropping(model, units)):
        if compat.runs_all_layers_under_fsdp(type(module)) and not _THROWN_AWAY.search(_source(type(module).forward)):
            compat.show_as_sharded(module)
        else:
            module.register_forward_pre_hook(functools.partial(_checked, name, fields))


def _checked(name: str, fields: list[str], module: nn.Module, _: Any) -> None:
    _check(module, name, fields)


def _check(module: nn.Module, name: str, fields: list[str]) -> None:
    for field in fields:
        value: Any = module
        for key in field.split("."):
            value = getattr(value, key, 0)
        if module.training and isinstance(value, (int, float)) and value > 0:
            place = f"{name}.{field}".lstrip(".")
            raise UnsupportedError(
                f"{place}={value!r} (LayerDrop): each data-parallel rank would skip other layers of "
                f"{type(module).__name__}, but each layer is gathered from all ranks, which would wait for each other "
                f"for ever. Set it to 0.0, as `model.{place} = 0.0` or in the config before the model is built, or use "
                "one data-parallel rank."
            )


def _dropping(model: nn.Module, units: list[nn.Module]) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Modules around ``units`` whose forward reads a probability of skipping: name, module, paths of what it reads."""
    wanted = {id(unit) for unit in units}
    for name, module in model.named_modules():
        fields = sorted({match.group(1).lstrip(".") for match in _READ.finditer(_source(type(module).forward))})
        if fields and any(id(inner) in wanted for inner in module.modules() if inner is not module):
            yield name, module, fields


@functools.cache
def _source(forward: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return ""
