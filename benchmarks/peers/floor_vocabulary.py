"""The floor's embedding, head and loss: the vocabulary is sharded over tp, the logits are never gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

IGNORED = -100


class ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of logits (rows, vocabulary / tp) in float32; two all-reduces: the maxima, then the sums of
    exponentials together with the labels' logits.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, start: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        maxima = logits.max(-1).values
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
        exponentials = (logits - maxima[:, None]).exp_()
        here = labels - start
        mine = (here >= 0) & (here < logits.shape[-1])
        here = here.clamp(0, logits.shape[-1] - 1)
        picked = (logits.gather(-1, here[:, None])[:, 0] - maxima) * mine
        sums = torch.stack([exponentials.sum(-1), picked])
        dist.all_reduce(sums, group=group)
        used = labels != IGNORED
        count = used.sum()
        losses = (sums[0].log() - sums[1]) * used
        ctx.save_for_backward(exponentials, sums[0], here, mine, used / count)
        return losses.sum() / count

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        exponentials, totals, here, mine, weight = ctx.saved_tensors
        scale = gradient * weight
        result = exponentials.mul_((scale / totals)[:, None])
        result.scatter_add_(-1, here[:, None], -(scale * mine)[:, None])
        return result, None, None, None


def shard_vocabulary(
    model: Any, group: dist.ProcessGroup, rank: int, ranks: int
) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Shard embedding and head of a Llama; the function that computes its loss."""
    from .floor import CopyToTP, SumOverTP

    for module in (model.model.embed_tokens, model.lm_head):
        weight = module.weight
        module.weight = nn.Parameter(weight.detach().chunk(ranks)[rank].clone(), requires_grad=weight.requires_grad)
    rows = model.lm_head.weight.shape[0]
    start = rank * rows
    embedding = model.model.embed_tokens

    def embed(ids: torch.Tensor) -> torch.Tensor:
        here = ids - start
        mine = (here >= 0) & (here < rows)
        found = F.embedding(here.clamp(0, rows - 1), embedding.weight)
        return SumOverTP.apply(found * mine[..., None], group)

    embedding.forward = embed

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        logits = model.lm_head(CopyToTP.apply(hidden, group)).float().flatten(0, 1)
        labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].flatten()
        return ShardedCrossEntropy.apply(logits, labels, start, group)

    return loss
