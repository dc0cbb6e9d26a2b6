"""Private names of TRL; :mod:`.names` lists them. Nothing here imports trl."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def iterates_over_weights(generation: Any) -> bool:
    """Whether a ``VLLMGeneration`` of TRL sends the weights that its ``_iter_named_params`` yields (1.16)."""
    return callable(getattr(type(generation), "_iter_named_params", None))


def bind_weights(generation: Any, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Let ``generation`` send what ``weights`` yields."""
    generation._iter_named_params = weights
