"""What cannot be done to a model once megatron-fsdp has its parameters in buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...core.model_view import ModelView
from ...errors import UnsupportedError

#: PEFT's and transformers' operations that change parameters, or which of them are trained, which megatron-fsdp has in
#: buffers.
_CHANGING = (
    "add_adapter",
    "add_weighted_adapter",
    "delete_adapter",
    "inject_adapter",
    "load_adapter",
    "merge_adapter",
    "merge_and_unload",
    "set_adapter",
    "set_requires_grad",
    "unload",
    "unmerge_adapter",
)


def refuse_changes(model: nn.Module) -> None:
    """Let operations that change parameters of ``model``, or which of them are trained, say that they cannot be
    done.
    """
    inner = ModelView.of(model).inner
    for owner in {id(o): o for o in (model, getattr(model, "base_model", None), inner)}.values():
        for name in _CHANGING:
            if isinstance(owner, nn.Module) and callable(getattr(type(owner), name, None)):
                owner.__dict__[name] = _refusal(name)


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"{name}() on a model that megatron-fsdp manages: it holds parameters and gradients in buffers made for "
            f"those that were there when it was sharded. Do it before, or use backend='fsdp2'."
        )

    return refuse
