"""The CPU suite: gloo processes on this machine, ours beside every peer.

A workload is a module of this package with ``run(arguments, recorder)``.
"""

from __future__ import annotations

import argparse
import importlib

from ..recorder import Recorder
from . import step_time

#: In the order in which they run.
WORKLOADS = ("step_time", "train_step", "traffic", "prepare", "imports", "load", "checkpoint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--rounds", type=int, help="rounds of each timing (default: the workload's)")
    step_time.add_arguments(parser)


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Every workload, or those of ``--only``."""
    wanted = arguments.only or WORKLOADS
    unknown = [name for name in wanted if name not in WORKLOADS]
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: choose from {', '.join(WORKLOADS)}")
    for name in wanted:
        recorder.progress(f"{name}: begins")
        importlib.import_module(f"{__name__}.{name}").run(arguments, recorder)
