"""Pools of gloo worker processes that live for a whole pytest run.

Starting a rank costs several seconds of imports, so the ranks of one world size are started once and then run one job
after the other. What a job can leave behind is undone between two jobs (see ``pool_worker``); a pool in which a rank
died or did not answer is killed and replaced, so that a deadlock costs exactly one test.

    def job(x):                      # module level: it is sent by name
        t = torch.tensor([x + dist.get_rank()])
        dist.all_reduce(t)
        return t.item()

    assert run_distributed(2, job, 1.0) == [3.0, 3.0]

The processes run the module that defines the job *without* pytest's assertion rewriting: give asserts inside a job a
message, or return the values and compare them in the test.
"""

import atexit
import contextlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import Pipe, get_context, set_start_method
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.distributed import TCPStore

HOST = "127.0.0.1"

STARTUP_TIMEOUT = 240.0
"""Seconds for all ranks to import everything and to meet; generous because the ranks share the cores."""

FAILURE_GRACE = 10.0
"""Seconds the other ranks get to answer once one has failed: if they wait for it in a collective, they never will."""

RESET_TIMEOUT = 30.0
"""Seconds for all ranks to clean up after a job and to meet again."""

MOST_THREADS = 30
"""A pool whose ranks have more when they are idle is replaced. A process group that something keeps alive after its job
has three threads that wake up a hundred times a second; some dozen of them take a good part of the machine from the
other tests."""

CLOSE_TIMEOUT = 5.0
STACK_DUMP_SECONDS = 0.5
LOG_TAIL_CHARACTERS = 3000

DIED = "Died"
NO_ANSWER = "NoAnswer"


class RankError(NamedTuple):
    """How one rank failed. `type_name` is that of the exception, or `DIED`, or `NO_ANSWER`."""

    type_name: str
    message: str
    traceback: str


class DistributedFailure(Exception):
    """At least one rank of a job raised, died, or did not answer in time.

    Attributes:
        errors: what went wrong, by rank; ranks that returned normally are absent.
        seconds: time from the start of the job to the last answer that came (or to the moment the pool gave up).
    """

    def __init__(self, job: str, world_size: int, errors: dict[int, RankError], seconds: float, logs: dict[int, str]):
        self.errors = errors
        self.seconds = seconds
        super().__init__(_describe_failure(job, world_size, errors, seconds, logs))


def _describe_failure(
    job: str, world_size: int, errors: dict[int, RankError], seconds: float, logs: dict[int, str]
) -> str:
    """One section for each distinct error, since usually all ranks fail alike."""
    ranks_by_error: dict[tuple[str, str], list[int]] = {}
    for rank, error in sorted(errors.items()):
        ranks_by_error.setdefault((error.type_name, error.message), []).append(rank)
    parts = [f"{len(errors)} of {world_size} ranks failed in {job} after {seconds:.1f} s"]
    for (type_name, message), ranks in ranks_by_error.items():
        parts.append(f"\n--- rank {', '.join(map(str, ranks))}: {type_name}: {message}")
        parts.append(errors[ranks[0]].traceback.rstrip())
        if log := logs[ranks[0]].strip():
            parts.append(f"--- end of the output of rank {ranks[0]}:\n{log[-LOG_TAIL_CHARACTERS:]}")
    return "\n".join(parts)


def dumps(value: Any) -> bytes:
    """Pickles tensors by value; torch.multiprocessing would pass shared memory, whose owner may be killed."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


_STATIC_ENVIRONMENT = {
    # The parent serves the store; this makes `init_method="env://"` join it instead of opening another one.
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    # In the rank's own process: otherwise every rank starts a pool of compiler processes of its own.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parents[__name__.count(".")]), os.environ.get("PYTHONPATH")])
    ),
} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})

# Workers are forked from a process that has imported everything once: eight seconds of computing for each of them
# otherwise.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload([f"{__package__}.pool_worker"])


def _start_server() -> None:
    """With the environment that libraries read when they are imported."""
    before = dict(os.environ)
    os.environ.update(_STATIC_ENVIRONMENT)
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def fork(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start ``target`` in a process that is forked from the one that has imported everything."""
    _start_server()
    process = _CONTEXT.Process(target=_run, args=(target, *args))
    process.start()
    return process


