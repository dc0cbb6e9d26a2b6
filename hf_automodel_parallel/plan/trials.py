"""What trials on small copies have in common: is the whole the sum, or the parts, of what ranks compute on their shares?"""

from __future__ import annotations

from typing import Any

import torch

from .spec import ParameterSpec


class CannotRun(Exception):
    """The small copy does not run even whole."""


def share_of(value: torch.Tensor, spec: ParameterSpec, rank: int, size: int) -> torch.Tensor:
    """The part of ``value`` (any shape and dtype) that ``rank`` of ``size`` holds."""
    if spec.dim is None:
        return value
    parts = [block.chunk(size, spec.dim)[rank] for block in value.chunk(spec.blocks, spec.dim)]
    return torch.cat(parts, spec.dim)


def is_close(got: Any, want: torch.Tensor) -> bool:
    """True if ``got`` has the shape of ``want`` and its values up to the rounding of float32."""
    return got.shape == want.shape and bool(torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max())))
