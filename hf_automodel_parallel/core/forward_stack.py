"""The owner of a module's ``forward``: all that this package wraps around it, in one written order.

Tensor parallelism, FSDP2 param groups, checkpoints and compilation each wrap the ``forward`` of a module. They are
installed at different times, and their nesting decides what is recomputed, what is inside of a graph and which dtype
arrives. So each of them is pushed into a named :class:`ForwardSlot`, and the :class:`ForwardStack` of the module links
them in the order of the slots, whatever the order of the pushes.

A stack wraps the ``forward`` and not the module: no name in the model changes, and hooks of FSDP2 stay outside.
"""

from __future__ import annotations

import enum
import functools
import inspect
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]

_ATTRIBUTE = "_forward_stack"


class ForwardSlot(enum.IntEnum):
    """The places around a module's own forward, from the innermost to the outermost."""

    # Replaces the arithmetic of the class (a norm over sharded features, DoRA without a graph break), so it calls
    # nothing and has to be the innermost.
    COMPUTATION = enum.auto()
    # Gathers and scatters the sequence. Inside of checkpoints, whose recomputation gathers again, and of the graph,
    # where the compiler can overlap the collectives.
    SEQUENCE = enum.auto()
    # Autocast, and what undoes a policy's cast of inputs. Inside of PARAM_GROUPS, where FSDP2 casts them. Around
    # SEQUENCE, so that what is gathered has the dtype that is computed in.
    DTYPE = enum.auto()
    # Ends the sharing of copied inputs with each run of the forward: the recomputation makes copies of its own.
    SHARED_INPUTS = enum.auto()
    # The selective checkpoint of a compiled layer. In the graph, where the compiler sees which results to save.
    GRAPH_CHECKPOINT = enum.auto()
    # torch.compile.
    COMPILE = enum.auto()
    # Exchanges DTensors for local tensors. Around COMPILE, so that no DTensor is in the graph.
    LOCAL_PARAMETERS = enum.auto()
    # Shows full views of other modules' parameters. Around LOCAL_PARAMETERS, which looks through the views at a
    # parameter that is the module's own.
    CROSS_MODULE_READS = enum.auto()
    # Runs a layer uncompiled that is not one graph. Around LOCAL_PARAMETERS, because a checkpoint takes the place of
    # GRAPH_CHECKPOINT then; inside of CHECKPOINT, whose recomputation may be what breaks the graph.
    GRAPH_FALLBACK = enum.auto()
    # A checkpoint of the module. Around LOCAL_PARAMETERS: the recomputation runs in backward, where parameters are
    # DTensors, and has to exchange them again.
    CHECKPOINT = enum.auto()
    # Extra FSDP param groups, modules with hooks of FSDP2 that are called around the forward. Outermost: they unshard
    # before anything reads a parameter, and a checkpoint's recomputation finds the parameters as FSDP2 unsharded them
    # for the backward.
    PARAM_GROUPS = enum.auto()


class ForwardWrapper:
    """What stands in a slot: called in place of the forward inside of it.

    Subclasses define ``__call__`` with the arguments of a forward and call :attr:`inner`.

    Attributes:
        inner: the forward inside.
        as_method: hand the bound ``__call__`` on, and not the object. Dynamo guards an object that is called by its
            identity, a method by its code: in a compiled layer an object would cost a graph per layer (and, past the
            limit of recompilations, the compilation of deep models). An object, in turn, shows the signature of the
            module's own forward, which callers of models look at.
    """

    inner: Forward
    as_method = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def wrap(self, inner: Forward) -> Forward:
        """Stand around ``inner`` from now on; returns what to call instead. Called again whenever ``inner`` changes."""
        self.inner = _bound_call(inner)
        return self.__call__ if self.as_method else self


class Replacement(ForwardWrapper):
    """A forward that takes the place of the module's own, in :attr:`ForwardSlot.COMPUTATION`."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def wrap(self, inner: Forward) -> Forward:
        """The replacement; nothing calls ``inner`` any more."""
        return self.forward


class ForwardStack:
    """What is wrapped around the forward of one module; made by :meth:`of`.

    Attributes:
        module: the owner of the forward.
        below: the stack inside of a wrapper of other code, None without one. Nothing is pushed into it any more, but
            what is in it counts as being around the forward.
        entries: slot and wrapper, innermost first. Two of one slot stand in the order in which they were pushed.
        forwards: ``forwards[i]`` is the forward with the first i wrappers around it; ``forwards[0]`` is what the module
            had before (of its class, or set by its user, by Accelerate or PEFT), the last one is ``module.forward``.
    """

    def __init__(self, module: nn.Module, below: ForwardStack | None = None) -> None:
        self.module = module
        self.below = below
        self.entries: list[tuple[ForwardSlot, ForwardWrapper]] = []
        self.forwards: list[Forward] = [module.forward]

    @classmethod
    def of(cls, module: nn.Module) -> ForwardStack:
        """The stack of ``module``; an empty one around its present forward if there is none.

        Also if other code has replaced ``module.forward`` since: its wrapper stays where it is, with the old stack
        inside of it. And if ``module`` is a shallow copy, whose attribute is the stack of another module.
        """
        stack: ForwardStack | None = vars(module).get(_ATTRIBUTE)
        if stack is None or stack.module is not module:
            return cls(module)
        return stack if stack._is_current() else cls(module, stack)

    def push(self, slot: ForwardSlot, wrapper: ForwardWrapper) -> None:
        """Put ``wrapper`` into ``slot``, around everything of that slot and of those further inside."""
        index = bisect_right(self.entries, slot, key=lambda entry: entry[0])
        vars(self.module)[_ATTRIBUTE] = self
        self._relink(index, [(slot, wrapper), *self.entries[index:]])

    def remove(self, *slots: ForwardSlot) -> None:
        """Take everything out of ``slots``."""
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
        """Let ``entries`` stand from ``index`` on. What is further inside is not touched: it may be compiled."""
        current = self._is_current()
        self.entries[index:], self.forwards[index + 1 :] = entries, []
        for _, wrapper in entries:
            forward = wrapper.wrap(self.forwards[-1])
            if forward is wrapper:
                # No attributes (`updated`): those of an object that is wrapped would replace the wrapper's own.
                functools.update_wrapper(wrapper, self.forwards[0], updated=())
            self.forwards.append(forward)
        if current:  # else other code has wrapped it, and its wrapper calls the objects that were linked anew
            self.module.forward = self.forwards[-1]  # type: ignore[method-assign]


def _bound_call(forward: Forward) -> Forward:
    """``forward``, or the bound ``__call__`` of an object; see :attr:`ForwardWrapper.as_method`."""
    call = getattr(forward, "__call__", None)  # noqa: B004
    return call if inspect.ismethod(call) and not inspect.isroutine(forward) else forward
