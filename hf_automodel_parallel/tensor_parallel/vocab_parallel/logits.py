"""``ShardedLogits``: the output of the output projection under loss parallelism, sharded as long as possible.

From outside it is the full logits: shape, dtype, device, gradient function. Inside it holds this rank's slice of the
vocabulary. Element-wise functions and views of the leading dimensions run on the slice; cross entropy and its relatives
run vocabulary-parallel (:mod:`.cross_entropy`); every other function gathers the slices, once, and gets a plain tensor.

The handlers (:mod:`.elementwise`, :mod:`.reductions`) run in ``__torch_function__``, above autograd, so autograd
records operations on slices only. Code below that protocol (C++, custom autograd functions, collectives) gets the
wrapper itself, which is part of the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ... import compat
from ...core.rendezvous import wait_for_ranks
from ...errors import UnsupportedError
from ..boundary_hooks import map_tensor
from ..collectives import gather_from_tp, split_to_tp
from ..thread_group import ThreadGroup
from .cross_entropy import Vocabulary


class ShardedLogits(torch.Tensor):
    """Logits (..., V) of which this rank holds the slice (..., V / size); made by :func:`shard_logits`.

    Reading values is a collective over the tp group, once per object: all of its ranks have to do it. Printing reads no
    values. A change in place changes the slice, and with it all views of the slice.

    An upcast (``logits.float()``, with which losses begin) is deferred to where the values are used, so that the loss
    can do it chunk by chunk; until then ``dtype`` differs from the dtype of the slice.

    Private state: ``_slice``; ``_full``, the gathered logits, and the versions of it and of the slice at that time;
    ``_noted``, the version of the slice when this object was made; ``_family``, one object for all views of one upcast:
    the id of the view that was changed in place (0: none).
    """

    vocabulary: Vocabulary
    _slice: torch.Tensor
    _full: torch.Tensor | None
    _full_versions: tuple[int, int]
    _noted: int
    _family: list[int]

    @staticmethod
    def __new__(cls, part: torch.Tensor, vocabulary: Vocabulary, dtype: torch.dtype) -> ShardedLogits:
        shape = (*part.shape[:-1], part.shape[-1] * vocabulary.size)
        return compat.wrapper_subclass(cls, shape, dtype, part.device)

    def __init__(self, part: torch.Tensor, vocabulary: Vocabulary, dtype: torch.dtype) -> None:
        self.vocabulary = vocabulary
        self._slice = part
        self._full = None
        self._noted = compat.version_of(part)
        self._family = [0]

    # ---- values ------------------------------------------------------------------------------------------------

    @property
    def is_upcast(self) -> bool:
        """The slice has a narrower dtype than these logits."""
        return self._slice.dtype != self.dtype

    def stored(self) -> torch.Tensor:
        """This rank's slice (..., V / size), maybe in a narrower dtype than ``dtype``.

        Not a plain getter: it takes over changes that were written into a view of the gathered logits, and connects the
        slice with an autograd function that has recorded the wrapper only.

        Raises:
            UnsupportedError: the slice was changed in place after these logits were taken of it in another dtype.
        """
        if self._full is not None and compat.version_of(self._full) != self._full_versions[0]:
            self.replace(self._full)  # a view of the gathered logits was changed in place
        if self.is_upcast and (compat.version_of(self._slice) != self._noted or self._family[0] not in (0, id(self))):
            raise UnsupportedError(
                "the logits were modified in place after this copy or view of them in another dtype was taken; do not "
                "modify them in place (logits = logits / temperature instead of logits.div_(temperature)), or set "
                "loss_parallel=False."
            )
        if torch.is_grad_enabled() and self.requires_grad and not self._slice.requires_grad:
            # The result of a custom autograd function, which has recorded the wrapper only.
            with compat.without_torch_function():
                self._slice = _Leave.apply(self, self._slice)
        return self._slice

    def own(self) -> torch.Tensor:
        """This rank's slice (..., V / size) in ``dtype``."""
        return self.stored().to(self.dtype)

    def full(self) -> torch.Tensor:
        """The full logits (..., V) as a plain tensor, gathered at the first call; a collective of the tp group."""
        part = self.stored()
        version = compat.version_of(part)
        graph_is_missing = (
            self._full is not None and torch.is_grad_enabled() and part.requires_grad and not self._full.requires_grad
        )
        if self._full is None or graph_is_missing or self._full_versions[1] != version:
            v = self.vocabulary
            if not isinstance(v.group, ThreadGroup) and not torch.compiler.is_compiling():
                wait_for_ranks(
                    dist.get_process_group_ranks(v.group),
                    "reads logits that are sharded over the vocabulary",
                    "Read them on all ranks of the tp group and print or log on one, run a forward under "
                    "torch.no_grad(), which returns full logits, or set loss_parallel=False.",
                )
            full = gather_from_tp(part, v.group, v.rank, v.size).to(self.dtype)
            self._full, self._full_versions = full, (compat.version_of(full), version)
        return self._full

    def writable(self) -> torch.Tensor:
        """The slice in ``dtype``, to be changed in place; call :meth:`written` after."""
        if self.is_upcast:
            self._slice = self.own()
            self._family[0] = id(self)
        return self.stored()

    def written(self) -> None:
        """After a change of the slice in place: drop the gathered logits, and update the wrapper's ``grad_fn``."""
        self._full = None
        if torch.is_grad_enabled() and self._slice.requires_grad:
            with compat.without_torch_function():
                _Follow.apply(self._slice, self)

    def replace(self, full: torch.Tensor) -> None:
        """Overwrite these logits in place with ``full`` (..., V), which is equal on all ranks."""
        self._full = None
        v = self.vocabulary
        own = split_to_tp(full, v.group, v.rank, v.size)
        self.writable().copy_(own)
        self.written()

    def like(self, part: torch.Tensor, dtype: torch.dtype | None = None, alias: bool = False) -> ShardedLogits:
        """New sharded logits around another slice.

        Args:
            part: (..., V / size).
            dtype: dtype of the result if ``part`` is narrower.
            alias: ``part`` is a view of this slice.
        """
        result = shard_logits(part, self.vocabulary, dtype)
        if alias and self.is_upcast:
            result._family = self._family
        return result

    # ---- the protocols -----------------------------------------------------------------------------------------

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in METADATA:
            return super().__torch_function__(function, types, args, kwargs or {})
        handler = HANDLERS.get(function)
        result = NotImplemented if handler is None else handler(function, *in_order(args, kwargs or {}))
        return on_full(function, args, kwargs or {}) if result is NotImplemented else result

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Below autograd, which has recorded the wrapper itself: compute with the full values."""
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            (logits,) = args
            return ShardedLogits(logits.stored().detach(), logits.vocabulary, logits.dtype)
        args, kwargs = with_full((args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        v = self.vocabulary
        return (
            f"ShardedLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}: slice {v.rank} of "
            f"{v.size} is here; any calculation gives plain tensors)"
        )


class _Enter(torch.autograd.Function):
    """A slice -> the wrapper around it; backward takes the own slice of a full gradient."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, vocabulary: Vocabulary, dtype: torch.dtype) -> torch.Tensor:
        ctx.rank, ctx.size, ctx.dtype = vocabulary.rank, vocabulary.size, part.dtype
        return ShardedLogits(part, vocabulary, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _own_part(gradient, ctx), None, None


class _Follow(torch.autograd.Function):
    """:class:`_Enter` again, for an existing wrapper whose slice was changed in place."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, wrapper: ShardedLogits) -> torch.Tensor:
        ctx.rank, ctx.size, ctx.dtype = wrapper.vocabulary.rank, wrapper.vocabulary.size, part.dtype
        ctx.mark_dirty(wrapper)
        return wrapper

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _own_part(gradient, ctx), None


class _Leave(torch.autograd.Function):
    """A wrapper that autograd has recorded -> its slice; the gradient is sharded in the same way."""

    @staticmethod
    def forward(ctx: Any, wrapper: ShardedLogits, part: torch.Tensor) -> torch.Tensor:
        ctx.vocabulary, ctx.dtype = wrapper.vocabulary, wrapper.dtype
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ShardedLogits(gradient, ctx.vocabulary, ctx.dtype), None


def _own_part(gradient: torch.Tensor, ctx: Any) -> torch.Tensor:
    if isinstance(gradient, ShardedLogits):
        return gradient.own().to(ctx.dtype)
    width = gradient.shape[-1] // ctx.size
    return gradient.narrow(-1, ctx.rank * width, width).to(ctx.dtype)


def shard_logits(part: torch.Tensor, vocabulary: Vocabulary, dtype: torch.dtype | None = None) -> ShardedLogits:
    """Wrap ``part`` (..., V / size), this rank's slice of logits, as the full logits (..., V).

    Args:
        part: a plain tensor, connected by autograd or not.
        vocabulary: how the last dimension is spread.
        dtype: floating dtype at least as wide as that of ``part``; None: that of ``part``.
    """
    dtype = dtype or part.dtype
    if part.requires_grad and not torch.is_grad_enabled():
        part = part.detach()
    result = _Enter.apply(part, vocabulary, dtype)
    result._slice = part  # in forward() the function got a tensor that is not part of the graph
    return result


class KeepSharded:
    """Hook of a column-wise output projection: its output becomes :class:`ShardedLogits` while autograd records."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        v = self.vocabulary
        # Evaluation reads logits, often on one rank only, where no collective may run.
        if not torch.is_grad_enabled():
            return map_tensor(output, lambda x: gather_from_tp(x, v.group, v.rank, v.size))
        return map_tensor(output, lambda x: shard_logits(x, v))


Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


#: Functions of the wrapper's own metadata: shape, dtype, device and ``grad_fn``.
METADATA: set[Any] = set()

#: torch function -> its handler; filled by :mod:`.elementwise` and :mod:`.reductions`.
HANDLERS: dict[Any, Handler] = {}


def _functions(names: Iterable[str]) -> list[Any]:
    """torch's functions with these names: methods of Tensor, in ``torch`` and in ``torch.nn.functional``."""
    return [getattr(space, name) for name in names for space in (torch.Tensor, torch, F) if hasattr(space, name)]


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Decorator of a handler for the torch functions with these ``names``."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(_functions(names), handler))
        return handler

    return register


def with_full(value: Any) -> Any:
    """``value`` (arguments, nested in tuples, lists and dicts) with sharded logits replaced by full plain tensors."""
    if isinstance(value, ShardedLogits):
        return value.full()
    if isinstance(value, (tuple, list)):
        items = [with_full(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: with_full(item) for key, item in value.items()}
    return value


#: numpy's name for an argument, which torch accepts -> torch's name.
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def in_order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as handlers read them: the tensor first, also if it was given by name, and torch's own names.

    They are new objects: :func:`on_full` needs the arguments as they were given.
    """
    named = {_NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
    # torch.where has its tensor in the second position.
    name = None if args or "condition" in named else next((n for n in ("input", "x", "a", "x1") if n in named), None)
    return (args if name is None else (named.pop(name),)), named


def on_full(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``function`` with gathered logits; its changes in place are written back into the slices."""
    name = getattr(function, "__name__", "")
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if in_place:
        args, kwargs = in_order(args, kwargs)
    if in_place and args and isinstance(args[0], ShardedLogits):
        logits: ShardedLogits = args[0]
        full = logits.full().clone()
        result = function(full, *with_full(args[1:]), **with_full(kwargs))
        if full.shape != logits.shape or full.dtype != logits.dtype or (result is not None and result is not full):
            raise UnsupportedError(
                f"{name} on sharded logits; make a copy (logits.clone()[:]) or set loss_parallel=False."
            )
        logits.replace(full)
        return None if result is None else logits
    return function(*with_full(args), **with_full(kwargs))
