"""Conditionally executed layers: layers of the language part that a forward of text alone skips (cross-attention to
images).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import first_line
from .stack_runner import StackRunner, first_tensor, smallest_stack

logger = logging.getLogger(__name__)


def skipped_without_images(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Those of ``layers`` that the model around them does not call for text alone, seen by a run on fake tensors.

    Args:
        model: a model with modality encoders; it is only read.
        layers: the layers of its language part.

    Returns:
        The skipped layers; none where the model cannot be run like this.
    """
    names = {module: name for name, module in model.named_modules()}
    stack = smallest_stack(model, [names[layer] for layer in layers])
    if stack is None:
        return []
    called: set[str] = set()

    def on_layer(name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        called.add(name)
        return first_tensor(args, kwargs)  # instead of running: the hidden states keep their shape

    try:
        with torch.no_grad():
            StackRunner(model, stack, layers, names, on_layer=on_layer).run()
    except Exception as error:
        logger.debug("which layers a forward of text alone runs is not known: %s", first_line(error))
        return []
    return [layer for layer in layers if names[layer] not in called] if called else []
