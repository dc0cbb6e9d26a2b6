"""The program one rank of a `pool.WorkerPool` runs, in a process forked from one that has imported this module.

It says that it is ready, gets a job, answers with ``(True, pickled result)`` or ``(False, (type name, message,
traceback))``, waits for the word that all ranks have answered, undoes what the job left behind, and is ready again.

Between two jobs the process group is replaced by a new one instead of being kept. A job that failed half-way leaves the
ranks with different numbers of collectives and of subgroups behind them, after which collectives would pair up
wrongly; and the subgroups of a job's device meshes would pile up, with their threads and sockets, until the end of
the run. A new gloo group costs a few milliseconds a rank, next to the seconds of imports that the pool saves.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib
import os
import random
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import accelerate  # noqa: F401
import numpy
import peft  # noqa: F401
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

import hf_automodel_parallel.trainer_plugin.extend  # noqa: F401  # and with it what a config imports when it is used

from .pool import HOST, dumps, loads

PROCESS_GROUP_TIMEOUT = timedelta(seconds=60)


# These names are resolved lazily; resolved here, their imports are paid once.
transformers.PreTrainedModel, transformers.Trainer  # noqa: B018


class ProcessState:
    """What a job finds when it starts, the same for every job whatever ran before."""

    def __init__(self) -> None:
        self._rank = int(os.environ["RANK"])
        self._world_size = int(os.environ["WORLD_SIZE"])
        self._store = dist.TCPStore(
            HOST, int(os.environ["MASTER_PORT"]), is_master=False, timeout=PROCESS_GROUP_TIMEOUT
        )
        self._generation = 0
        self._environment = dict(os.environ)
        self._directory = os.getcwd()
        self._caches = _caches_of_torch_distributed()

    def set_up(self) -> None:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        self._generation += 1
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"generation{self._generation}", self._store),
            rank=self._rank,
            world_size=self._world_size,
            timeout=PROCESS_GROUP_TIMEOUT,
        )
        PartialState(cpu=True)

    def tear_down(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._directory)
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        # The next groups get the names of the ones destroyed here. No device mesh of this job may live on in a cache,
        # where the next job would find it under the key of an equal mesh.
        _clear_sharding_prop_cache()
        clear_redistribute_planner_cache()
        for cache in [*self._caches, *_caches_of_torch_distributed()]:
            cache.cache_clear()
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


def _caches_of_torch_distributed() -> list[Any]:
    """Its functools caches (except of frozen modules, see `main`): DTensor alone has half a dozen keyed by mesh."""
    return [
        candidate
        for candidate in gc.get_objects()
        if type(candidate) is functools._lru_cache_wrapper and str(candidate.__module__).startswith("torch.distributed")
    ]


def run_job(module_name: str, qualified_name: str, search_path: list[str], arguments: bytes) -> tuple[bool, Any]:
    try:
        sys.path.extend(path for path in search_path if path not in sys.path)
        module = importlib.import_module(module_name)
        fn: Any = functools.reduce(getattr, qualified_name.split("."), module)
        args, kwargs = loads(arguments)
        return True, dumps(fn(*args, **kwargs))
    except BaseException as error:  # SystemExit and pytest's outcomes too: they must not end the process
        return False, (type(error).__name__, str(error), traceback.format_exc())


def serve(connection: Connection, state: ProcessState) -> None:
    while True:
        state.set_up()
        connection.send("ready")
        job = connection.recv()
        connection.send(run_job(*job))
        connection.recv()  # all ranks have answered
        state.tear_down()


def main(connection: Connection, environment: dict[str, str], log_path: str) -> None:
    os.setsid()  # so that the pool can kill the rank's own children too, and Ctrl-C spares it
    with open(log_path, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [__name__]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    state = ProcessState()
    gc.freeze()  # makes the collection after each job skip the modules imported so far
    with contextlib.suppress(EOFError):  # the parent has closed the pool, or is gone
        serve(connection, state)
    sys.stdout.flush()
    os._exit(0)  # shutting the group down in order would have to wait for the peers
