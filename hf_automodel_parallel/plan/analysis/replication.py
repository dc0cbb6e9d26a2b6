"""Which values are equal on all ranks of a tp group, and which differ? Seen from the operators that a forward runs.

The rules are those of ``shard_map`` in JAX (varying manual axes): what is computed from something that differs between
the ranks differs, until a collective makes it equal. A replicated parameter that meets a differing value gets a
different summand of its gradient on each rank; a replicated *activation* may meet one only through a boundary that sums
its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ... import compat


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    Attributes:
        varying: it differs between the ranks.
        data: it is the same on all ranks and depends on activations, so a gradient flows back through it.
        parameters: it is computed from these replicated parameters and constants alone.
        tail: only this many of its last features differ; None: all or none.
        features: its last dimension holds the share of one rank of features that belong together.
    """

    varying: bool = False
    data: bool = False
    parameters: frozenset[str] = frozenset()
    tail: int | None = None
    features: bool = False


CONSTANT = Value()
EQUAL = Value(data=True)
VARYING = Value(varying=True)
FEATURES = Value(varying=True, features=True)

#: Operators that combine entries along a dimension: (argument that says which, default of all dimensions).
_ALONG = ("dim", "normalized_shape", "axis")
_COMBINES = frozenset(
    "sum mean var var_mean std std_mean amax amin max min argmax argmin norm linalg_vector_norm logsumexp prod softmax "
    "_softmax "
    "log_softmax _log_softmax cumsum cumprod sort topk kthvalue median native_layer_norm _fused_rms_norm".split()
)
_KEEPS_PLACES = frozenset("clone _to_copy detach alias copy_ native_dropout".split())


class WrongPlan(Exception):
    """What the ranks compute is not what one process computes."""


class NotTraceable(Exception):
    """Something runs whose boundaries cannot be seen, so that nothing is known of what it computes."""


class ReplicationTrace(compat.TorchDispatchMode):
    """Follows :class:`Value` through operators.

    Args:
        parameters: what is known, by ids of tensors.
        whole: ids of sharded parameters in their whole shape. A forward that somebody replaced by a function of the
            original module reads them, and runs past the boundaries.

    Attributes:
        partial: names of replicated parameters that meet differing values.
        complete: names of replicated parameters that meet activations that all ranks share.
    """

    def __init__(self, parameters: dict[int, Value], whole: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.values = parameters
        self.whole = whole
        self.partial: dict[str, str] = {}
        self.complete: dict[str, str] = {}
        self.place = ""
        self._written: dict[int, Value] = {}  # memory that something else has been written into
        self._alive: list[torch.Tensor] = []  # ids are unique among living objects only

    def value(self, x: Any) -> Value:
        """What is known of ``x``, or of the memory that it is a view of."""
        known = self.values.get(id(x))
        if isinstance(x, torch.Tensor) and self._written and not (known and known.varying):
            return self._written.get(x.untyped_storage()._cdata, known or CONSTANT)
        return known or CONSTANT

    def mark(self, x: torch.Tensor, value: Value) -> torch.Tensor:
        """Note ``value`` for ``x``."""
        self.values[id(x)] = value
        self._alive.append(x)
        return x

    def copied(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` behind a boundary that sums its gradient: it may meet differing values."""
        value = self.value(x)
        for name in value.parameters:
            self.complete.setdefault(name, self.place)
        return self.mark(self.alias(x), VARYING)

    @staticmethod
    def alias(x: torch.Tensor) -> torch.Tensor:
        """Another tensor object of the shape and dtype of ``x``."""
        return torch.empty_like(x)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.whole and any(id(x) in self.whole for x in compat.tree_leaves((args, kwargs))):
            raise NotTraceable("a replaced forward reads the weights of the original module")
        result = func(*args, **kwargs)
        outputs = [x for x in compat.tree_leaves(result) if isinstance(x, torch.Tensor)]
        inputs = [x for x in compat.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not outputs or not inputs:
            return result
        name = func.name().removeprefix("aten::").partition(".")[0]
        if self._split(name, func, args, kwargs, outputs):
            return result
        value = self._combined(func, inputs)
        shares = [x for x in inputs if self.value(x).features]
        if shares:
            self._check_features(name, func, args, kwargs, shares)
            kept = torch.Tag.pointwise in func.tags or name in _KEEPS_PLACES
            value = FEATURES if kept and value == VARYING else value
        if name in (
            "detach",
            "zeros_like",
            "ones_like",
            "empty_like",
            "full_like",
            "new_zeros",
            "new_ones",
            "new_empty",
        ):
            value = CONSTANT if name != "detach" or not value.varying else VARYING
        for x in outputs:
            own = value if x.is_floating_point() or x.is_complex() else Value(varying=value.varying)
            if any(x is i for i in inputs) and func._schema.is_mutable:
                before = self.value(x)
                own = VARYING if before.varying or own.varying else own if own != CONSTANT else before
                self._written[x.untyped_storage()._cdata] = own
                self._alive.append(x)  # the address of memory that is freed is taken again
            if own != CONSTANT or id(x) in self.values:
                self.mark(x, own)
        return result

    def _combined(self, func: Any, inputs: list[torch.Tensor]) -> Value:
        values = [self.value(x) for x in inputs]
        parameters = frozenset().union(*(v.parameters for v in values))
        if any(v.varying for v in values):
            if any(v.data for v in values):
                raise WrongPlan(
                    f"{func} combines an activation that all ranks share with one that differs between them, so the "
                    f"gradient of the first would be a summand on each rank"
                )
            for name in parameters:
                self.partial.setdefault(name, self.place)
            return VARYING
        if any(v.data for v in values):
            for name in parameters:
                self.complete.setdefault(name, self.place)
            return EQUAL
        return Value(parameters=parameters) if parameters else CONSTANT

    def _check_features(self, name: str, func: Any, args: Any, kwargs: Any, shares: list[torch.Tensor]) -> None:
        if name not in _COMBINES:
            return
        x = shares[0]
        dims = next((d for d in (_argument(func, key, args, kwargs) for key in _ALONG) if d is not None), None)
        if name in ("native_layer_norm", "_fused_rms_norm"):
            dims = [-1]
        dims = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        if any(dim % x.ndim == x.ndim - 1 for dim in dims):
            raise WrongPlan(f"{func} combines features of which each rank has only a share")

    def _split(self, name: str, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> bool:
        """Parts of a tensor of which only the tail differs."""
        whole = args[0] if args and isinstance(args[0], torch.Tensor) else None
        tail = self.value(whole).tail if whole is not None else None
        if tail is None or whole is None:
            return False
        last = whole.ndim - 1
        start = whole.shape[-1] - tail
        if name in ("split", "split_with_sizes", "slice"):
            dim = _argument(func, "dim", args, kwargs)
            if dim % whole.ndim == last:
                offset = (_argument(func, "start", args, kwargs) or 0) if name == "slice" else 0
                offset = offset if offset >= 0 else offset + whole.shape[-1]
                for x in outputs:
                    end = offset + x.shape[-1]
                    if end <= start:
                        self.mark(x, EQUAL)
                    elif offset >= start:
                        self.mark(x, VARYING)
                    else:
                        self.mark(x, Value(varying=True, tail=end - start))
                    offset = end
                return True
        if (func.is_view or name in ("clone", "_to_copy")) and all(x.shape[-1:] == whole.shape[-1:] for x in outputs):
            for x in outputs:
                self.mark(x, self.value(whole))
            return True
        return False


def _argument(func: Any, wanted: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == wanted:
            return kwargs.get(wanted, args[position] if position < len(args) else argument.default_value)
    return None
