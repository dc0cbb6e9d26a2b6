"""Make docs/benchmarks.md and its plots of the result files.

examples:
  python -m benchmarks.report             # the page and the plots (these need matplotlib: pip install -e '.[bench]')
  python -m benchmarks.report --no-plots  # the page alone
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import tables
from .recorder import RESULTS, ROOT, read_results

PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "benchmarks"

#: file name of a plot -> prefix of the result files that it shows, what it shows
PLOTTED = {
    "step_time.svg": ("cpu-step_time", "Step time of this package over that of each peer: medians and quartiles"),
    "prepare.svg": ("cpu-prepare-depth", "CPU seconds of prepare against the number of layers"),
    "scale.svg": ("scale-step", "Collectives, bytes and memory of one rank against the number of ranks"),
}

_HEAD = """# Benchmarks

Written by `python -m benchmarks.report` from the files in [`benchmarks/results/`](../benchmarks/results); do not edit.
`python -m benchmarks.run --help` says how to measure.

All peers of a row run in one process group, in turn (A B C A B C): the same model, weights, batch, dtype and seed.
Their losses over three optimizer steps are compared first; a peer with another loss is named under "Not measured" and
not timed. A ratio is ours over the peer's, taken in each round: median (lower and upper quartile) of the wall clock;
then the median for the CPU time of all ranks, which other work on the machine disturbs less. Below 1, ours is faster.
"""


def render(results: dict[str, dict[str, Any]]) -> str:
    """The page."""
    parts = [_HEAD]
    for title, prefix, make in tables.SECTIONS:
        found = {name: result for name, result in results.items() if name.startswith(prefix)}
        rows = make(found) if found else "No result file."
        plots = [
            f"![{about}](benchmarks/{name})\n"
            for name, (shows, about) in PLOTTED.items()
            if shows.startswith(prefix) and any(result.startswith(shows) for result in results)
        ]
        parts.append("\n".join([f"## {title}\n", rows, *(["", *plots] if plots else [])]))
    parts.append("## Not measured\n\n" + tables.not_measured(results))
    parts.append("## The result files\n\n" + tables.files(results))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the result files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--no-plots", action="store_true", help="leave the plots as they are")
    options = parser.parse_args()
    results = read_results(options.results)
    if not options.no_plots:
        from .plots import draw

        draw(results, options.page.parent / "benchmarks")
    options.page.write_text(render(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
