"""TRL's fused head on a head that tensor parallelism has sharded.

TRL's trainers call ``model(..., fused_lm_head=True)``: TRL's forward runs the backbone, reads ``lm_head.weight``
outside of the head's forward, and gives hidden states and weight to a kernel, which returns log-probabilities and other
statistics of each token. TRL gathers a sharded weight for it. Here another kernel gets the shard, and a rank computes
with its slice of the vocabulary (:mod:`.token_statistics`). All else in TRL's forward is kept.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ... import compat
from ...core.forward_stack import ForwardSlot, ForwardStack, Replacement
from ..collectives import columns_to_rows, copy_to_tp
from .cross_entropy import Vocabulary
from .token_statistics import Logits, token_statistics

logger = logging.getLogger(__name__)

#: The arguments of TRL's kernel whose meaning is known. ``chunk_size`` is the width of its tiles, a constant of TRL.
_KNOWN = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)


def keep_fused_head_sharded(model: nn.Module, mesh: DeviceMesh, chunk_rows: int | None) -> None:
    """Let TRL's forward of ``model``, or of a model inside of it, compute with the shards of the head.

    Nothing happens without such a forward.

    Args:
        model: plain or PEFT-wrapped; its head is or will be sharded over ``mesh``.
        mesh: the tp axis.
        chunk_rows: tokens whose logits are in float32 at a time; None: as many as fit in 256 MiB.
    """
    for module in model.modules():
        head = compat.TRLFusedHead.of(module) if "forward" in vars(module) else None
        if head is None:
            continue
        if head.arguments != _KNOWN:
            logger.warning(
                "TRL's fused head takes %s here, which this version of the package does not know: under tensor "
                "parallelism every rank gathers the head and computes all logits, which is right but takes memory.",
                ", ".join(head.arguments),
            )
            continue
        forward = head.with_kernel(_Kernel(head, mesh, chunk_rows))
        ForwardStack.of(module).push(ForwardSlot.COMPUTATION, Replacement(forward))


class _Kernel:
    """Called by TRL's forward in the place of its kernel."""

    def __init__(self, head: compat.TRLFusedHead, mesh: DeviceMesh, chunk_rows: int | None) -> None:
        self._original, self._mesh, self._chunk_rows = head.kernel, mesh, chunk_rows
        self._signature = inspect.signature(head.kernel.forward)

    def apply(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """TRL's statistics of each token, (rows,): log-probability, entropy, log of the sum of squared probabilities,
        mean logit, and whether the target is the highest one.
        """
        given = self._signature.bind(None, *args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        weight, bias = values["weight"], values["bias"]
        own = self._slice(weight, bias)
        if own is None:
            values["weight"], values["bias"] = _full(weight), _full(bias)
            return self._original.apply(*(values[name] for name in _KNOWN))
        own_weight, own_bias, start = own
        mesh = self._mesh
        logits = Logits(
            Vocabulary(mesh.get_group(), mesh.get_local_rank(), mesh.size(), self._chunk_rows, start),
            weight.shape[0],
            values["temperature"],
            values["final_logit_softcapping"],
            values["logit_scale"],
        )
        return token_statistics(values["hidden"], own_weight, own_bias, values["targets"], logits, values["outputs"])

    def _slice(self, weight: Any, bias: Any) -> tuple[torch.Tensor, torch.Tensor | None, int] | None:
        """This rank's slice of the vocabulary: (width, H), (width,) and its first class.

        None: the head is not sharded over tp in a known way, or FSDP2 has not gathered it for this forward.
        """
        if not isinstance(weight, DTensor) or weight.device_mesh != self._mesh:
            return None
        rank, size = self._mesh.get_local_rank(), self._mesh.size()
        classes, features = weight.shape
        width = -(-classes // size)
        start, stop = min(rank * width, classes), min((rank + 1) * width, classes)
        if weight.placements == (Shard(0),) and (bias is None or getattr(bias, "placements", None) == (Shard(0),)):
            return _local(weight), None if bias is None else _local(bias), start
        replicated = bias is None or getattr(bias, "placements", None) == (Replicate(),)
        if weight.placements != (Shard(1),) or features % size or not replicated:
            return None
        # tp does not divide the vocabulary: a rank's columns of the weight become its rows, without the whole of it.
        group = self._mesh.get_group()
        rows = columns_to_rows(_local(weight), group, rank, size)
        return rows, None if bias is None else copy_to_tp(_local(bias), group)[start:stop], start


def _local(parameter: DTensor) -> torch.Tensor:
    return parameter.to_local(grad_placements=parameter.placements)


def _full(parameter: Any) -> Any:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
