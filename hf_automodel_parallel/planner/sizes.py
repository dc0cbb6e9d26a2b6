"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from ..errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def bytes_of(text: str) -> int:
    """Bytes of "80GiB", "80GB" or "85899345920".

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(|[kmg]i?)b?\s*", text.lower())
    if match is None:
        raise ConfigError(f"{text!r} is no size of memory; write for example 80GiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def gib(size: float) -> str:
    """Bytes in GiB, with a digit behind the point below a hundred."""
    value = size / (1 << 30)
    return f"{value:,.1f} GiB" if value < 100 else f"{value:,.0f} GiB"
