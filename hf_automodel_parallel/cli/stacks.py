"""``verify --stack``: other parallelisations, judged by the same comparison, in interpreters without this package."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from . import local_ranks
from .comparison import compare_saved
from .verify_ranks import Job, batch, build, judged, reference

#: Stack -> axes of the mesh that it has.
AXES = {"transformers": ("tp_size", "dp_shard_size"), "accelerate": ("dp_shard_size",)}
_SCRIPT = Path(__file__).with_name("stack_run.py")


def check(stack: str, fields: dict[str, Any], sizes: dict[str, int], config_file: Path | None) -> None:
    """Refuse what ``stack`` does not have.

    Raises:
        ConfigError: ``stack`` is unknown, or an option is of this package alone.
    """
    if stack not in AXES:
        raise ConfigError(f"--stack {stack}: give one of {', '.join(AXES)}.")
    if config_file is not None:
        raise ConfigError(f"--stack {stack} does not read --config_file: give --tp and --dp-shard.")
    options = sorted(name for name in fields if not name.endswith("_size"))
    if options:
        raise ConfigError(f"--stack {stack} has no {options[0]}: leave it out.")
    axes = sorted(axis for axis, size in sizes.items() if size > 1 and axis not in AXES[stack])
    if axes:
        has = " and ".join(f"--{axis.removesuffix('_size').replace('_', '-')}" for axis in AXES[stack])
        raise ConfigError(f"--stack {stack} has no {axes[0].removesuffix('_size')} here: give {has} alone.")


def words(stack: str) -> str:
    """What a result is of, such as "transformers 5.24.0, peft 0.21.2"."""
    return ", ".join(f"{name} {version(name)}" for name in dict.fromkeys((stack, "peft", "torch")))


@dataclass(frozen=True)
class StackJob:
    """What is judged: ``job`` under ``stack``."""

    job: Job
    stack: str

    @property
    def ranks(self) -> int:
        return math.prod(self.job.sizes.values())


def write_files(one: StackJob, folder: Path, rank: int) -> None:
    """In one process: write the script, the small model, the batch and the result of one process to ``folder``."""
    job = one.job
    build(replace(job, lora=None)).save_pretrained(folder / "model")  # type: ignore[operator]
    adapters = {} if job.lora is None else {n: p.detach() for n, p in build(job).named_parameters() if p.requires_grad}
    torch.save({**reference(job), "batch": batch(job), "adapters": adapters}, folder / "reference.pt")
    sizes = {"tp_size": job.sizes["tp_size"], "fsdp_size": job.sizes["dp_shard_size"]}
    what = {"stack": one.stack, "lora": job.lora, "imports": job.imports, **sizes}
    (folder / "what.json").write_text(json.dumps(what))
    shutil.copy(_SCRIPT, folder / "run.py")


def run_script(folder: Path, rank: int) -> None:
    """The script in place of this process, so that nothing of this package is imported."""
    os.execv(sys.executable, [sys.executable, str(folder / "run.py")])


def result_of(one: StackJob, folder: Path) -> dict[str, Any]:
    """Run the script on the ranks, and compare what they wrote with one process; as :func:`.verify_ranks.parallel`.

    A stack that raises has ``ok`` False and ``error``, its first line.
    """
    problem = local_ranks.run(one.ranks, folder, partial(run_script, folder))
    if problem is not None:
        return {"ok": False, "error": problem}
    found = [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(one.ranks)]
    expected = torch.load(folder / "reference.pt", weights_only=True)
    return judged(compare_saved(found, expected)) | {"origin": None}
