"""The manifest: what a complete checkpoint consists of, written last, checked first.

Who checks a file's bytes, its entry says. A file with checksums of its blocks was written through
:func:`.checksums.create`: weights, optimizer state, nearly all of the bytes. It is verified while it is read. Other
files, which Accelerate, transformers and torch write by name, have one checksum, from reading them back after the save;
:func:`verify` reads them before a load. So does it with all files of an older checkpoint, which has no blocks.
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
from ..errors import CheckpointError
from .checksums import BLOCK, Checksums, read_back, take_written
from .files import write_atomically
from .steps import checkpoint_step

MANIFEST = "checkpoint_manifest.json"
MARK = "checkpoint_incomplete.json"
PREVIOUS = ".previous"
FORMAT = 1

#: Names that Accelerate and the Trainer give to the state of a training, and we too. A save may move and replace these.
STATE_NAMES = re.compile(
    r"^(pytorch_model_fsdp|optimizer|scheduler|scaler|sampler|dl_state_dict|random_states|rng_state|"
    r"dataloader_shuffling|"
    r"custom_checkpoint|trainer_state)([._-].*)?$"
)
#: Names of weights that a save may have written, or an export of a model to the same directory.
_WEIGHTS_NAMES = re.compile(r"^(pytorch_model|model|adapter_model)([._-].*)?$")

_RANK_IN_NAME = re.compile(r"(?:^__(\d+)_\d+\.distcp|_rank(\d+)\.bin|^(?:rng_state|random_states)_(\d+)\.p\w+)$")


@dataclass
class Manifest:
    """Contents of ``checkpoint_manifest.json``.

    Attributes:
        format: version of this layout.
        step: optimizer steps (the Trainer's ``global_step``), or saves so far, or None if unknown.
        world_size: processes that saved.
        mesh: sizes of their mesh axes, outermost first.
        data_parallel_size: ranks that read different batches.
        state_dict_type: ``SHARDED_STATE_DICT`` (directories of DCP) or ``FULL_STATE_DICT`` (single files).
        adapter_only: weights of the frozen base model were left out.
        devices: accelerators per process group node whose random states each rank saved, 0 on the CPU.
        created: seconds since 1970.
        torch: version that wrote it.
        files: path below the directory -> ``{"size": bytes, "crc32": checksum}``.
        block_size: bytes of the blocks that have a checksum of their own.
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
        """List a file."""
        self.files[name] = {"size": entry.size, "crc32": entry.crc32}
        if entry.blocks:
            self.block_size, self.blocks[name] = entry.block_size, entry.blocks.hex()

    def checksums(self, name: str) -> Checksums | None:
        """Checksums of the blocks of the file ``name``; None if it has none."""
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
        """Ranks that shared one random state."""
        return self.mesh.get("tp", 1)


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of ``folder``, None if there is none.

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
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """From here on ``folder`` is a complete checkpoint."""
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def holds_a_save(folder: Path) -> bool:
    """True if a directory without a manifest has files of the kind that Accelerate and the Trainer save."""
    return any(STATE_NAMES.match(name) or _WEIGHTS_NAMES.match(name) for name in os.listdir(folder))


def new_files(folder: Path, since: int) -> list[str]:
    """Files below ``folder`` that belong to the save that began at ``since``, without the bookkeeping of this package.

    They are the files of a training state (at any time, as clocks of nodes differ), and all that was written since, in
    nanoseconds. An older ``model.safetensors`` is an export into the same directory, which may be
    replaced at any time.
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
    """The rank that wrote ``name`` if its name says so, else rank 0: who sees it on nodes without a common file
    system.
    """
    match = _RANK_IN_NAME.search(Path(name).name)
    return 0 if match is None else int(next(group for group in match.groups() if group)) % ranks


def add_new_files(manifest: Manifest, folder: Path, since: int, group: Any = None) -> None:
    """List every new file, each described by the rank that wrote it; collective.

    What :func:`.checksums.create` has written is on the disk and has its checksums. The rest is read back: a few KB, as
    long as no library writes large files by name.
    """
    mine: dict[str, Checksums] = {}
    with checkpoint_step(f"completing {folder}", group):
        ranks = world_size(group)
        for name in new_files(folder, since):
            if responsible(name, ranks) == rank(group):
                mine[name] = take_written(folder / name) or read_back(folder / name, sync=True)
    for entries in gather_objects(mine, group):
        for name, entry in entries.items():
            manifest.add(name, entry)


def check_sizes(folder: Path, manifest: Manifest) -> list[str]:
    """What a look at the directory tells: files that are missing or have another size."""
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
    """Check a checkpoint against its manifest before it is loaded, on all ranks alike; collective.

    Every file has to be there in its size. Files without checksums of blocks are read, each by one rank; the others are
    verified when they are read.

    Returns:
        The manifest, or None for a checkpoint without one (of stock Accelerate, or of an earlier version).

    Raises:
        CheckpointError: on all ranks, naming each file that is missing, truncated or changed.
    """
    folder = Path(folder)
    with checkpoint_step(f"reading {folder}", group):
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
            if problems or name in manifest.blocks:
                continue
            try:
                found = read_back(folder / name)
            except OSError as error:
                problems.append(f"{folder / name} cannot be read ({error.strerror or error})")
                continue
            if (found.size, found.crc32) != (entry["size"], entry["crc32"]):
                problems.append(f"{folder / name} was changed since it was saved (its checksum differs)")
        if problems:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {'; '.join(problems[:4])}"
                + (f" (and {len(problems) - 4} others)" if len(problems) > 4 else "")
                + ". Nothing was loaded. Resume from an earlier checkpoint."
            )
    return manifest
