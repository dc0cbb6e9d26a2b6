"""Names of modules and parameters: through PEFT's wrappers, of tied parameters, as a plan writes them; and the patterns
of a plan.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from typing import Any

from torch import nn

from .. import compat

# Levels that torch's wrappers add to names; a plan never has them.
_TRANSPARENT = re.compile(r"(?:_checkpoint_wrapped_module|_orig_mod)\.")


class ModelView:
    """The names of one model, computed once and passed on.

    A view is valid as long as no module or parameter of the model is replaced. A strategy makes one before it plans;
    sharding replaces parameters, so later steps make a new one.

    Attributes:
        model: the user's model, maybe a ``PeftModel``.
        inner: the Hugging Face model inside.
        prefix: prefix of the inner model's names within ``model``: ``"base_model.model."`` for LoRA,
            ``"base_model."`` for prompt learning, ``""`` for a plain model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inner, self.prefix = _look_through_peft(model)

    @classmethod
    def of(cls, model: nn.Module | ModelView) -> ModelView:
        """The view of ``model``; a view is returned unchanged, so that a caller who has one can pass it instead."""
        return model if isinstance(model, ModelView) else cls(model)

    def plan_name(self, name: str) -> str:
        """``name`` of a module or parameter of ``model`` as a plan writes it."""
        return plan_name(name, self.prefix)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every name of every parameter, tied ones under each of their names, in the order of modules."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def names_of(self) -> dict[nn.Parameter, list[str]]:
        """Each parameter once, with all of its names; the first is that of ``named_parameters()``."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.parameters.items():
            names.setdefault(parameter, []).append(name)
        return names

    @cached_property
    def peft_layers(self) -> dict[str, nn.Module]:
        """PEFT's layers around layers of the model: tuner layers and auxiliary wrappers (``modules_to_save``)."""
        kinds: Any = compat.peft_wrapper_types()
        return {name: module for name, module in self.model.named_modules() if isinstance(module, kinds)}


def _look_through_peft(model: nn.Module) -> tuple[nn.Module, str]:
    if not compat.is_peft_model(model):
        return model, ""
    inner = model.get_base_model()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is inner:
            return inner, f"{name}." if name else ""
    return inner, ""


def plan_name(name: str, prefix: str) -> str:
    """``name`` of a module or parameter as a plan writes it: without the PEFT prefix and torch's wrapper levels."""
    return _TRANSPARENT.sub("", name.removeprefix(prefix) if name.startswith(prefix) else name)


def without_wrappers(name: str) -> str:
    """``name`` without the levels that PEFT puts around a layer, as ``base_layer``."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


# ---- patterns of a plan: module paths in which * stands for one path component -------------------------------------


@lru_cache(maxsize=4096)
def pattern_regex(pattern: str) -> re.Pattern[str]:
    """Compile a plan pattern; ``*`` matches exactly one path component."""
    return re.compile(r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in pattern.split(".")))


def precision(pattern: str) -> int:
    """Higher for patterns with fewer wildcards, so that ``layers.0.x`` wins over ``layers.*.x``."""
    return -pattern.split(".").count("*")


def layer_pattern(name: str) -> str:
    """``name`` with a star for each number, as ``model.layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
