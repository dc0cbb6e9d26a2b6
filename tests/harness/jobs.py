"""Real jobs for tests of faults: separate processes that may be killed, stopped or cut off, and that always end.

A pool worker (`pool`) that dies costs the pool. Here each rank is a process of its own, without a launcher beside it
that would end the others, so that what the survivors do is seen.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from .pool import fork

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = TESTS / "harness" / "training_job.py"


def environment(**values: str) -> dict[str, str]:
    """That of this process, without anything that says something about parallelism."""
    foreign = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_", "TORCHELASTIC_", "HF_AUTOMODEL")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    clean |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return clean | values


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Forked:
    """What `subprocess.Popen` has, as far as :class:`Job` uses it, for a script in a process that need not import
    everything.
    """

    def __init__(self, script: Path, arguments: list[str], values: dict[str, str], directory: Path, log: Path) -> None:
        self.process = fork(_run_script, str(script), arguments, values, str(directory), str(log))
        self.pid: int = self.process.pid  # type: ignore[assignment]

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def _run_script(script: str, arguments: list[str], values: dict[str, str], directory: str, log: str) -> None:
    os.setsid()
    with open(log, "wb", buffering=0) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(values)
    os.chdir(directory)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing would leave them out


class Job:
    """Processes that belong together, each with a log. Leaving the block kills what still runs."""

    def __init__(self, processes: list[Any], directory: Path, logs: list[Path]) -> None:
        self.processes, self.directory, self.logs = processes, directory, logs

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: Any) -> None:
        for process in self.processes:
            # Workers of a launcher have groups of their own, and it cannot end them once it is killed.
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # it may not lead its group yet
            process.wait()

    def signal_all(self, index: int, number: int) -> None:
        """Send a signal to all processes that descend from one of the job, in groups of their own too."""
        root = psutil.Process(self.processes[index].pid)
        for process in [root, *root.children(recursive=True)]:
            process.send_signal(number)

    def wait(self, seconds: float) -> list[int]:
        """The exit codes; an error with the logs if not all processes have ended in time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {seconds} s\n{self.output()}") from None
        return [process.returncode for process in self.processes]

    def wait_for(self, *names: str, seconds: float) -> None:
        """Wait until the files exist, as long as the job runs."""
        deadline = time.monotonic() + seconds
        while not all((self.directory / name).exists() for name in names):
            ended = [process.returncode for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"no {names} within {seconds} s, ended: {ended}\n{self.output()}")
            time.sleep(0.1)

    def results(self, seconds: float) -> list[dict[str, Any]]:
        """What the ranks of a training job report, by rank, once all processes have ended well."""
        codes = self.wait(seconds)
        if any(codes):
            raise AssertionError(f"exit codes {codes}\n{self.output()}")
        files = sorted(self.directory.glob("result*.json"))
        return [json.loads(file.read_text()) for file in files]

    def output(self, last: int = 4000) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-last:]}" for log in self.logs)


def _logs(directory: Path, count: int) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    return [directory / f"process{index}.log" for index in range(count)]


def start_commands(commands: list[list[str]], directory: Path, environments: list[dict[str, str]]) -> Job:
    """Programs of their own."""
    logs, processes = _logs(directory, len(commands)), []
    for command, values, log in zip(commands, environments, logs, strict=True):
        with log.open("wb") as output:
            processes.append(
                subprocess.Popen(
                    command,
                    env=values,
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return Job(processes, directory, logs)


def start_ranks(world: int, directory: Path, *arguments: Any) -> Job:
    """`training_job.py` on `world` ranks of this machine."""
    port = free_port()
    logs = _logs(directory, world)
    processes = []
    for rank, log in enumerate(logs):
        values = environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )
        processes.append(Forked(SCRIPT, list(map(str, arguments)), values, directory, log))
    return Job(processes, directory, logs)