def _run(target: Callable[..., None], *args: Any) -> None:
    """Run ``target`` where a worker of a DataLoader is forked, as in a script.

    Otherwise it would come from a server of this process alone, that first imports everything again.
    """
    set_start_method("fork", force=True)
    target(*args)


def work(connection: Connection, environment: dict[str, str], log_path: str) -> None:
    """What a worker's process runs."""
    from . import pool_worker

    pool_worker.main(connection, environment, log_path)


class _Worker:
    """The parent's view of one rank: its process, the pipe to it and its log file."""

    def __init__(self, rank: int, world_size: int, port: int, log_directory: Path):
        self.rank = rank
        self.log_path = log_directory / f"rank{rank}.log"
        self.log_offset = 0
        self.connection, child_connection = Pipe()
        environment = {
            **os.environ,
            **_STATIC_ENVIRONMENT,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(port),
        }
        self.log_path.touch()
        with child_connection:
            self.process = fork(work, child_connection, environment, str(self.log_path))
        self.pid: int = self.process.pid  # type: ignore[assignment]

    def read_log(self) -> str:
        """What the rank has written since the last call."""
        with self.log_path.open("rb") as log:
            log.seek(self.log_offset)
            text = log.read()
        self.log_offset += len(text)
        return text.decode(errors="replace")

    def describe_end(self) -> str:
        self.process.join(CLOSE_TIMEOUT)
        if self.process.exitcode is None:
            return "the process closed its pipe and does not end"
        return f"the process ended with code {self.process.exitcode}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()  # it may not lead its group yet
        self.process.join()


def _readable(workers: list[_Worker], deadline: float) -> list[_Worker]:
    """Waits for the first of `workers` that have sent something or have died; none at the deadline."""
    if not workers:
        return []
    ready = wait([worker.connection for worker in workers], max(0.0, deadline - time.monotonic()))
    return [worker for worker in workers if worker.connection in ready]


