"""Other tensor-parallel sizes and sequence lengths beside those that were asked for, measured as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import AutoParallelismConfig
from ..core.options import CHECKPOINTING_MODES
from ..errors import AutoParallelError, ConfigError
from .explain import explain
from .explanation import Explanation

#: Axes of a grid.
_NAMES = ("tp", "seq", "checkpointing")


@dataclass
class Grid:
    """What :func:`explain_grid` found.

    Attributes:
        asked: the point that was asked for, with the mode of activation checkpointing that was asked for.
        points: all that were measured, one of each mode.
        refused: {"tp", "sequence", "reason"} of those that do not go.
    """

    asked: Explanation
    points: list[Explanation] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Axes of a grid from texts such as "tp=1,2,4 seq=4096,8192 checkpointing=none,full"; each may be left out.

    Raises:
        ConfigError: another axis, or a value that is none.
    """
    axes: dict[str, list[Any]] = {}
    for part in " ".join(texts).split():
        name, _, values = part.partition("=")
        try:
            found: list[Any] = values.split(",") if name == "checkpointing" else sorted(map(int, values.split(",")))
        except ValueError:
            found = []
        if name not in _NAMES or not found or any(value in ("", 0) for value in found):
            raise ConfigError(f"--html-grid {part!r}: give {', '.join(_NAMES)}, as in 'tp=1,2,4,8 seq=4096,8192'.")
        if name == "checkpointing" and not set(found) <= set(CHECKPOINTING_MODES):
            raise ConfigError(f"--html-grid {part!r}: modes are {', '.join(CHECKPOINTING_MODES)}.")
        axes[name] = list(dict.fromkeys(found))
    return axes


def explain_grid(
    model: Any,
    config: AutoParallelismConfig | Mapping[str, Any] | str,
    axes: Mapping[str, Sequence[Any]] | None = None,
    *,
    sequence: int = 4096,
    checkpointing: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Grid:
    """:func:`.explain.explain` of a point, and of others with the same number of ranks: dp_shard takes what tp leaves.

    Args:
        model, config, sequence, checkpointing, options: as for ``explain``.
        axes: see :func:`parse_grid`; every tp is measured with every seq. Empty: half and twice the tp at the same
            length, and twice the length at the same tp.
        progress: called with a line for each result.

    Raises:
        AutoParallelError: the point that was asked for is refused. Others are listed in :attr:`Grid.refused`.
    """
    axes = axes or {}
    modes = tuple(axes.get("checkpointing", checkpointing))
    asked = explain(model, config, sequence=sequence, checkpointing=modes, progress=progress, **options)
    grid = Grid(asked, list(asked.modes.values()))
    options.pop("world_size", None)
    values = AutoParallelismConfig.parse(config).to_dict()
    size = asked.sizes["tp"]
    pairs = [(tp, length) for tp in axes.get("tp", [size]) for length in axes.get("seq", [sequence])]
    if not axes.keys() & {"tp", "seq"}:
        ranks = asked.sizes["tp"] * asked.sizes["dp_shard"]
        pairs = [(tp, sequence) for tp in (size // 2, size * 2) if tp and ranks % tp == 0] + [(size, 2 * sequence)]
    pairs = [pair for pair in pairs if pair != (size, sequence)]
    for number, (tp, length) in enumerate(pairs, 1):
        name = f"tp={tp}, {length:,} tokens ({number} of {len(pairs)} other points)"
        try:
            sizes = {f"{axis}_size": ranks for axis, ranks in _sizes(asked.sizes, tp).items()}
            found = explain(
                model,
                values | sizes,
                sequence=length,
                checkpointing=tuple(asked.modes),
                progress=lambda line, name=name: progress(f"{name}, {line}"),  # type: ignore[misc]
                **options,
            )
        except AutoParallelError as error:
            grid.refused.append({"tp": tp, "sequence": length, "reason": str(error)})
            progress(f"{name}, refused")
            continue
        grid.points += found.modes.values()
    return grid


def _sizes(sizes: Mapping[str, int], tp: int) -> dict[str, int]:
    ranks = sizes["tp"] * sizes["dp_shard"]
    if ranks % tp:
        raise ConfigError(f"tp={tp} does not divide the {ranks} ranks of tp and dp_shard together.")
    return {**sizes, "tp": tp, "dp_shard": ranks // tp}
