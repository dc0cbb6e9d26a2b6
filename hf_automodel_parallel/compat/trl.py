"""Private names of TRL; :mod:`.names` lists them. Nothing here imports trl."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_KERNEL = "_ChunkedLogProbFunction"


class _NeverGathered:
    """In the place of ``DTensor`` in TRL's forward, which gathers a head that is an instance of it."""


class TRLFusedHead:
    """The forward that TRL's ``add_fused_lm_head`` has given to a model.

    Called with ``fused_lm_head=True`` it runs the backbone and hands the hidden states and the weight of the head to a
    kernel; otherwise it is the model's own forward.

    Attributes:
        model: the model.
        function: TRL's function.
        kernel: TRL's autograd function: (hidden states, weight, bias, targets, ...) -> statistics of the tokens.
        arguments: names of the arguments of ``kernel.apply``.
    """

    def __init__(self, model: nn.Module, function: types.FunctionType) -> None:
        self.model, self.function = model, function
        self.kernel: Any = function.__globals__[_KERNEL]
        self.arguments = tuple(inspect.signature(self.kernel.forward).parameters)[1:]

    @staticmethod
    def of(model: nn.Module) -> TRLFusedHead | None:
        """The fused head of ``model``; None if its forward is another one, or calls no autograd function by that name
        (any more, after :meth:`with_kernel`).
        """
        function = getattr(model.forward, "__func__", None)
        if not isinstance(function, types.FunctionType) or function.__globals__.get("__name__") != "trl.trainer.utils":
            return None
        kernel = function.__globals__.get(_KERNEL) if _KERNEL in function.__code__.co_names else None
        is_function = isinstance(kernel, type) and issubclass(kernel, torch.autograd.Function)
        return TRLFusedHead(model, function) if is_function else None

    def with_kernel(self, kernel: Any) -> Any:
        """The forward, bound to the model, with another ``kernel``, which gets the weight as it is, DTensor or not.

        TRL's code is shared, but has other globals: neither TRL's module nor another model is changed.
        """
        old = self.function
        names = {**old.__globals__, _KERNEL: kernel, "DTensor": _NeverGathered}
        new = types.FunctionType(old.__code__, names, old.__name__, old.__defaults__, old.__closure__)
        new.__kwdefaults__ = old.__kwdefaults__
        wrapped = old.__wrapped__  # type: ignore[attr-defined]
        return types.MethodType(functools.update_wrapper(new, wrapped), self.model)


def iterates_over_weights(generation: Any) -> bool:
    """Whether a ``VLLMGeneration`` of TRL sends the weights that its ``_iter_named_params`` yields (1.16)."""
    return callable(getattr(type(generation), "_iter_named_params", None))


def bind_weights(generation: Any, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Let ``generation`` send what ``weights`` yields."""
    generation._iter_named_params = weights
