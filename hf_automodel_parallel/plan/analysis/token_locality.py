"""Does code treat each token apart from the others? Seen from the operators that it runs, without values.

Lengths mark activations: the share of a sequence and the whole sequence get lengths that divide no dimension of the
model, so a dimension that such a length divides runs over tokens. Every operator on a share has to be one that keeps
tokens apart; what is not known to do so counts as not doing so. Everything is allowed on the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ... import compat

#: Label of activations whose features are spread over the ranks.
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
    """An operator on shares of a sequence that is not known to keep tokens apart."""


class TokenLocalityTrace(compat.TorchDispatchMode):
    """Watches operators, and which parameters work on shares and which on whole sequences.

    Args:
        share: length that marks shares.
        whole: length that marks whole sequences.
        parameters: id of a parameter -> its name.
    """

    def __init__(self, share: int, whole: int, parameters: dict[int, str]) -> None:
        super().__init__()
        self.share, self.whole = share, whole
        self.labels: dict[int, frozenset[str]] = {key: frozenset([name]) for key, name in parameters.items()}
        self.used: dict[str, set[str]] = {}
        self.outdated: list[torch.Tensor] = []  # shares of what has been changed in place where it was whole
        self._alive: list[torch.Tensor] = []  # ids are unique among living objects only

    def is_share(self, x: torch.Tensor) -> bool:
        """True if a dimension of ``x`` runs over the tokens of a share."""
        return bool(self._dims(x, self.share))

    def is_whole(self, x: torch.Tensor) -> bool:
        """True if a dimension of ``x`` runs over the tokens of a whole sequence."""
        return bool(self._dims(x, self.whole))

    def label(self, x: torch.Tensor, labels: Iterable[str]) -> None:
        """Attach ``labels`` to ``x``; what is computed from it inherits them."""
        self.labels[id(x)] = self.labels_of(x) | frozenset(labels)
        self._alive.append(x)

    def labels_of(self, x: torch.Tensor) -> frozenset[str]:
        """The labels of ``x``."""
        return self.labels.get(id(x), frozenset())

    def refuse_outdated(self, inputs: Iterable[torch.Tensor]) -> None:
        """Raise if one of ``inputs`` should hold what a block has written into the whole sequence.

        Raises:
            TokensMix: it does not.
        """
        places = {_storage(x) for x in self.outdated}
        if places and any(_storage(x) in places for x in inputs):
            raise TokensMix("a block has changed in place what is read here once more")

    @staticmethod
    def _dims(x: torch.Tensor, length: int) -> list[int]:
        return [dim for dim, size in enumerate(x.shape) if size and size % length == 0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in compat.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_sequence_shards = any(self.is_share(x) for x in inputs)
        on_whole = any(self.is_whole(x) for x in inputs)
        if on_sequence_shards and on_whole:
            raise TokensMix(f"{func} combines a share of the sequence with the whole sequence")
        self.refuse_outdated(inputs)
        result = func(*args, **kwargs)
        outputs = [x for x in compat.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if on_sequence_shards and outputs:  # without outputs: a question about shape, dtype or device
            self._check(func, args, kwargs, inputs, outputs)
        on_whole = on_whole or (not on_sequence_shards and any(self.is_whole(x) for x in outputs))
        labels = frozenset().union(*(self.labels_of(x) for x in inputs))
        if on_sequence_shards or on_whole:
            for name in labels - {FEATURES}:
                self.used.setdefault(name, set()).add("share" if on_sequence_shards else "whole")
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
        name = func.name().removeprefix("aten::").partition(".")[0]
        summed: list[tuple[torch.Tensor, int]] = []  # (tensor, dimension) that the operator combines entries along
        if name in _CONTRACTS:
            summed = [(args[_CONTRACTS[name]], -1)]
        elif name in _ALONG_ONE:
            dim = _argument(func, "dim", args, kwargs)
            summed = [(x, dim) for x in inputs if x.ndim]
        elif name in _NORMALIZES:
            shape = _argument(func, "normalized_shape", args, kwargs)
            summed = [(args[0], -1 - i) for i in range(len(shape))]
        elif not (torch.Tag.pointwise in func.tags or func.is_view or name in _KEEPS_ALL or name in _REDUCES):
            raise TokensMix(f"{func} on a share of the sequence is not known to treat each token apart")
        if any(x.shape[dim] % self.share == 0 for x, dim in summed):
            raise TokensMix(f"{func} combines tokens of a share of the sequence")
        if any(len(self._dims(x, self.share)) != 1 for x in outputs):
            raise TokensMix(f"{func} on a share of the sequence drops, combines or pairs tokens")


def _storage(x: torch.Tensor) -> int:
    return StorageWeakRef(x.untyped_storage()).cdata


def _argument(func: Any, wanted: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == wanted:
            return kwargs.get(wanted, args[position] if position < len(args) else argument.default_value)
    raise TokensMix(f"{func} does not say along which dimension it works")
