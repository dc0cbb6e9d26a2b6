"""Parity with dropout: the masks that the ranks drew are observed, put together, and replayed by the oracle.

What is observed is the tensor that dropout gave to the adapter, whoever drew the mask: elements that are exactly zero
were dropped (an activation of these models is never exactly zero itself). An opaque operator does it, so a mask is seen
too where the layer is compiled, and seen a second time where a checkpoint recomputes the layer: the two must be equal,
or the gradients are those of another function than the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Masks = dict[str, torch.Tensor]

_seen: dict[str, list[torch.Tensor]] = {}


@torch.library.custom_op("hfap_tests::observe_dropout", mutates_args=())
def _observe(x: torch.Tensor, key: str) -> torch.Tensor:
    _seen.setdefault(key, []).append(x != 0)
    return x.clone()  # an operator must not return its input


@_observe.register_fake
def _(x: torch.Tensor, key: str) -> torch.Tensor:
    return torch.empty_like(x)


_observe.register_autograd(lambda context, gradient: (gradient, None))


class _Observer:
    """Forward pre-hook: the first argument of its module is the output of dropout.

    Inside of an adapter of a sharded layer it sees what this rank holds, as is wanted here.
    """

    sees_shards = True

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_observe(args[0], self.key), *args[1:]) if module.training else args


def _dropouts(model: nn.Module) -> list[tuple[str, nn.Module, str, float]]:
    """``(key, PEFT layer, adapter, p)`` of every adapter with an active dropout."""
    return [
        (f"{name}.{adapter}", layer, adapter, dropout.p)
        for name, layer in model.named_modules()
        for adapter, dropout in (getattr(layer, "lora_dropout", None) or {}).items()
        if getattr(dropout, "p", 0.0) > 0.0
    ]


def observe_dropout(model: nn.Module) -> None:
    """Observe every LoRA and DoRA dropout of ``model`` from here on; call it before ``prepare``.

    DoRA calls ``lora_A`` also on the identity matrix, and its base product reads the dropped input as well, so the
    layer that holds the magnitude is where its dropout arrives.
    """
    _seen.clear()
    for key, layer, adapter, _ in _dropouts(model):
        magnitudes: Any = getattr(layer, "lora_magnitude_vector", None) or {}
        factors: Any = layer.lora_A
        reader = magnitudes[adapter] if adapter in magnitudes else factors[adapter]  # type: ignore[index]
        reader.register_forward_pre_hook(_Observer(key))


def observed_masks() -> tuple[Masks, int]:
    """This rank's masks of one forward and backward by key, and how many were drawn a second time (recomputed).

    Raises:
        AssertionError: a recomputation drew another mask than the forward.
    """
    masks, again = {}, 0
    for key, seen in _seen.items():
        masks[key] = seen[0]
        again += len(seen) - 1
        differ = [index for index, mask in enumerate(seen) if not torch.equal(mask, seen[0])]
        if differ:
            raise AssertionError(f"{key}: the recomputation drew another mask than the forward (passes {differ})")
    _seen.clear()
    return masks, again


class _Replay(nn.Module):
    """Dropout with given masks, one for each forward."""

    def __init__(self, masks: list[torch.Tensor], p: float) -> None:
        super().__init__()
        self.masks, self.p = iter(masks), p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(self.masks) / (1.0 - self.p)


def replay_dropout(reference: nn.Module, by_rank: list[Masks], tp_size: int) -> int:
    """Let the oracle's dropouts use what the ranks drew; its batches must be those of the data-parallel ranks, in
    order.

    Args:
        reference: the one-process model, as it was built.
        by_rank: the masks of each rank; the ranks of a tp group are neighbours.
        tp_size: ranks of a tp group. A row-wise layer's ranks hold slices of the features, which are put together;
            where the features are whole, the ranks' masks have to be equal.

    Returns:
        How many row-wise masks (one for each layer and data-parallel rank) were not the same slice on all tp ranks.
    """
    independent = 0
    for key, layer, adapter, p in _dropouts(reference):
        width = layer.lora_A[adapter].in_features  # type: ignore[index,union-attr]
        whole = []
        for first in range(0, len(by_rank), tp_size):
            parts = [masks[key] for masks in by_rank[first : first + tp_size]]
            kept = sum(part.float().mean().item() for part in parts) / tp_size
            if not p / 3 < 1 - kept < 3 * p:
                raise AssertionError(f"{key}: {1 - kept:.3f} were dropped, with p={p}")
            if parts[0].shape[-1] == width:
                if not all(torch.equal(part, parts[0]) for part in parts):
                    raise AssertionError(f"{key}: the tp ranks of a replicated input drew different masks")
                whole.append(parts[0])
            else:
                independent += not all(torch.equal(part, parts[0]) for part in parts)
                whole.append(torch.cat(parts, dim=-1))
        layer.lora_dropout[adapter] = _Replay(whole, p)  # type: ignore[index,operator]
    return independent
