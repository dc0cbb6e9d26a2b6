"""A resolved plan as log lines."""

from __future__ import annotations

from ..core.sharding_spec import Plan, ShardingSpec


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
