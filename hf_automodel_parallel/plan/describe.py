"""A resolved plan as a table for the terminal, and as log lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.sharding_spec import Plan, ShardingSpec

if TYPE_CHECKING:
    from rich.table import Table


def plan_table(plan: Plan, spec: ShardingSpec, title: str) -> Table:
    """The plan as a table: pattern, style, number of matches, placement of the weight on the tp axis, source."""
    # Imported here, because rich draws random numbers on import, which would change the random state of a training.
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", expand=True)
    table.add_column("module or parameter", overflow="fold", ratio=3)
    table.add_column("style", overflow="fold", ratio=2)
    table.add_column("matches", justify="right")
    table.add_column("weight on tp", overflow="fold", ratio=1)
    table.add_column("source", overflow="fold", ratio=2)
    for pattern, style, count, placement, source in spec.rows:
        table.add_row(pattern, style, str(count), placement, source)
    return table


def plan_lines(plan: Plan, spec: ShardingSpec) -> list[str]:
    """The plan as log lines, one for each entry, each note and each entry that matched nothing."""
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
