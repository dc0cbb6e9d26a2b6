"""A resolved plan as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.sharding_spec import Plan, ShardingSpec

if TYPE_CHECKING:
    from rich.table import Table


def plan_table(plan: Plan, spec: ShardingSpec, title: str) -> Table:
    """The plan as a table: pattern, style, number of places, placement of the weight on the tp axis, source."""
    from rich.table import Table  # draws random numbers when it is imported, which must not happen in a training

    table = Table(title=title, title_justify="left", header_style="bold", expand=True)
    table.add_column("module or parameter", overflow="fold", ratio=3)
    table.add_column("style", overflow="fold", ratio=2)
    table.add_column("places", justify="right")
    table.add_column("weight on tp", overflow="fold", ratio=1)
    table.add_column("source", overflow="fold", ratio=2)
    for pattern, style, count, placement, source in spec.rows:
        table.add_row(pattern, style, str(count), placement, source)
    return table


def plan_lines(plan: Plan, spec: ShardingSpec) -> list[str]:
    """The same as log lines: one decision each."""
    lines = [
        f"plan ({plan.origin}): {pattern} -> {style} x{count}, {placement} [{source}]"
        for pattern, style, count, placement, source in spec.rows
    ]
    lines += [f"plan note: {note}" for note in spec.notes]
    lines += [
        f"plan entry not used by this config: {entry.pattern} -> {entry.style_name} [{entry.source}]"
        for entry in spec.unmatched
    ]
    return lines
