"""Patterns of a plan."""

from __future__ import annotations

import re
from functools import lru_cache


@lru_cache(maxsize=4096)
def pattern_regex(pattern: str) -> re.Pattern[str]:
    """Compile a plan pattern; ``*`` matches exactly one path component."""
    return re.compile(r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in pattern.split(".")))


def precision(pattern: str) -> int:
    """Higher for patterns with fewer wildcards, so that ``layers.0.x`` wins over ``layers.*.x``."""
    return -pattern.split(".").count("*")


def layer_pattern(name: str) -> str:
    """``name`` with a star for each number, as ``model.layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
