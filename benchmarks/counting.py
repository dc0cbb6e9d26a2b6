"""What the tables say of collectives that the planner's modes have counted."""

from __future__ import annotations

from collections.abc import Iterable

KINDS = ("all_reduce", "all_gather", "reduce_scatter")


def figures(calls: Iterable[tuple[str, int, int]]) -> dict[str, int]:
    """Per kind the number of collectives, and ``bytes``: what each rank sends in all of them.

    Args:
        calls: (kind, number of calls, bytes sent), a kind as often as it has mesh axes.
    """
    found = dict.fromkeys((*KINDS, "bytes"), 0)
    for kind, count, sent in calls:
        if kind in KINDS:
            found[kind] += count
            found["bytes"] += sent
    return found