class WorkerPool:
    """The `world_size` ranks of one process group."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.alive = True
        self._log_directory = Path(tempfile.mkdtemp(prefix=f"worker_pool_{world_size}_"))
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._workers = [_Worker(rank, world_size, self._store.port, self._log_directory) for rank in range(world_size)]
        try:
            missing = self._wait_until_ready(STARTUP_TIMEOUT)
            if missing:
                logs = "\n".join(f"--- rank {worker.rank}:\n{worker.read_log()}" for worker in missing)
                raise RuntimeError(f"the workers of a pool of {world_size} did not start:\n{logs}")
        except BaseException:
            self.kill()
            raise

    def run(self, fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any], timeout: float) -> list[Any]:
        """See `run_distributed`."""
        request = (fn.__module__, fn.__qualname__, sys.path, dumps((args, kwargs)))
        job = f"{fn.__module__}.{fn.__qualname__} (world size {self.world_size})"
        for worker in self._workers:
            worker.read_log()
        start = time.monotonic()
        try:
            for worker in self._workers:
                worker.connection.send(request)
            results, errors = self._collect_answers(start, timeout)
            seconds = time.monotonic() - start
            logs = {rank: self._workers[rank].read_log() for rank in errors}
            if any(error.type_name in (DIED, NO_ANSWER) for error in errors.values()):
                self._add_stacks(errors)
                self.kill()
            elif stuck := self._reset():
                logs_of_stuck = "\n".join(f"--- rank {worker.rank}:\n{worker.read_log()}" for worker in stuck)
                warnings.warn(f"the pool is replaced: ranks cannot be reset after {job}\n{logs_of_stuck}", stacklevel=3)
                self.kill()
            elif psutil.Process(self._workers[0].pid).num_threads() > MOST_THREADS:
                self.close()
        except BaseException:
            self.kill()
            raise
        if errors:
            raise DistributedFailure(job, self.world_size, errors, seconds, logs)
        return [loads(results[rank]) for rank in range(self.world_size)]

    def _collect_answers(self, start: float, timeout: float) -> tuple[dict[int, bytes], dict[int, RankError]]:
        results: dict[int, bytes] = {}
        errors: dict[int, RankError] = {}
        pending = list(self._workers)
        deadline = start + timeout
        while answered := _readable(pending, deadline):
            for worker in answered:
                pending.remove(worker)
                try:
                    succeeded, answer = worker.connection.recv()
                except (EOFError, OSError):
                    succeeded, answer = False, (DIED, worker.describe_end(), "")
                if succeeded:
                    results[worker.rank] = answer
                    continue
                if not errors:
                    deadline = min(deadline, time.monotonic() + FAILURE_GRACE)
                errors[worker.rank] = RankError(*answer)
        waited = time.monotonic() - start
        for worker in pending:
            errors[worker.rank] = RankError(NO_ANSWER, f"no answer within {waited:.1f} s", "")
        return results, errors

    def _add_stacks(self, errors: dict[int, RankError]) -> None:
        """Adds where the ranks are that did not answer; they have registered faulthandler for this signal."""
        silent = [rank for rank, error in errors.items() if error.type_name == NO_ANSWER]
        for rank in silent:
            os.kill(self._workers[rank].pid, signal.SIGUSR1)
        if silent:
            time.sleep(STACK_DUMP_SECONDS)
        for rank in silent:
            errors[rank] = errors[rank]._replace(traceback=self._workers[rank].read_log())

    def _reset(self) -> list[_Worker]:
        """Lets the ranks clean up. Only now that all have answered: a rank still at work needs its peers' sockets.

        Returns the ranks that fail to.
        """
        for worker in self._workers:
            worker.connection.send("reset")
        return self._wait_until_ready(RESET_TIMEOUT)

    def _wait_until_ready(self, timeout: float) -> list[_Worker]:
        """Waits for the message every rank sends once it can take a job. Returns the ranks that did not send it."""
        pending = list(self._workers)
        deadline = time.monotonic() + timeout
        while ready := _readable(pending, deadline):
            for worker in ready:
                try:
                    worker.connection.recv()
                except (EOFError, OSError):
                    return [worker]  # it has died; no need to wait for the others
                pending.remove(worker)
        return pending

    def close(self) -> None:
        """Lets idle workers end by themselves: each leaves when its pipe is closed."""
        for worker in self._workers:
            worker.connection.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        self.alive = False
        for worker in self._workers:
            worker.kill()
            worker.connection.close()
        shutil.rmtree(self._log_directory, ignore_errors=True)


_pools: dict[int, WorkerPool] = {}


def _get_pool(world_size: int) -> WorkerPool:
    pool = _pools.get(world_size)
    if pool is None or not pool.alive:
        pool = _pools[world_size] = WorkerPool(world_size)
    return pool


@atexit.register
def close_pools() -> None:
    """Ends all workers; the next `run_distributed` starts new ones."""
    while _pools:
        _, pool = _pools.popitem()
        if pool.alive:
            pool.close()


def run_distributed(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
) -> list[Any]:
    """Calls `fn(*args, **kwargs)` on every rank of a gloo process group and returns the results by rank.

    `fn` is sent by name, so it has to be a function at the top level of a module that can be imported; arguments and
    results are pickled, tensors by value. The environment of the workers is that of the moment their pool started.

    Raises `DistributedFailure` if any rank raises, dies, or does not answer. `timeout` does not count the start of the
    pool. Once one rank has failed, the others get `FAILURE_GRACE` seconds.
    """
    if fn.__module__ == "__main__" or "<" in fn.__qualname__:
        raise ValueError(f"{fn.__module__}.{fn.__qualname__} cannot be imported by name in another process")
    return _get_pool(world_size).run(fn, args, kwargs, timeout)


def expect_error(
    world_size: int, fn: Callable[..., Any], *args: Any, match: str, within: float = 20.0, **kwargs: Any
) -> list[str]:
    """Asserts that *every* rank raises within `within` seconds, each with a message in which `match` is found.

    An error that only some ranks raise leaves the others waiting in their next collective, which is why one rank with
    the right message is not enough. Returns the messages by rank.
    """
    try:
        results = run_distributed(world_size, fn, *args, timeout=within, **kwargs)
    except DistributedFailure as failure:
        errors = failure.errors
        if any(error.type_name in (DIED, NO_ANSWER) for error in errors.values()) or len(errors) < world_size:
            raise AssertionError(f"only an exception on every rank within {within} s will do\n{failure}") from failure
        messages = [errors[rank].message for rank in range(world_size)]
        mismatched = [rank for rank, message in enumerate(messages) if not re.search(match, message)]
        if mismatched:
            raise AssertionError(f"{match!r} is not in the message of rank {mismatched}\n{failure}") from failure
        return messages
    raise AssertionError(f"no rank raised; the results are {results!r}")
