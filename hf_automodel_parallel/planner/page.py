"""The page of ``plan --html``: one file with everything in it. It shows what ``explain`` found."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.model_view import without_wrappers
from ..core.options import CHECKPOINTING_MODES
from ..errors import ConfigError
from ..version import __version__
from .explanation import Explanation
from .grid import Grid, explain_grid
from .interconnect import ORDER, span

_TEMPLATE = Path(__file__).parent / "page.html"


def write_page(path: Path, model: Any, config: Any, axes: Mapping[str, Sequence[Any]], **options: Any) -> Explanation:
    """Measure the points of a grid, and write their page to ``path``.

    Args:
        path: the file; its folder exists.
        model, config, axes, options: as for :func:`.grid.explain_grid`.

    Returns:
        what was found for the point that was asked for.

    Raises:
        ConfigError: without a step there is nothing to draw; or the folder is missing.
        AutoParallelError: as ``explain``.
    """
    if not options.get("step", True):
        raise ConfigError(f"--html {path}: the page shows a step; leave out --no-step.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--html {path}: there is no folder {path.absolute().parent}; make it first.")
    grid = explain_grid(model, config, axes, **options)
    path.write_text(page(grid), encoding="utf-8")
    return grid.asked


def page(grid: Grid) -> str:
    """A self-contained HTML page: no other file, no network.

    Args:
        grid: points with a step; :attr:`.grid.Grid.asked` is shown first.
    """
    points = [found.to_dict() for found in grid.points]
    asked = next(place for place, found in enumerate(grid.points) if found is grid.asked)
    per_node = grid.asked.about.get("gpus_per_node") or 8
    for point in points:
        for row in point["collectives"]:
            row["in_node"] = span(row["axis"], point["sizes"]) <= per_node
        layer = point["layer"]
        _add_styles(layer.get("inside", ()), layer.get("name", ""), point["rows"])
    data = {
        "version": __version__,
        "axes": ORDER,
        "modes": CHECKPOINTING_MODES,
        "ranks": grid.asked.about["world_size"],
        "gpus_per_node": per_node,
        "gpu_memory": grid.asked.about.get("gpu_memory"),
        "asked": asked,
        "points": points,
        "refused": grid.refused,
    }
    # Within a script element only "</script" and "<!--" end the text; without "<" there is neither.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = _TEMPLATE.read_text(encoding="utf-8")
    return template.replace("__TITLE__", html.escape(_title(grid.asked))).replace("__DATA__", text)


def _title(found: Explanation) -> str:
    sizes = " × ".join(f"{axis} {found.sizes[axis]}" for axis in ORDER if found.sizes[axis] > 1) or "one rank"
    return f"{found.about['model']}: {sizes}"


def _add_styles(nodes: Any, layer: str, rows: list[list[str]]) -> None:
    """To each module of a layer the style that the plan's rows give its weights."""
    styles = {pattern: style for pattern, style, _, weight, _ in rows if weight != "activations"}
    for node in nodes:
        if node["kind"] == "module":
            name = f"{layer}.{without_wrappers(node['name'])}"
            names = [name, *(f"{name}.{weight['name']}" for weight in node["weights"])]
            node["style"] = next((styles[name] for name in names if name in styles), None)
            _add_styles(node["inside"], layer, rows)
