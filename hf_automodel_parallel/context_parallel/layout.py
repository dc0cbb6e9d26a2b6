"""The head-tail layout: which positions a rank of the cp axis holds, and the all-gather of the full sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .. import compat


@dataclass(frozen=True)
class Layout:
    """Head and tail chunks: of ``2 * size`` equal chunks, rank r holds chunk r and chunk ``2 * size - 1 - r``.

    Under causal attention later chunks cost more, because their queries see more keys. A head and a tail chunk together
    cost the same on every rank. Torch's ``context_parallel`` and Llama 3 (2024, arXiv:2407.21783, section 3.3.2) use
    this layout.

    Attributes:
        rank: of this process on the cp axis.
        size: number of ranks on the cp axis.
    """

    rank: int
    size: int

    @property
    def multiple(self) -> int:
        """The length of a sequence has to be a multiple of this number."""
        return 2 * self.size

    @property
    def chunks(self) -> tuple[int, int]:
        """Indices of this rank's two chunks among all ``2 * size``, in the order of its shard."""
        return self.rank, 2 * self.size - 1 - self.rank

    def shard(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's shard of ``tensor`` along ``dim`` (length S -> S / size), in memory of its own."""
        length = tensor.shape[dim] // self.multiple
        return torch.cat([tensor.narrow(dim, chunk * length, length) for chunk in self.chunks], dim)

    def positions(self, length: int, device: torch.device) -> torch.Tensor:
        """Positions in the full sequence of this rank's ``length`` tokens, int64 of shape (length,)."""
        chunk = length // 2
        own = torch.arange(chunk, device=device)
        first, second = self.chunks
        return torch.cat([own + first * chunk, own + second * chunk])

    def gather(self, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """All-gather in the order of the sequence: (B, H, S / size, D) -> (B, H, S, D).

        Backward is a reduce-scatter: the queries of all ranks contribute to the gradient of a shard of keys.
        """
        batch, heads, length, features = x.shape
        parts = _Gather.apply(x, group).view(self.size, batch, heads, 2, length // 2, features)
        # Rank r holds chunks r and 2 * size - 1 - r: all first chunks ascend with the rank, all second ones descend.
        ordered = torch.cat([parts[:, :, :, 0], parts[:, :, :, 1].flip(0)])  # (2 size, B, H, chunk, D)
        return ordered.permute(1, 2, 0, 3, 4).reshape(batch, heads, self.size * length, features)


class _Gather(torch.autograd.Function):
    """All-gather along the first dimension; backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return compat.all_gather_dim(x.contiguous(), 0, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return compat.reduce_scatter_dim(gradient.contiguous(), 0, ctx.group), None
