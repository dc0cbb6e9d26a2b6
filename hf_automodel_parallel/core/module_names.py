"""Names of modules and parameters as a plan writes them, whatever PEFT has wrapped around the model."""

from __future__ import annotations

import re

from torch import nn

from .. import compat

# Wrapper levels that torch puts into names; they never appear in a plan.
_TRANSPARENT = re.compile(r"(?:_checkpoint_wrapped_module|_orig_mod)\.")


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """Look through PEFT's model wrappers.

    Returns:
        The Hugging Face model inside, and the prefix of its names within ``model`` (``"base_model.model."`` for LoRA,
        ``"base_model."`` for prompt learning, ``""`` for a plain model).
    """
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
