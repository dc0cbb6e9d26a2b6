"""The process that measures: ``python -m hf_automodel_parallel.planner.child``, a pickled :class:`Job` on its input.

Each measurement is a forked process, because a process has one process group and one Accelerator.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import pickle
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AutoParallelError
from .depth import depths, extrapolate, shorten, stack_of
from .measure import Setting, measure, placements
from .models import on_meta


@dataclass(frozen=True)
class Job:
    """Settings to measure on one model.

    Attributes:
        model, dtype, lora: see :func:`.models.on_meta`.
        placed: its plan and placements are reported first.
        settings: each is measured.
        every_layer: run all layers instead of few.
        processes: measurements at a time.
        imports: modules to import first.
    """

    model: Any
    dtype: str
    lora: dict[str, Any] | None
    placed: Setting
    settings: tuple[Setting, ...]
    every_layer: bool = False
    processes: int = 2
    imports: tuple[str, ...] = ()


_network: Any = None


def _run(task: tuple[str, Setting, int | None]) -> Any:
    """One measurement, in a process of its own: the figures, or the error."""
    kind, setting, layers = task
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        if kind == "placements":
            return placements(setting, _network)
        if layers is not None:
            shorten(_network, layers)
        return measure(setting, _network)
    except AutoParallelError as error:
        return str(error)


def run(job: Job) -> Iterator[tuple[str, Any]]:
    """Yield ("placements", found), and for each setting ("figures", found); an error is its message."""
    global _network
    for name in job.imports:
        importlib.import_module(name)
    _network = on_meta(job.model, job.dtype, job.lora)
    _network.train()
    stack = None if job.every_layer else stack_of(_network)
    pair = None if stack is None else depths(stack[1])
    total = 0 if stack is None else len(stack[1])
    tasks: list[tuple[str, Setting, int | None]] = [("placements", job.placed, None)]
    for setting in job.settings:
        tasks += [("measure", setting, layers) for layers in (pair or (None,))]
    context = multiprocessing.get_context("fork")
    with context.Pool(job.processes, maxtasksperchild=1) as pool:
        results = pool.imap(_run, tasks, chunksize=1)
        yield "placements", next(results)
        for _ in job.settings:
            found = [next(results) for _ in (pair or (None,))]
            wrong = next((part for part in found if isinstance(part, str)), None)
            if wrong is None and pair is not None:
                few, many = pair
                yield "figures", extrapolate(found[0], found[1], (total - few) // (many - few))
            else:
                yield "figures", wrong or found[0]


def main() -> None:
    """Read a job, and write a line of JSON for each result."""
    job = pickle.load(sys.stdin.buffer)
    try:
        for kind, found in run(job):
            print(json.dumps([kind, found]), flush=True)
    except (AutoParallelError, ImportError, OSError, ValueError) as error:
        print(json.dumps(["error", f"{error}"]), flush=True)


if __name__ == "__main__":
    main()
