"""The manifest: the list of files of a complete checkpoint, written last and checked first.

A file has one of two kinds of entries:

* Checksums per block, of files written through :func:`.checksums.create`: weights and optimizer state, nearly all of
  the bytes. They are verified while they are read.
* One checksum, of files that Accelerate, transformers and torch write by name. It is computed by reading them back
  after the save, and :func:`verify` reads them before a load. All files of older checkpoints have such entries.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.ranks import broadcast_object, gather_objects, rank, world_size
from ..errors import CheckpointError, without_stop
from .checksums import BLOCK, Checksums, read_back, take_written
from .files import write_atomically
from .steps import checkpoint_step

MANIFEST = "checkpoint_manifest.json"
MARK = "checkpoint_incomplete.json"
PREVIOUS = ".previous"
FORMAT = 1

#: Names of training-state files and directories of Accelerate, the Trainer and this package. A save may replace them.
STATE_NAMES = re.compile(
    r"^(pytorch_model_fsdp|optimizer|scheduler|scaler|sampler|dl_state_dict|random_states|rng_state|"
    r"dataloader_shuffling|"
    r"custom_checkpoint|trainer_state)([._-].*)?$"
)
#: Names of weights files, from a save or from an export of a model to the same directory.
_WEIGHTS_NAMES = re.compile(r"^(pytorch_model|model|adapter_model)([._-].*)?$")

#: File names that contain the rank that wrote the file.
_RANK_IN_NAME = re.compile(r"(?:^__(\d+)_\d+\.distcp|_rank(\d+)\.bin|^(?:rng_state|random_states)_(\d+)\.p\w+)$")


@dataclass
class Manifest:
    """Contents of ``checkpoint_manifest.json``.

    Attributes:
        format: version of this format.
        step: the Trainer's ``global_step`` or Accelerate's ``step``; None if unknown.
        world_size: number of processes that saved.
        mesh: mesh axis -> size, outermost first, without axes of size 1.
        data_parallel_size: number of ranks that read different batches.
        state_dict_type: ``SHARDED_STATE_DICT`` (directories of DCP) or ``FULL_STATE_DICT`` (single files).
        adapter_only: weights of the frozen base model were left out.
        devices: number of accelerators whose random states each rank saved; 0 on the CPU.
        created: seconds since 1970.
        torch: version of torch that wrote it.
        files: path below the directory -> ``{"size": bytes, "crc32": checksum}``.
        block_size: bytes of a block.
        blocks: path -> CRC-32 of each block, eight hexadecimal digits each. Earlier versions of this package ignore it.
    """

    format: int = FORMAT
    step: int | None = None
    world_size: int = 1
    mesh: dict[str, int] = field(default_factory=dict)
    data_parallel_size: int = 1
    state_dict_type: str = "FULL_STATE_DICT"
    adapter_only: bool = False
    devices: int = 0
    created: float = field(default_factory=time.time)
    torch: str = str(torch.__version__)
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    block_size: int = BLOCK
    blocks: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, entry: Checksums) -> None:
        """Add the entry of the file ``name``, a path below the directory."""
        self.files[name] = {"size": entry.size, "crc32": entry.crc32}
        if entry.blocks:
            self.block_size, self.blocks[name] = entry.block_size, entry.blocks.hex()

    def checksums(self, name: str) -> Checksums | None:
        """Checksums of the file ``name`` with its blocks; None if it has no checksums per block."""
        blocks = self.blocks.get(name)
        if blocks is None or name not in self.files:
            return None
        entry = self.files[name]
        return Checksums(entry["size"], entry["crc32"], self.block_size, bytes.fromhex(blocks))

    def checksums_below(self, directory: str) -> dict[str, Checksums]:
        """:meth:`checksums` of the files in ``directory``, by their name in it."""
        found = {name: self.checksums(name) for name in self.blocks if Path(name).parent.as_posix() == directory}
        return {Path(name).name: entry for name, entry in found.items() if entry is not None}

    @property
    def tp_size(self) -> int:
        """Size of the tp axis: the ranks of a tp group share one random state."""
        return self.mesh.get("tp", 1)


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of ``folder``; None if it has none.

    Raises:
        CheckpointError: it cannot be read, or a later version of this package wrote it.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise CheckpointError(
                f"{path} has format {content['format']}, this version of hf_automodel_parallel reads up to {FORMAT}. "
                "Update it."
            )
        manifest = Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__ if name in content})
        for name, entry in manifest.files.items():
            # A manifest is read from a directory that others may have written: no path may leave it.
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(f"{path} lists {name!r}, which is outside of the checkpoint.")
            int(entry["size"]), int(entry["crc32"])
            listed = manifest.checksums(name)
            if listed is not None and len(listed.blocks) != 4 * -(-listed.size // listed.block_size):
                raise CheckpointError(f"{path} is damaged: {name!r} has another number of blocks than its size tells.")
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {without_stop(error)}.") from error
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically. It makes ``folder`` a complete checkpoint, so call it last."""
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def holds_a_save(folder: Path) -> bool:
    """True if ``folder`` has files with names of training state or weights; for directories without a manifest."""
    return any(STATE_NAMES.match(name) or _WEIGHTS_NAMES.match(name) for name in os.listdir(folder))


