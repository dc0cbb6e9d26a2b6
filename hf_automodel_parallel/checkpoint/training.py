"""Saves and loads the state of a model and an optimizer, under the file names of Accelerate and the Trainer.

A save has two steps, both collective: ``collect_*`` gathers or references the tensors and returns a :data:`Task`, and
the task writes them, possibly in a background thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..core.ranks import broadcast_object, rank
from ..errors import CheckpointError
from ..optim.handoff import raw_optimizer
from .commit import to_load
from .files import save_plain
from .manifest import Manifest, verify
from .shards import LocalShard
from .sources import DcpSource, FileSource, Source, nested
from .state import State, check_same_everywhere, load_model, load_optimizer, model_state, optimizer_state
from .steps import checkpoint_step
from .writer import save_chunks

MODEL = "pytorch_model_fsdp"
OPTIMIZER = "optimizer"

#: Writes the collected state; its argument is the process group for collectives (None: all ranks).
Task = Callable[[Any], None]


@dataclass(frozen=True)
class How:
    """How states are saved.

    Attributes:
        sharded: each rank writes its chunks (``SHARDED_STATE_DICT``); False: rank 0 writes full tensors to one file.
        copy: collect copies on the CPU, because training may change the tensors before they are written.
        adapter_only: leave out the frozen base weights of a PEFT model.
    """

    sharded: bool
    copy: bool = False
    adapter_only: bool = False


def collect_model(model: nn.Module, folder: Path, index: int, how: How) -> Task:
    """Collect the weights of ``model``; the returned task writes them. Both are collective."""
    with checkpoint_step(f"saving to {folder}"):
        state: State = {(name,): value for name, value in model_state(model, how.adapter_only).items()}
    check_same_everywhere(state, "the model", fatal=False)
    if how.sharded:
        return _sharded(state, "model", folder / f"{MODEL}_{index}", how)
    return _full(state, folder / (f"{MODEL}.bin" if index == 0 else f"{MODEL}_{index}.bin"))


def collect_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path, index: int, how: How) -> Task:
    """Collect the state of ``optimizer``; the returned task writes it. Both are collective.

    Raises:
        UnsupportedError: state that differs between ranks without being sharded, or that no checkpoint can hold.
    """
    with checkpoint_step(f"saving to {folder}"):
        state = optimizer_state(optimizer, model)
    check_same_everywhere(state, type(optimizer).__name__, fatal=True)
    if how.sharded:
        return _sharded(state, "optimizer", folder / f"{OPTIMIZER}_{index}", how)
    return _full(state, folder / (f"{OPTIMIZER}.bin" if index == 0 else f"{OPTIMIZER}_{index}.bin"))


def _sharded(state: State, root: str, folder: Path, how: How) -> Task:
    paths = {".".join(map(str, (root, *path))): (root, *path) for path in state}
    flat: dict[str, Any] = {}
    with checkpoint_step(f"saving to {folder}"):
        for key, path in paths.items():
            value = state[path[1:]]
            if isinstance(value, torch.Tensor):
                shard = LocalShard.of(value)
                value = shard.copied() if how.copy else shard
            flat[key] = value
    return lambda group: save_chunks(flat, paths, folder, group)


def _full(state: State, path: Path) -> Task:
    """Gather one tensor at a time; only rank 0 keeps them, on the CPU."""
    keep = rank() == 0
    gathered: State = {}
    for key, value in state.items():
        if isinstance(value, DTensor):
            # A collective: the state has the same order on all ranks.
            value = value.full_tensor()
        if keep:
            gathered[key] = value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value

    def write(group: Any) -> None:
        with checkpoint_step(f"saving {path}", group):
            if keep:
                save_plain(nested(gathered), path)

    return write


def restore_model(
    model: nn.Module, folder: Path, index: int = 0, adapter_only: bool = False, manifest: Manifest | None = None
) -> None:
    """Load the weights of ``model`` from a checkpoint, on any mesh or in one process; collective.

    Args:
        model: sharded, or a plain model in one process.
        folder: the checkpoint.
        index: index of the model among those of an Accelerator.
        adapter_only: the checkpoint may lack the frozen base weights of a PEFT model.
        manifest: from :func:`.manifest.verify`, to verify the files while they are read.

    Raises:
        CheckpointError: on all ranks: files are missing or damaged, or of another model.
    """
    name = f"{MODEL}.bin" if index == 0 else f"{MODEL}_{index}.bin"
    load_model(model, _source(folder, f"{MODEL}_{index}", name, "model", 1, manifest), adapter_only)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path, index: int = 0, manifest: Manifest | None = None
) -> None:
    """Load the state of ``optimizer``, which trains ``model``; see :func:`restore_model`."""
    name = f"{OPTIMIZER}.bin" if index == 0 else f"{OPTIMIZER}_{index}.bin"
    load_optimizer(optimizer, model, _source(folder, f"{OPTIMIZER}_{index}", name, "optimizer", 3, manifest))


def load_training_state(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Manifest | None:
    """Load weights and optimizer state from a checkpoint of this package, or of stock Accelerate with FSDP2.

    For a model without an Accelerator, such as a plain model in one process. With an Accelerator use its
    ``load_state``. Files are verified before or while they are read; no code in a file is run. Collective if there is a
    process group.

    Args:
        folder: a checkpoint of ``save_state`` or of a Trainer.
        model: any module with the same parameter names and shapes; filled in place.
        optimizer: an optimizer of ``model`` with the same parameter groups; None to load only weights.

    Returns:
        The manifest; None if the checkpoint has none.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or of another model.

    Examples:
        >>> load_training_state("out/checkpoint-10", model, optimizer)
    """
    folder = to_load(folder)
    manifest = verify(folder)
    restore_model(model, folder, adapter_only=manifest is None or manifest.adapter_only, manifest=manifest)
    if optimizer is not None:
        restore_optimizer(raw_optimizer(optimizer), model, folder, manifest=manifest)
    return manifest


def _source(folder: Path, directory: str, file: str, root: str, depth: int, manifest: Manifest | None) -> Source:
    sharded = False
    with checkpoint_step(f"loading {folder}"):
        # Rank 0 decides: a full state need not be visible on the disks of other nodes.
        if rank() == 0:
            sharded = (folder / directory).is_dir()
            if not sharded and not (folder / file).is_file():
                raise CheckpointError(
                    f"{folder} holds neither {directory}/ nor {file}: there is no state of the {root} to continue "
                    f"from. A checkpoint of save_only_model=True, or of save_model, is for from_pretrained."
                )
    if broadcast_object(sharded):
        return DcpSource(folder / directory, root, manifest)
    return FileSource(folder / file, depth, manifest)
