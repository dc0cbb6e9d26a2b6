"""The wrappers of a module's ``forward``, nested in a fixed order.

Tensor parallelism, FSDP2 param groups, activation checkpoints and compilation each wrap the ``forward`` of a module.
They are installed at different times. Their nesting decides what is recomputed, what is inside of the compiled graph
and in which dtype the inputs arrive. So each wrapper is pushed into a named :class:`ForwardSlot`, and the
:class:`ForwardStack` of the module nests them by slot, independent of the order of the pushes.

A stack wraps the ``forward``, not the module: no name in the model changes, and FSDP2's module hooks stay outside.
"""

from __future__ import annotations

import enum
import functools
import inspect
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import compat

Forward = Callable[..., Any]

_ATTRIBUTE = "_forward_stack"


class ForwardSlot(enum.IntEnum):
    """The slots around a module's own forward, innermost first."""

    # Replaces the arithmetic of the class (a norm over sharded features, DoRA without a graph break). Innermost,
    # because it does not call the forward that it wraps.
    COMPUTATION = enum.auto()
    # Gathers and scatters the sequence. Inside of checkpoints, so that the recomputation gathers again. Inside of the
    # graph, so that the compiler can overlap the collectives.
    SEQUENCE = enum.auto()
    # Autocast, and the wrapper that restores inputs which a mixed-precision policy has cast. Inside of PARAM_GROUPS,
    # where FSDP2 casts the inputs. Around SEQUENCE, so that the gather runs in the compute dtype.
    DTYPE = enum.auto()
    # Clears the cache of shared copy-to-TP inputs after each forward: the recomputation makes its own copies.
    SHARED_INPUTS = enum.auto()
    # The selective checkpoint of a compiled layer. Inside of the graph, where the compiler sees which results to save.
    GRAPH_CHECKPOINT = enum.auto()
    # torch.compile.
    COMPILE = enum.auto()
    # Swaps DTensor parameters for local tensors. Around COMPILE, so that the graph has no DTensor.
    LOCAL_PARAMETERS = enum.auto()
    # Shows full views of parameters of other modules. Around LOCAL_PARAMETERS, which looks through such a view if the
    # parameter is the module's own.
    CROSS_MODULE_READS = enum.auto()
    # Runs a layer uncompiled if torch.compile cannot trace it as one graph. Around LOCAL_PARAMETERS, because a
    # checkpoint then replaces GRAPH_CHECKPOINT. Inside of CHECKPOINT, whose recomputation may be what breaks the graph.
    GRAPH_FALLBACK = enum.auto()
    # An activation checkpoint of the module. Around LOCAL_PARAMETERS: the recomputation runs in backward, where the
    # parameters are DTensors, and has to swap them again.
    CHECKPOINT = enum.auto()
    # Extra FSDP param groups: modules whose FSDP2 hooks are called around the forward. Outermost: they unshard before
    # anything reads a parameter, and the recomputation of a checkpoint uses the parameters that FSDP2 has unsharded
    # for the backward.
    PARAM_GROUPS = enum.auto()


class ForwardWrapper:
    """A wrapper in a slot. It is called in place of the forward that it wraps.

    Subclasses define ``__call__`` with the arguments of a forward and call :attr:`inner`.

    Attributes:
        inner: the wrapped forward.
        as_method: pass on the bound ``__call__`` instead of the object. Dynamo guards a callable object by its
            identity and a method by its code: with objects each compiled layer would need its own graph, and a deep
            model would exceed the recompile limit and stay uncompiled. An object, on the other hand, has the signature
            of the module's own forward, which callers inspect.
    """

    inner: Forward
    as_method = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def wrap(self, inner: Forward) -> Forward:
        """Wrap ``inner`` and return the callable that replaces it. Called again whenever ``inner`` changes."""
        self.inner = _bound_call(inner)
        return self.__call__ if self.as_method else self


