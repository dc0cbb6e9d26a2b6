"""The suites by name.

A suite is a module with ``add_arguments(parser)`` and ``run(arguments, recorder)``; it is imported when it is run.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any, Protocol

from .recorder import Recorder

#: name -> (module, one line about it)
SUITES = {
    "cpu": ("benchmarks.cpu", "gloo processes on this machine's CPU, beside every peer"),
    "gpu": ("benchmarks.gpu", "one GPU or more: validation, then fine-tuning of large models"),
    "scale": ("benchmarks.scale", "8 to 16,384 simulated ranks: collectives, bytes and memory of each"),
}


class Suite(Protocol):
    """What a suite's module has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the suite's own options."""

    def run(self, arguments: argparse.Namespace, recorder: Recorder) -> None:
        """Measure and record."""


def load(name: str) -> Any:
    """The module of a suite.

    Raises:
        SystemExit: the suite is not in this checkout.
    """
    module = SUITES[name][0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise SystemExit(f"--suite {name}: {module} is not in this checkout; choose another suite") from error
