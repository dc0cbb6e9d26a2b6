"""Models that run the backward of their layers themselves (Reformer's reversible layers) cannot be sharded."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError


def refuse_own_backward(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raise :class:`UnsupportedError` if an autograd function beside the model calls methods of its layers in
    ``backward``.

    FSDP2 gathers the parameters of a layer around its ``forward`` and its gradient. A method that somebody else's
    backward calls would meet shards. Found from the source of the functions in the modules that define the model and
    its layers; what has no source is taken for harmless.

    Args:
        model: the model without PEFT's wrapper.
        layers: its repeated layers.
    """
    files = {type(m).__module__ for m in (model, *layers)}
    for function in (f for name in files for f in vars(sys.modules.get(name, object)).values()):
        if not (inspect.isclass(function) and issubclass(function, torch.autograd.Function)):
            continue
        for method in sorted(_called(vars(function).get("backward"))):
            layer = next((x for x in layers if _is_own_method(type(x), method)), None)
            if layer is not None:
                raise UnsupportedError(
                    f"{function.__name__}.backward of {type(model).__name__} calls {type(layer).__name__}.{method}: "
                    f"the model runs the backward of its layers itself, and would meet sharded parameters there. Train "
                    f"it on one process per copy: without an AutoParallelismConfig (DDP)."
                )


def _called(function: Any) -> set[str]:
    """Names of the attributes that ``function`` calls."""
    function = getattr(function, "__func__", function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return set()
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {call.attr for call in calls if isinstance(call, ast.Attribute)}


def _is_own_method(cls: type, name: str) -> bool:
    return inspect.isfunction(inspect.getattr_static(cls, name, None)) and not hasattr(nn.Module, name)
