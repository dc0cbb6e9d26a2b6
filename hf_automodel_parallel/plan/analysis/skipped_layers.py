"""Layers of the language part that a forward of text alone skips: those that attend to images, seen by a run without
values.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ... import compat
from ...core.sharding_spec import ShardingSpec
from ...errors import first_line
from .stack_runner import StackRunner

logger = logging.getLogger(__name__)


def skipped_without_images(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Those of ``layers`` that the model around them does not call for text alone.

    Args:
        model: a model with towers; it is only read.
        layers: the layers of its language part.

    Returns:
        The skipped layers; none where the model cannot be run like this.
    """
    names = {module: name for name, module in model.named_modules()}
    stack = _stack(model, [names[layer] for layer in layers])
    if stack is None:
        return []
    try:
        ran = _Calls(model, ShardingSpec(), stack, layers, names).names_called()
    except Exception as error:
        logger.debug("which layers text alone runs is not known: %s", first_line(error))
        return []
    return [layer for layer in layers if names[layer] not in ran] if ran else []


def _stack(model: nn.Module, wanted: list[str]) -> nn.Module | None:
    """The smallest module around all of ``wanted`` that takes tokens."""
    path = wanted[0] if wanted else ""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if all(not path or name.startswith(f"{path}.") for name in wanted) and compat.has_implemented_forward(module):
            if {"input_ids", "inputs_embeds"} & set(inspect.signature(module.forward).parameters):
                return module
    return None


class _Calls(StackRunner):
    """The same run of a stack as for sequence parallelism; its layers only note that they were called."""

    def names_called(self) -> set[str]:
        """Run the stack; the names of the layers that it called."""
        self.fake = compat.fake_tensor_mode()
        self.ran: set[str] = set()
        stack = self._skeleton()
        with torch.no_grad(), compat.quiet_fake_tensors():
            stack(**self._inputs(stack))
        return self.ran

    def _layer(self, name: str, kind: type, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.ran.add(name)
            return next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))

        return run

    def _beside(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self._to_fake((args, kwargs))
            with self.fake:
                return self._to_real(forward(*args, **kwargs))

        return run
