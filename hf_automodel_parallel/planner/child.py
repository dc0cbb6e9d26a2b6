"""The process that measures: ``python -m hf_automodel_parallel.planner.child FD``, a pickled :class:`Job` on its input.

It writes a line of JSON for each result to the file descriptor FD: ``["found", result]``, or at the end ``["error",
class, message]``. Its standard output is left to the libraries, which may print.

Each measurement is a forked process, because a process has one process group and one Accelerator.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from .. import errors
from ..core.importing import import_modules
from ..errors import AutoParallelError, ConfigError, UnsupportedError
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
_output: TextIO | None = None

#: Kind of the measurement, what is measured, number of layers (None: all).
_Task = tuple[str, Setting, "int | None"]


def _run(task: _Task) -> tuple[str, Any]:
    """One measurement, in a process of its own: ("found", result) or ("error", (class, message)).

    An error is returned, not raised: an exception that cannot be pickled would look like a killed process.
    """
    kind, setting, layers = task
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        if kind == "placements":
            return "found", placements(setting, _network)
        if layers is not None:
            shorten(_network, layers)
        return "found", measure(setting, _network)
    except AutoParallelError as error:
        return "error", _named(error)


def _named(error: AutoParallelError) -> tuple[str, str]:
    """Class and message of ``error``; a class of somebody else's is named by its nearest base in :mod:`..errors`."""
    known = next(cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
    return known.__name__, str(error)


def error_of(name: str, message: str) -> AutoParallelError:
    """The error of the class ``name`` of :mod:`..errors`."""
    made: AutoParallelError = getattr(errors, name)(message)
    return made


def _apart(task: _Task) -> Any:
    """What :func:`_run` finds in a forked process.

    Raises:
        AutoParallelError: its error, or that it was killed.
    """
    # An executor each: forked processes of an executor take one task after the other.
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _leave_output) as pool:
        try:
            kind, found = pool.submit(_run, task).result()
        except BrokenProcessPool as error:
            raise UnsupportedError(
                f"the process that measured {_text(task)} was killed; most likely memory ran out. Use a machine with "
                "more memory, --no-modes, or one process at a time: explain(..., processes=1)."
            ) from error
    if kind == "error":
        raise error_of(*found)
    return found


def _leave_output() -> None:
    """Close the results' file descriptor in a forked process, so that whoever reads them sees the end of this one."""
    if _output is not None:
        _output.close()


def _text(task: _Task) -> str:
    kind, setting, layers = task
    if kind == "placements":
        return "the placements"
    mode = setting.config.get("activation_checkpointing") or "none"
    return f"a step of {layers or 'all'} layers (activation checkpointing {mode})"


def run(job: Job) -> Iterator[Any]:
    """Yield the placements, and then the figures of each setting.

    Raises:
        AutoParallelError: the first error.
    """
    global _network
    import_modules(job.imports)
    _network = on_meta(job.model, job.dtype, job.lora)
    _network.train()
    stack = None if job.every_layer else stack_of(_network)
    pair = None if stack is None else depths(stack[1])
    total = 0 if stack is None else len(stack[1])
    tasks: list[_Task] = [("placements", job.placed, None)]
    for setting in job.settings:
        tasks += [("measure", setting, layers) for layers in (pair or (None,))]
    threads = ThreadPoolExecutor(job.processes)
    try:
        results = threads.map(_apart, tasks)
        yield next(results)
        for _ in job.settings:
            found = [next(results) for _ in (pair or (None,))]
            if pair is None:
                yield found[0]
            else:
                few, many = pair
                yield extrapolate(found[0], found[1], (total - few) // (many - few))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # an error is reported at once


def _read() -> Job:
    """The job on the standard input.

    Raises:
        UnsupportedError: a class in it cannot be imported here.
    """
    try:
        job: Job = pickle.load(sys.stdin.buffer)
    except (AttributeError, ImportError) as error:
        raise cannot_be_sent(error) from error
    return job


def cannot_be_sent(error: Exception) -> UnsupportedError:
    """The error for a model that cannot be pickled here, or cannot be read in the other process."""
    return UnsupportedError(
        f"the model cannot be sent to another process ({error}). Define its classes in a module that can be imported, "
        "or give the path of its config."
    )


def main() -> None:
    """Read a job, and write its results."""
    global _output
    _output = open(int(sys.argv[1]), "w", encoding="utf-8")
    try:
        for found in run(_read()):
            print(json.dumps(["found", found]), file=_output, flush=True)
    except AutoParallelError as error:
        print(json.dumps(["error", *_named(error)]), file=_output, flush=True)
    except (ImportError, OSError, ValueError) as error:
        print(json.dumps(["error", ConfigError.__name__, f"{error}"]), file=_output, flush=True)


if __name__ == "__main__":
    main()
