"""Functions run in fresh processes of this machine: gloo ranks, or one."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from .recorder import ROOT


class RanksFailed(RuntimeError):
    """The processes of a benchmark ended with an error.

    Attributes:
        output: the end of what they wrote.
    """

    def __init__(self, function: str, output: str) -> None:
        lines = [line for line in output.splitlines() if _ERROR.search(line)]
        super().__init__(f"{function} failed: {lines[-1].strip() if lines else output.strip()[-200:]}")
        self.output = output[-4000:]


#: The last line of a traceback of a rank; the launcher's own error says only that there was one.
_ERROR = re.compile(r"^(\[rank\d+\]: )?(?!.*ChildFailed)[\w.]*(Error|Exception|Exit)\b")


def on_ranks(
    world: int, function: str, arguments: dict[str, Any], python: str = sys.executable, timeout: float = 1800.0
) -> list[Any]:
    """What ``function`` returns on each of ``world`` ranks.

    Args:
        function: ``"module:name"``; called with the arguments by name in a process with a gloo group. Its result is
            written as JSON.
        python: interpreter of another environment.
        timeout: seconds.

    Raises:
        RanksFailed: a rank raised, or the time is over.
    """
    with tempfile.TemporaryDirectory() as out:
        launcher = [python, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--rdzv_backend", "c10d"]
        launcher += ["--rdzv_endpoint", "127.0.0.1:0", "-m", "benchmarks.ranks"]
        given = json.dumps(arguments)
        try:
            done = subprocess.run(
                [*launcher, function, given, "--out", out],
                env=environment(),
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RanksFailed(function, f"it took longer than {timeout:.0f} s") from error
        if done.returncode:
            raise RanksFailed(function, done.stderr)
        return [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(world)]


def in_process(function: str, timeout: float = 900.0, **arguments: Any) -> Any:
    """What a function of this package returns in a fresh process; ``"module:name"``.

    Raises:
        RanksFailed: it raised, or the time is over.
    """
    module, _, name = function.partition(":")
    code = f"import json, sys, {module} as m; print(json.dumps(m.{name}(**json.loads(sys.argv[1]))))"
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)]
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise RanksFailed(function, f"it took longer than {timeout:.0f} s") from error
    if done.returncode:
        raise RanksFailed(function, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    """Of a process on the CPU that finds this package."""
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TRANSFORMERS_VERBOSITY": "error",
    }


def main() -> None:
    """One rank."""
    import torch.distributed as dist

    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("arguments", type=json.loads)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    module, _, name = options.function.partition(":")
    result = getattr(importlib.import_module(module), name)(**options.arguments)
    (options.out / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
