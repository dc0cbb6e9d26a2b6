"""Which values are replicated across the ranks of a tp group, and which vary? Decided from the operators of a forward.

This is the analysis of JAX's ``shard_map`` with ``check_vma`` ("varying manual axes",
https://docs.jax.dev/en/latest/notebooks/shard_map.html), for one mesh axis. A value that is computed from a *varying*
one varies, until a collective makes it *invariant* (replicated). A replicated parameter that is combined with a varying
value gets a ``Partial`` gradient: each rank computes its local contribution. An invariant *activation* may be combined
with a varying one only behind a copy to TP (Megatron's f, JAX's ``pvary``), which all-reduces its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .feature_shard import CombinesShards, FeatureShard, shard_after
from .operator_trace import OperatorTrace, argument_of, operator_name, storage_id, tensors_in


@dataclass(frozen=True)
class Value:
    """The facts about a tensor.

    Attributes:
        varying: it varies over the ranks.
        data: it is invariant and depends on activations, so a gradient flows back through it.
        parameters: it is computed only from these replicated parameters and constants.
        tail: only this many of its last features vary; None: all or none.
        features: a dimension is one rank's shard of features that belong together.
    """

    varying: bool = False
    data: bool = False
    parameters: frozenset[str] = frozenset()
    tail: int | None = None
    features: FeatureShard | None = None


CONSTANT = Value()
INVARIANT = Value(data=True)
VARYING = Value(varying=True)
FEATURES = Value(varying=True, features=FeatureShard())

#: Operators whose output does not depend on the values of their input.
_FORGETS = frozenset("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty".split())


class WrongPlan(Exception):
    """The ranks do not compute what one process computes."""


class NotTraceable(Exception):
    """An operator bypasses the TP hooks of the plan, so there are no facts about its result."""


class VaryingTrace(OperatorTrace[Value]):
    """Follows :class:`Value` through operators.

    Args:
        parameters: id of a parameter -> its facts.
        unsharded: ids of the original, unsharded tensors of sharded parameters. A forward that was replaced by a
            function of the original module reads them, and runs past the TP hooks.

    Attributes:
        partial: name of a replicated parameter that was combined with a varying value -> where.
        complete: name of a replicated parameter that was combined with an invariant activation -> where.
        module: name of the module that runs, for the two above.
    """

    def __init__(self, parameters: dict[int, Value], unsharded: frozenset[int] = frozenset()) -> None:
        super().__init__(parameters)
        self.unsharded = unsharded
        self.partial: dict[str, str] = {}
        self.complete: dict[str, str] = {}
        self.module = ""
        self._written: dict[int, Value] = {}  # id of a storage -> what was written into it through one of its views

    def value(self, x: Any) -> Value:
        """The facts about ``x``, or about the storage that it is a view of."""
        known = self.facts.get(id(x))
        if isinstance(x, torch.Tensor) and self._written and not (known and known.varying):
            return self._written.get(storage_id(x), known or CONSTANT)
        return known or CONSTANT

    def mark(self, x: torch.Tensor, value: Value) -> torch.Tensor:
        """Note ``value`` for ``x``, and return ``x``."""
        self.note(x, value)
        return x

    def copied_to_tp(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` behind a copy to TP (identity forward, all-reduce backward), to be combined with varying values."""
        for name in self.value(x).parameters:
            self.complete.setdefault(name, self.module)
        return self.mark(torch.empty_like(x), VARYING)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        if self.unsharded and any(id(x) in self.unsharded for x in inputs):
            raise NotTraceable("a replaced forward reads the weights of the original module")
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if not outputs or not inputs:
            return result
        name = operator_name(func)
        if self._with_tail(name, func, args, kwargs, outputs):
            return result
        value = self._combined(func, inputs)
        shard_of = self._shards_after(name, func, args, kwargs, inputs)
        if name in _FORGETS:
            value = CONSTANT
        elif name == "detach":
            value = VARYING if value.varying else CONSTANT
        for x in outputs:
            own = value if x.is_floating_point() or x.is_complex() else Value(varying=value.varying)
            if own == VARYING and shard_of is not None:
                own = replace(own, features=shard_of(x))
            if func._schema.is_mutable and any(x is i for i in inputs):
                own = self._write(x, own)
            if own != CONSTANT or id(x) in self.facts:
                self.mark(x, own)
        return result

    def _write(self, x: torch.Tensor, value: Value) -> Value:
        """Note that ``value`` was written into the memory of ``x``; returns the new facts about ``x``."""
        before = self.value(x)
        if before.varying or value.varying:
            now = VARYING
        else:
            now = before if value == CONSTANT else value
        self._written[storage_id(x)] = now
        # Or another storage could get the id of this one.
        self._alive.append(x)
        return now

    def _combined(self, func: Any, inputs: list[torch.Tensor]) -> Value:
        values = [self.value(x) for x in inputs]
        parameters = frozenset().union(*(v.parameters for v in values))
        if any(v.varying for v in values):
            if any(v.data for v in values):
                raise WrongPlan(
                    f"{func} combines a replicated activation with one that varies across the ranks and no copy to TP "
                    f"is between them, so the gradient of the first would be Partial"
                )
            for name in parameters:
                self.partial.setdefault(name, self.module)
            return VARYING
        if any(v.data for v in values):
            for name in parameters:
                self.complete.setdefault(name, self.module)
            return INVARIANT
        return Value(parameters=parameters) if parameters else CONSTANT

    def _shards_after(
        self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]
    ) -> Callable[[torch.Tensor], FeatureShard | None] | None:
        shards = [(x, shard) for x in inputs if (shard := self.value(x).features) is not None]
        if not shards:
            return None
        try:
            return shard_after(name, func, args, kwargs, shards)
        except CombinesShards as error:
            raise WrongPlan(f"{func} {error} features that are sharded over the ranks") from error

    def _with_tail(self, name: str, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> bool:
        """Mark the outputs of an operator on a tensor of which only the last features vary; False for another one."""
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        tail = self.value(x).tail if x is not None else None
        if tail is None or x is None:
            return False
        width = x.shape[-1]
        start = width - tail
        if name in ("split", "split_with_sizes", "slice"):
            if argument_of(func, "dim", args, kwargs) % x.ndim == x.ndim - 1:
                offset = (argument_of(func, "start", args, kwargs) or 0) if name == "slice" else 0
                offset = offset if offset >= 0 else offset + width
                for part in outputs:
                    end = offset + part.shape[-1]
                    if end <= start:
                        self.mark(part, INVARIANT)
                    elif offset >= start:
                        self.mark(part, VARYING)
                    else:
                        self.mark(part, Value(varying=True, tail=end - start))
                    offset = end
                return True
        if (func.is_view or name in ("clone", "_to_copy")) and all(y.shape[-1:] == x.shape[-1:] for y in outputs):
            for y in outputs:
                self.mark(y, self.value(x))
            return True
        return False
