"""Stages in processes of their own: memory is free when they end, and a crash or a hang costs one case.

The parent writes a job, starts its ranks, and reads what they append to a file of each rank while they run: a line when
a case begins, one when it ends. A rank that raises ends all of them; the cases that are left get new processes.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .recorder import ROOT

#: Seconds between two looks at the processes.
_POLL = 0.2

# What launchers and shells leave in the environment, and what would change a measurement without a word.
_LAUNCHER = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "HF_AUTO_PARALLEL", "TORCHELASTIC_", "MASTER_", "GROUP_")
_LAUNCHER += ("ROLE_", "LOCAL_", "WORLD_SIZE", "RANK", "PMI_", "OMPI_", "MV2_")


@dataclass
class Outcome:
    """What became of one case.

    Attributes:
        status: "passed", "failed", "refused" (an error of the package that says it cannot be done here) or "skipped".
        values: what the case returned, on rank 0.
        message: why it did not pass.
        seconds: from its beginning to its end.
    """

    status: str
    values: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    seconds: float = 0.0


def environment_of_ranks(device: str, visible: str) -> dict[str, str]:
    """Of the child processes: offline, quiet, without what a launcher has left, on ``visible`` GPUs."""
    result = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    result |= {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    result |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    result.setdefault("OMP_NUM_THREADS", "1" if device == "cpu" else "8")
    if device == "cpu":
        return result | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return result | {"CUDA_VISIBLE_DEVICES": visible}


def run_cases(
    function: str,
    cases: list[dict[str, Any]],
    *,
    world: int | None,
    environment: Mapping[str, str],
    limit: float,
    deadline: float,
    settings: dict[str, Any],
    told: Callable[[str, Outcome], None],
) -> dict[str, Outcome]:
    """Run each case, and return what became of it by name.

    Args:
        function: ``"module:name"``, called as ``name(case, **settings)`` on each rank; returns what JSON can hold.
        cases: each with a ``"name"``.
        world: number of ranks, started as torchrun starts them; None for one plain process without a process group.
        limit: seconds for one case; after that it has failed.
        deadline: of ``time.monotonic()``; what has not ended by then is skipped.
        told: called with each outcome as soon as it is known.
    """
    outcomes: dict[str, Outcome] = {}

    def note(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        told(name, outcome)

    while pending := [case for case in cases if case["name"] not in outcomes]:
        job = {"function": function, "cases": pending, "settings": settings, "limit": limit}
        current, failure = _one_run(job, world or 1, world is not None, environment, limit, deadline, note)
        left = [case["name"] for case in pending if case["name"] not in outcomes]
        if failure is None:
            left, failure = left[:1], "the processes ended without a word about it"
        elif failure != _OUT_OF_TIME and current is not None:
            left = [current] if current in left else []
        # Else the time is over, or the processes did not even begin: it is the same for all of them.
        for name in left:
            note(name, Outcome("skipped" if failure == _OUT_OF_TIME else "failed", message=failure))
    return outcomes


_OUT_OF_TIME = "the time budget is used up"


def _one_run(
    job: dict[str, Any],
    world: int,
    grouped: bool,
    environment: Mapping[str, str],
    limit: float,
    deadline: float,
    note: Callable[[str, Outcome], None],
) -> tuple[str | None, str | None]:
    """Processes for the cases of ``job`` until one fails. Returns the case in progress and why it came to no end."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "job.json").write_text(json.dumps(job))
        with _processes(directory, world, grouped, environment) as processes:
            offsets = [0] * world
            current: str | None = None
            since = time.monotonic()
            while True:
                ended = all(process.poll() is not None for process in processes)
                broken = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
                if broken:
                    _wait(processes, 3.0)  # the others may have something to say, too
                for rank in range(world):
                    for line in _new_lines(directory / f"{rank}.jsonl", offsets, rank):
                        if "begin" in line:
                            if rank == 0:
                                current, since = line["begin"], time.monotonic()
                        elif line["status"] != "passed":
                            note(line["end"], Outcome(line["status"], {}, line["message"], line["seconds"]))
                            return line["end"], line["message"]
                        elif rank == 0:
                            note(line["end"], Outcome("passed", line["values"], "", line["seconds"]))
                            current, since = None, time.monotonic()
                if broken:
                    return current, f"exit status {processes[broken[0]].returncode}: {_end_of(directory, broken[0])}"
                if ended:
                    return current, None if current is None else f"ended: {_end_of(directory, 0)}"
                now = time.monotonic()
                if now > deadline:
                    return current, _OUT_OF_TIME
                if now - since > limit:
                    return current, f"no end after {limit:.0f} s: {_end_of(directory, 0)}"
                time.sleep(_POLL)


@contextmanager
def _processes(
    directory: Path, world: int, grouped: bool, environment: Mapping[str, str]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks, with the variables that torchrun sets if they form a group. None is left behind."""
    processes: list[subprocess.Popen[bytes]] = []
    port = str(_free_port())
    try:
        for rank in range(world):
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            group |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with (directory / f"{rank}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.children", str(directory), str(rank)],
                        env={**environment, **(group if grouped else {})},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        cwd=directory,
                    )
                )
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # compilers of inductor, too
        for process in processes:
            process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(_POLL)


def _new_lines(path: Path, offsets: list[int], rank: int) -> list[dict[str, Any]]:
    """Whole lines that a rank has written since the last look."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(offsets[rank])
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    offsets[rank] += len(text)
    return [json.loads(line) for line in text.splitlines()]


def _end_of(directory: Path, rank: int, characters: int = 1500) -> str:
    path = directory / f"{rank}.log"
    return path.read_text(errors="replace")[-characters:].strip() if path.exists() else ""


# ---- in the child ------------------------------------------------------------------------------------------------


def main() -> None:
    """One rank: run the cases of a job, one after the other, until one fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("rank", type=int)
    options = parser.parse_args()
    job = json.loads((options.directory / "job.json").read_text())
    module, _, name = job["function"].partition(":")

    with (options.directory / f"{options.rank}.jsonl").open("a") as out:

        def write(**line: Any) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        for case in job["cases"]:
            begin = time.monotonic()
            write(begin=case["name"])
            # A case that hangs says where, before the parent ends it.
            faulthandler.dump_traceback_later(max(job["limit"] - 3.0, 1.0), exit=False)
            try:
                values = getattr(importlib.import_module(module), name)(case, **job["settings"])
            except BaseException as error:
                write(end=case["name"], status=status_of(error, case), message=text_of(error), **_seconds(begin))
                traceback.print_exc()
                out.flush()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)  # not the exit handlers: other ranks may wait in a collective
            faulthandler.cancel_dump_traceback_later()
            write(end=case["name"], status="passed", values=values or {}, **_seconds(begin))


def status_of(error: BaseException, case: Mapping[str, Any]) -> str:
    """ "refused" for an error that the case expects of a device that cannot do it."""
    from hf_automodel_parallel.errors import UnsupportedError

    return "refused" if case.get("may_be_refused") and isinstance(error, UnsupportedError) else "failed"


def text_of(error: BaseException) -> str:
    """Type, message, and the last place of the code that raised."""
    places = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {str(error)[:1500]}{place}"


def _seconds(begin: float) -> dict[str, float]:
    return {"seconds": round(time.monotonic() - begin, 2)}


if __name__ == "__main__":
    main()
