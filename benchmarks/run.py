"""Measure a suite and write its result files.

examples:
  python -m benchmarks.run --suite cpu                        # everything, into benchmarks/results/
  python -m benchmarks.run --suite cpu --only step_time --peers floor,ours
  python -m benchmarks.run --suite cpu --smoke --out /tmp/x   # tiny: does it run?
  python -m benchmarks.run --suite scale
  python -m benchmarks.run --suite gpu --device cpu --smoke   # the GPU suite without a GPU
  python -m benchmarks.report                                 # docs/benchmarks.md from the result files
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from . import suites
from .recorder import RESULTS, Recorder


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parser(suite: str | None = None) -> argparse.ArgumentParser:
    """The command line, with the options of ``suite`` if one is given."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lines = "; ".join(f"{name}: {about}" for name, (_, about) in suites.SUITES.items())
    result.add_argument("--suite", required=True, choices=suites.SUITES, help=lines)
    result.add_argument("--only", type=_names, help="workloads of the suite, with commas between them (default: all)")
    result.add_argument("--peers", type=_names, help="peers to measure, with commas between them (default: all)")
    result.add_argument("--device", choices=("cpu", "cuda"), help="default: what the suite is for")
    result.add_argument(
        "--out", type=Path, default=RESULTS, help="directory of the result files (default: %(default)s)"
    )
    result.add_argument("--smoke", action="store_true", help="tiny and few: to see that the suite runs")
    if suite is not None:
        suites.load(suite).add_arguments(result.add_argument_group(f"of --suite {suite}"))
    return result


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("--suite", choices=suites.SUITES)
    suite = known.parse_known_args(given)[0].suite
    options = parser(suite).parse_args(given)
    recorder = Recorder(
        options.out, options.suite, shlex.join(["python", "-m", "benchmarks.run", *given]), options.smoke
    )
    recorder.progress(f"suite {options.suite}")
    suites.load(options.suite).run(options, recorder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
