"""Row-wise linear layers whose bias waits until after the reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BiasDeferredLinear(nn.Linear):
    """``nn.Linear`` that leaves its bias to the boundary: added on every rank before the sum it would count tp times."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in / tp) -> (..., out)``, this rank's summand without the bias."""
        return F.linear(input, self.weight)


def defer_bias(linear: nn.Linear) -> None:
    """Turn ``linear`` into a :class:`BiasDeferredLinear` in place; parameters, hooks and name stay."""
    linear.__class__ = BiasDeferredLinear
