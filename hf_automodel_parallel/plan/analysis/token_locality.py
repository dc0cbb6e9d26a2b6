"""Does code treat each token apart from the others? Decided from the operators that it runs on fake tensors.

Lengths mark activations: a sequence shard and the full sequence get lengths that divide no dimension of the model, so a
dimension that such a length divides runs over tokens. Every operator on a sequence shard has to keep tokens apart; one
that is not known to do so is taken for one that does not. On the full sequence every operator is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .operator_trace import OperatorTrace, argument_of, operator_name, storage_id, tensors_in

#: Label of activations whose features are sharded over the ranks.
FEATURES = "\0features"

_KEEPS_ALL = frozenset(
    "clone _to_copy detach alias lift_fresh copy_ fill_ zero_ masked_fill where native_dropout bernoulli bernoulli_ "
    "uniform_ normal_ rand_like randn_like empty_like zeros_like ones_like full_like new_empty new_zeros new_ones "
    "new_full "
    "embedding constant_pad_nd bernoulli.p _unsafe_view view reshape split_with_sizes_copy".split()
)
_REDUCES = frozenset(
    (
        "sum mean amax amin var var_mean std std_mean linalg_vector_norm "
        "norm logsumexp any all max min argmax argmin prod"
    ).split()
)
_ALONG_ONE = frozenset(
    (
        "_softmax _log_softmax softmax log_softmax cumsum cumprod sort topk glu cat stack gather scatter index_select"
    ).split()
)
#: operator -> position of the factor whose last dimension is summed over.
_CONTRACTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "mv": 0, "linear": 0}
_NORMALIZES = frozenset("native_layer_norm _fused_rms_norm _fused_layer_norm".split())


class TokensMix(Exception):
    """An operator on sequence shards that is not known to keep tokens apart."""


class TokenLocalityTrace(OperatorTrace[frozenset[str]]):
    """Checks operators, and records which parameters are applied to sequence shards and which to full sequences.

    Args:
        shard: length that marks sequence shards.
        full: length that marks full sequences.
        parameters: id of a parameter -> its name.

    Attributes:
        used: parameter name -> "shard" and / or "full": the activations that it was applied to.
        outdated: sequence shards whose full sequence has been changed in place.
    """

    def __init__(self, shard: int, full: int, parameters: dict[int, str]) -> None:
        super().__init__({key: frozenset([name]) for key, name in parameters.items()})
        self.shard, self.full = shard, full
        self.used: dict[str, set[str]] = {}
        self.outdated: list[torch.Tensor] = []

    def know(self, key: int, name: str) -> None:
        """The tensor of the id ``key`` is the parameter ``name``."""
        self.facts[key] = frozenset([name])

    def is_shard(self, x: torch.Tensor) -> bool:
        """True if a dimension of ``x`` runs over the tokens of a sequence shard."""
        return bool(self._dims(x, self.shard))

    def is_full(self, x: torch.Tensor) -> bool:
        """True if a dimension of ``x`` runs over the tokens of a full sequence."""
        return bool(self._dims(x, self.full))

    def label(self, x: torch.Tensor, labels: Iterable[str]) -> None:
        """Attach ``labels`` to ``x``; tensors that are computed from it inherit them."""
        self.note(x, self.labels_of(x) | frozenset(labels))

    def labels_of(self, x: torch.Tensor) -> frozenset[str]:
        """The labels of ``x``."""
        return self.facts.get(id(x), frozenset())

    def refuse_outdated(self, inputs: Iterable[torch.Tensor]) -> None:
        """Raise if one of ``inputs`` lacks what a block has written into the full sequence.

        Raises:
            TokensMix: it does.
        """
        outdated = {storage_id(x) for x in self.outdated}
        if outdated and any(storage_id(x) in outdated for x in inputs):
            raise TokensMix("a block has changed its input in place, which is read again here")

    @staticmethod
    def _dims(x: torch.Tensor, length: int) -> list[int]:
        return [dim for dim, size in enumerate(x.shape) if size and size % length == 0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        on_shards = any(self.is_shard(x) for x in inputs)
        on_full = any(self.is_full(x) for x in inputs)
        if on_shards and on_full:
            raise TokensMix(f"{func} combines a sequence shard with the full sequence")
        self.refuse_outdated(inputs)
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if on_shards and outputs:  # without outputs: a question about shape, dtype or device
            self._check(func, args, kwargs, inputs, outputs)
        on_full = on_full or (not on_shards and any(self.is_full(x) for x in outputs))
        labels = frozenset().union(*(self.labels_of(x) for x in inputs))
        if on_shards or on_full:
            for name in labels - {FEATURES}:
                self.used.setdefault(name, set()).add("shard" if on_shards else "full")
            labels &= {FEATURES}
        for x in outputs:
            if labels - self.labels_of(x):
                self.label(x, labels)
        return result

    def _check(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> None:
        name = operator_name(func)
        summed: list[tuple[torch.Tensor, int]] = []  # (tensor, dimension) that the operator combines entries along
        if name in _CONTRACTS:
            summed = [(args[_CONTRACTS[name]], -1)]
        elif name in _ALONG_ONE:
            dim = argument_of(func, "dim", args, kwargs)
            if dim is None:
                raise TokensMix(f"{func} does not say along which dimension it works")
            summed = [(x, dim) for x in inputs if x.ndim]
        elif name in _NORMALIZES:
            shape = argument_of(func, "normalized_shape", args, kwargs)
            summed = [(args[0], -1 - i) for i in range(len(shape))]
        elif not (torch.Tag.pointwise in func.tags or func.is_view or name in _KEEPS_ALL or name in _REDUCES):
            raise TokensMix(f"{func} on a sequence shard is not known to keep tokens apart")
        if any(x.shape[dim] % self.shard == 0 for x, dim in summed):
            raise TokensMix(f"{func} combines tokens of a sequence shard")
        if any(len(self._dims(x, self.shard)) != 1 for x in outputs):
            raise TokensMix(f"{func} on a sequence shard drops, combines or pairs tokens")
