"""Processes on this machine that are the ranks of a run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from ..core.output import VERBOSE_VARIABLE
from ..errors import first_line

#: Seconds that a run may take, with the imports of fresh interpreters on a busy machine.
_LIMIT = 300.0
_NOT_INHERITED = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_", "HF_AUTO_PARALLEL", "RANK", "WORLD_SIZE", "LOCAL_")


def start_method(device: str) -> Literal["fork", "spawn"]:
    """How ranks start.

    A fork has what this process has imported, so that a run costs a second or two; but CUDA cannot be used in a fork of
    a process that has initialised it, which the mere import of a library may do (bitsandbytes, for one). So ranks are
    fresh interpreters ("spawn") where they use CUDA, and where this process has initialised it.

    Args:
        device: "cpu" or "cuda", what the ranks compute on.
    """
    import torch

    return "spawn" if device == "cuda" or torch.cuda.is_initialized() else "fork"


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Sizes of mesh axes as a text, such as "tp 2 x dp_shard 2"."""
    parts = (f"{axis.removesuffix('_size')} {size}" for axis, size in sizes.items() if size > 1)
    return " x ".join(parts) or "1 process"


def run(ranks: int, folder: Path, work: Callable[[int], None], device: str = "cpu") -> str | None:
    """Run ``work(rank)`` in processes of their own.

    Args:
        ranks: their number; their environment is that of ``torchrun``.
        folder: for what they print and for their errors.
        work: what each does; can be pickled, which a spawned process needs.
        device: "cpu" or "cuda", what they compute on.

    Returns:
        The first error in a line; None without one.
    """
    method = start_method(device)
    if method == "fork":
        _import_libraries()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    context: Any = multiprocessing.get_context(method)
    children = [
        context.Process(target=_rank, args=(rank, ranks, port, folder, work), name=f"rank {rank}")
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    failed = _wait(children)
    return None if failed is None else error_in(folder) or failed


def error_in(folder: Path) -> str:
    """The first error that a rank wrote."""
    errors = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime)
    return errors[0].read_text() if errors else ""


def _import_libraries() -> None:
    """Import what ranks need, so that forked processes have it."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from ..accelerate_plugin import methods  # noqa: F401
    from ..strategies import default  # noqa: F401


def _wait(children: list[BaseProcess]) -> str | None:
    """Wait for all ``children``; kill what is left after the limit, or soon after an error."""
    left, failed, until = list(children), None, time.monotonic() + _LIMIT
    try:
        while left:
            ended = wait([child.sentinel for child in left], timeout=until - time.monotonic())
            for child in [child for child in left if child.sentinel in ended]:
                left.remove(child)
                child.join()
                if child.exitcode and failed is None:
                    failed, until = f"{child.name} ended with exit code {child.exitcode}", time.monotonic() + 5
            if left and time.monotonic() > until:
                return failed or f"no answer within {_LIMIT:.0f} s"
    finally:
        for child in left:
            child.kill()
            child.join()
    return failed


def _rank(rank: int, ranks: int, port: int, folder: Path, work: Callable[[int], None]) -> None:
    """The life of a process; it ends without what a forking parent has registered for the end of a process."""
    code = 0
    try:
        os.dup2(os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        for name in [name for name in os.environ if name.startswith(_NOT_INHERITED)]:
            del os.environ[name]
        os.environ |= {VERBOSE_VARIABLE: "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        import torch

        torch.set_num_threads(1)
        work(rank)
    except BaseException as error:
        code = 1
        traceback.print_exc()
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {first_line(error)}")
    finally:
        sys.stdout.flush()
        os._exit(code)