class Replacement(ForwardWrapper):
    """A forward that replaces the module's own, in :attr:`ForwardSlot.COMPUTATION`."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def wrap(self, inner: Forward) -> Forward:
        """Return the replacement; ``inner`` is not called any more."""
        return self.forward


class ForwardStack:
    """The wrappers around the forward of one module; get it with :meth:`of`.

    Attributes:
        module: the module that has the forward.
        below: the stack inside of a wrapper of other code; None if there is no such wrapper. Nothing is pushed into it
            any more, but its entries still count as wrappers of the forward.
        entries: slot and wrapper, innermost first. Wrappers of the same slot keep the order of their pushes.
        forwards: ``forwards[i]`` is the forward with the first i wrappers around it. ``forwards[0]`` is the module's
            original forward (of its class, or set by the user, Accelerate or PEFT); the last one is
            ``module.forward``.
    """

    def __init__(self, module: nn.Module, below: ForwardStack | None = None) -> None:
        self.module = module
        self.below = below
        self.entries: list[tuple[ForwardSlot, ForwardWrapper]] = []
        self.forwards: list[Forward] = [module.forward]

    @classmethod
    def of(cls, module: nn.Module) -> ForwardStack:
        """Return the stack of ``module``, or a new one around its current forward.

        If other code has replaced ``module.forward`` since, its wrapper stays, and the old stack becomes :attr:`below`
        of the new one. A shallow copy of a module has the attribute of the original; it gets a new stack as well.
        """
        stack: ForwardStack | None = vars(module).get(_ATTRIBUTE)
        if stack is None or stack.module is not module:
            return cls(module)
        return stack if stack._is_current() else cls(module, stack)

    def push(self, slot: ForwardSlot, wrapper: ForwardWrapper) -> None:
        """Put ``wrapper`` into ``slot``: around all wrappers of that slot and of inner slots, inside of all others."""
        index = bisect_right(self.entries, slot, key=lambda entry: entry[0])
        vars(self.module)[_ATTRIBUTE] = self
        self._relink(index, [(slot, wrapper), *self.entries[index:]])

    def remove(self, *slots: ForwardSlot) -> None:
        """Remove all wrappers from ``slots``."""
        kept = [entry for entry in self.entries if entry[0] not in slots]
        if len(kept) < len(self.entries):
            index = next(i for i, (slot, _) in enumerate(self.entries) if slot in slots)
            self._relink(index, kept[index:])

    def get(self, slot: ForwardSlot) -> ForwardWrapper | None:
        """The outermost wrapper in ``slot`` of this stack, None if it is empty."""
        return next((wrapper for key, wrapper in reversed(self.entries) if key is slot), None)

    def __contains__(self, slot: ForwardSlot) -> bool:
        """Whether ``slot`` is taken, here or :attr:`below`."""
        return self.get(slot) is not None or (self.below is not None and slot in self.below)

    def _is_current(self) -> bool:
        return bool(self.module.forward == self.forwards[-1])  # equal and not identical: each access binds a new method

    def _relink(self, index: int, entries: list[tuple[ForwardSlot, ForwardWrapper]]) -> None:
        """Replace the entries from ``index`` on and link them again.

        The inner entries are not linked again: they may be compiled, and a new object would be compiled anew.
        """
        current = self._is_current()
        self.entries[index:], self.forwards[index + 1 :] = entries, []
        for _, wrapper in entries:
            forward = wrapper.wrap(self.forwards[-1])
            if forward is wrapper:
                # updated=(): else the attributes of a wrapped object would overwrite those of the wrapper.
                functools.update_wrapper(wrapper, self.forwards[0], updated=())
            self.forwards.append(forward)
        if current:  # else other code has wrapped this forward; its wrapper calls the objects that were linked again
            self.module.forward = self.forwards[-1]  # type: ignore[method-assign]


def is_compiled(module: nn.Module) -> bool:
    """True if the call or the forward of ``module`` is compiled, by this package or before, inside of its wrappers."""
    stack = ForwardStack.of(module)
    inside = compat.is_compiled_function(stack.forwards[0])
    return ForwardSlot.COMPILE in stack or inside or compat.is_compiled(module)


def _bound_call(forward: Forward) -> Forward:
    """``forward``, or the bound ``__call__`` of an object; see :attr:`ForwardWrapper.as_method`."""
    call = getattr(forward, "__call__", None)  # noqa: B004
    return call if inspect.ismethod(call) and not inspect.isroutine(forward) else forward
