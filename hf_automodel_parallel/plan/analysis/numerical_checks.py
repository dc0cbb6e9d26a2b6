"""What trials on small copies have in common: is the whole the sum, or the parts, of what ranks compute on their
shares?
"""

from __future__ import annotations

from typing import Any

import torch


class CannotRun(Exception):
    """The small copy does not run even whole."""


def is_close(got: Any, want: torch.Tensor) -> bool:
    """True if ``got`` has the shape of ``want`` and its values up to the rounding of float32."""
    return got.shape == want.shape and bool(torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max())))
