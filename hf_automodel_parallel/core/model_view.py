"""Names of modules and parameters of a model that PEFT may have wrapped, and the patterns of plans that match them."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .. import compat

# Name components that torch's checkpoint wrapper and torch.compile insert. Plans are written without them.
_TRANSPARENT = re.compile(r"(?:_checkpoint_wrapped_module|_orig_mod)\.")


def class_of(module: nn.Module) -> type:
    """The class of ``module`` before ``fully_shard``, which replaces the class of an FSDP unit by a subclass."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


class ModelView:
    """The names of one model, computed once and passed on.

    A view is valid until a module or parameter of the model is replaced. A strategy makes one before it plans. Sharding
    replaces the parameters, so later steps make a new one.

    Attributes:
        model: the user's model, plain or a ``PeftModel``.
        inner: the Hugging Face model inside.
        prefix: prefix of the inner model's names in ``model``: ``"base_model.model."`` for LoRA, ``"base_model."`` for
            prompt learning, ``""`` for a plain model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inner, self.prefix = _look_through_peft(model)

    @classmethod
    def of(cls, model: nn.Module | ModelView) -> ModelView:
        """Return a view of ``model``; a view is returned unchanged, so that callers can pass one on."""
        return model if isinstance(model, ModelView) else cls(model)

    def plan_name(self, name: str) -> str:
        """``name`` of a module or parameter of ``model``, in the form that plans use."""
        return plan_name(name, self.prefix)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter in the order of modules; a tied parameter has an entry for each of its names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def names_of(self) -> dict[nn.Parameter, list[str]]:
        """Parameter -> all of its names; the first is the name in ``named_parameters()``."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.parameters.items():
            names.setdefault(parameter, []).append(name)
        return names

    @cached_property
    def peft_layers(self) -> dict[str, nn.Module]:
        """Name -> PEFT module that wraps a layer: tuner layers and auxiliary wrappers (``modules_to_save``)."""
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
    """``name`` without the PEFT prefix and without the components of torch's wrappers: the form that plans use."""
    return _TRANSPARENT.sub("", name.removeprefix(prefix) if name.startswith(prefix) else name)


def without_wrappers(name: str) -> str:
    """``name`` without the components that PEFT inserts where it wraps a layer (``base_layer``, ...)."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


# ---- patterns of a plan: module paths in which * stands for one path component -------------------------------------


@lru_cache(maxsize=4096)
def pattern_regex(pattern: str) -> re.Pattern[str]:
    """Compile a plan pattern; ``*`` matches exactly one path component."""
    return re.compile(r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in pattern.split(".")))


def precision(pattern: str) -> int:
    """Sort key that is higher for patterns with fewer wildcards: ``layers.0.x`` wins over ``layers.*.x``."""
    return -pattern.split(".").count("*")


def layer_pattern(name: str) -> str:
    """``name`` with ``*`` for each numeric component: ``model.layers.3.mlp`` -> ``model.layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
