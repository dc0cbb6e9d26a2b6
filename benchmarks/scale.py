"""The scale suite: ranks that are simulated by a process group whose collectives do nothing."""

from __future__ import annotations

import argparse

from .recorder import Recorder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This suite has no options of its own."""


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Every workload, or those of ``--only``."""
