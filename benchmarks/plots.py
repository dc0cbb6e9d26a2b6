"""The plots of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .counting import KINDS
from .peers import PEERS

Results = dict[str, dict[str, Any]]


def draw(results: Results, directory: Path) -> None:
    """Write the SVG files for which there are results.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            "the plots need matplotlib: pip install -e '.[bench]', or leave them with --no-plots"
        ) from error
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    directory.mkdir(parents=True, exist_ok=True)
    for prefix, make in (("cpu-step_time", _step_time), ("cpu-prepare-depth", _prepare), ("scale-step", _scale)):
        found = {name: result for name, result in results.items() if name.startswith(prefix)}
        if found:
            name = {"cpu-step_time": "step_time", "cpu-prepare-depth": "prepare", "scale-step": "scale"}[prefix]
            make(found).savefig(directory / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def _step_time(found: Results) -> Any:
    """Bars with quartiles: CPU time of ours over that of each peer."""
    from matplotlib import pyplot

    rows = [row for result in found.values() for row in result["rows"]]
    names = []
    bars: dict[str, list[tuple[float, list[float]]]] = {}
    place = 0.0
    ticks = []
    for row in rows:
        begin = place
        for peer in PEERS:
            quartiles = row["peers"].get(peer, {}).get("ours_over_it_cpu")
            if quartiles:
                bars.setdefault(peer, []).append((place, quartiles))
                place += 1
        if place == begin:
            continue
        scope = ", whole step" if row["whole"] else ""
        tuning, mode = "LoRA" if row["lora"] else "full", "compiled" if row["compiled"] else "eager"
        names.append(f"{row['mesh']}, {tuning}, {mode}, {row['hidden']}{scope}")
        ticks.append((begin + place - 1) / 2)
        place += 1
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.16 * place))
    for peer, values in bars.items():
        middle = [quartiles[1] for _, quartiles in values]
        errors = [[q[1] - q[0] for _, q in values], [q[2] - q[1] for _, q in values]]
        axes.barh([y for y, _ in values], middle, 0.9, xerr=errors, label=PEERS[peer], error_kw={"lw": 0.8})
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_yticks(ticks, names)
    axes.invert_yaxis()
    axes.set_xlabel("CPU time of hf_automodel_parallel / of the peer")
    axes.legend(fontsize=8)
    return figure


def _prepare(found: Results) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3))
    rows = [row for result in found.values() for row in result["rows"]]
    for name in dict.fromkeys(row["options"] for row in rows):
        mine = [row for row in rows if row["options"] == name]
        axes.plot([row["layers"] for row in mine], [row["cpu_s"][1] for row in mine], marker="o", label=name)
    axes.set_xlabel("layers")
    axes.set_ylabel("s of CPU")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def _scale(found: Results) -> Any:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3))
    for result in found.values():
        rows, name = result["rows"], result["settings"]["geometry"]
        worlds = [row["world"] for row in rows]
        series = (
            [sum(row["model"][kind] for kind in KINDS) for row in rows],
            [row["model"]["bytes"] / 2**30 for row in rows],
            [row["model"]["peak"] / 2**30 for row in rows],
        )
        for axes, values in zip(panels, series):
            axes.plot(worlds, values, marker="o", label=name)
    for axes, label in zip(panels, ("collectives of a step", "GiB sent by a rank", "GiB of memory at the peak")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        axes.set_title(label, fontsize=9)
        axes.legend(fontsize=7)
    figure.tight_layout()
    return figure