def new_files(folder: Path, since: int) -> list[str]:
    """Paths of the files of the current save, without mark, manifest and backup.

    These are training-state files of any age, because the clocks of nodes differ, and all files modified since
    ``since`` (``st_mtime_ns``). An older ``model.safetensors`` was exported to the same directory and is not part of
    the checkpoint.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name != PREVIOUS]
            names = [name for name in names if not name.startswith((MANIFEST, MARK))]
        for name in names:
            path = Path(parent) / name
            relative = path.relative_to(folder)
            if path.is_file() and (STATE_NAMES.match(relative.parts[0]) or path.stat().st_mtime_ns >= since):
                found.append(relative.as_posix())
    return sorted(found)


def responsible(name: str, ranks: int) -> int:
    """The rank that wrote ``name`` if the name contains it, else 0.

    Only that rank is sure to have the file, on nodes without a shared file system.
    """
    match = _RANK_IN_NAME.search(Path(name).name)
    return 0 if match is None else int(next(group for group in match.groups() if group)) % ranks


def add_new_files(manifest: Manifest, folder: Path, since: int, group: Any = None) -> None:
    """Add all new files to the manifest; the rank that wrote a file supplies its entry. Collective.

    Files from :func:`.checksums.create` are flushed and have checksums already. The others are read back: a few KB, as
    long as no library writes large files by name.
    """
    mine: dict[str, Checksums] = {}
    with checkpoint_step(f"completing {folder}", group):
        ranks = world_size(group)
        for name in new_files(folder, since):
            # Nodes may have disks of their own, so each rank describes its own files.
            if responsible(name, ranks) == rank(group):
                mine[name] = take_written(folder / name) or read_back(folder / name, sync=True)
    for entries in gather_objects(mine, group):
        for name, entry in entries.items():
            manifest.add(name, entry)


def check_sizes(folder: Path, manifest: Manifest) -> list[str]:
    """Messages for files that are missing or have another size; empty if there are none. Reads no file."""
    problems = []
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError:  # another job deletes it at this moment
            size = None
        if size is None:
            problems.append(f"{path} is missing")
        elif size != entry["size"]:
            problems.append(f"{path} has {size} bytes instead of {entry['size']}")
    return problems


def verify(folder: str | Path, group: Any = None) -> Manifest | None:
    """Check a checkpoint against its manifest before it is loaded; collective.

    Checks that every file exists with its size. One rank reads each file without checksums per block; the others are
    verified while they are read.

    Returns:
        The manifest; None for a checkpoint without one (from stock Accelerate or an earlier version).

    Raises:
        CheckpointError: on all ranks, naming each file that is missing, truncated or changed.
    """
    folder = Path(folder)
    with checkpoint_step(f"reading {folder}", group):
        # One rank reads it, so that all ranks decide from the same content.
        manifest = read_manifest(folder) if rank(group) == 0 else None
    manifest = broadcast_object(manifest, group)
    if manifest is None:
        return None
    ranks, me = world_size(group), rank(group)
    with checkpoint_step(f"checking {folder}", group):
        mine: Mapping[str, dict[str, int]] = {
            name: entry for name, entry in manifest.files.items() if responsible(name, ranks) == me
        }
        problems = check_sizes(folder, Manifest(files=dict(mine)))
        for name, entry in mine.items():
            # Blocks are verified while they are read; and one problem is enough to refuse the checkpoint.
            if problems or name in manifest.blocks:
                continue
            problems += _changed(folder / name, entry)
        _raise_if_damaged(folder, problems)
    return manifest


def verify_for_others(folder: Path, manifest: Manifest | None, prefix: str, group: Any = None) -> None:
    """Read and check the files that begin with ``prefix`` before other code loads them unverified; collective.

    Raises:
        CheckpointError: on all ranks, naming each file that was changed.
    """
    if manifest is None:
        return
    ranks, me = world_size(group), rank(group)
    with checkpoint_step(f"checking {folder}", group):
        problems: list[str] = []
        for name, entry in manifest.files.items():
            # The others were read by `verify`.
            if name in manifest.blocks and name.startswith(prefix) and responsible(name, ranks) == me:
                problems += _changed(folder / name, entry)
        _raise_if_damaged(folder, problems)


def _changed(path: Path, entry: Mapping[str, int]) -> list[str]:
    """What is wrong with the content of a file, by reading it; empty if nothing is."""
    try:
        found = read_back(path)
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror or error})"]
    if (found.size, found.crc32) != (entry["size"], entry["crc32"]):
        return [f"{path} was changed since it was saved (its checksum differs)"]
    return []


def _raise_if_damaged(folder: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {'; '.join(problems[:4])}"
            + (f" (and {len(problems) - 4} others)" if len(problems) > 4 else "")
            + ". Nothing was loaded. Resume from an earlier checkpoint."
        )
