"""The manifest: what a complete checkpoint consists of, written last, checked first."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.checkpoint_ranks import agreed, everyone_tells, rank, rank_zero_tells, world_size
from ..errors import CheckpointError
from .files import write_atomically

MANIFEST = "checkpoint_manifest.json"
MARK = "checkpoint_incomplete.json"
PREVIOUS = ".previous"
FORMAT = 1

#: Names that Accelerate and the Trainer give to the state of a training, and we too. A save may move and replace these.
STATE_NAMES = re.compile(
    r"^(pytorch_model_fsdp|optimizer|scheduler|scaler|sampler|dl_state_dict|random_states|rng_state|dataloader_shuffling|"
    r"custom_checkpoint|trainer_state)([._-].*)?$"
)
#: Names of weights that a save may have written, or somebody who exported a model to the same directory.
_WEIGHTS_NAMES = re.compile(r"^(pytorch_model|model|adapter_model)([._-].*)?$")

_CHUNK = 1 << 22
_RANK_IN_NAME = re.compile(r"(?:^__(\d+)_\d+\.distcp|_rank(\d+)\.bin|^(?:rng_state|random_states)_(\d+)\.p\w+)$")


@dataclass
class Manifest:
    """Contents of ``checkpoint_manifest.json``.

    Attributes:
        format: version of this layout.
        step: optimizer steps (the Trainer's ``global_step``), or saves so far, or None where nobody knows.
        world_size: processes that saved.
        mesh: sizes of their mesh axes, outermost first.
        data_parallel_size: ranks that read different batches.
        state_dict_type: ``SHARDED_STATE_DICT`` (directories of DCP) or ``FULL_STATE_DICT`` (single files).
        adapter_only: weights of the frozen base model were left out.
        devices: accelerators per process group node whose random states each rank saved, 0 on the CPU.
        created: seconds since 1970.
        torch: version that wrote it.
        files: path below the directory -> ``{"size": bytes, "crc32": checksum}``.
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


def file_entry(path: Path, sync: bool = False) -> dict[str, int]:
    """Size and checksum of a file; with ``sync`` also see to it that it is on the disk."""
    size = checksum = 0
    with path.open("rb") as stream:
        while data := stream.read(_CHUNK):
            size += len(data)
            checksum = zlib.crc32(data, checksum)
        if sync:
            os.fsync(stream.fileno())
    return {"size": size, "crc32": checksum}


def holds_a_save(folder: Path) -> bool:
    """True if a directory without a manifest has files of the kind that Accelerate and the Trainer save."""
    return any(STATE_NAMES.match(name) or _WEIGHTS_NAMES.match(name) for name in os.listdir(folder))


def new_files(folder: Path, since: int) -> list[str]:
    """Files below ``folder`` that belong to the save that began at ``since``, without the bookkeeping of this package.

    They are what the state of a training consists of (whatever time the clock of another node gave them), and all that
    was written since, in nanoseconds. An older ``model.safetensors`` is an export into the same directory, which may be
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


def entries_of_all(folder: Path, since: int, group: Any = None) -> dict[str, dict[str, int]]:
    """Size and checksum of every new file, each computed by one rank; collective."""
    mine: dict[str, dict[str, int]] = {}
    with agreed(f"completing {folder}", group):
        ranks = world_size(group)
        for name in new_files(folder, since):
            if responsible(name, ranks) == rank(group):
                mine[name] = file_entry(folder / name, sync=True)
    return {name: entry for part in everyone_tells(mine, group) for name, entry in part.items()}


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
    """Check every file of a checkpoint against its manifest, on all ranks alike; collective.

    Each file is read by one rank, before anything of the running job has changed.

    Returns:
        The manifest, or None for a checkpoint without one (of stock Accelerate, or of an earlier version).

    Raises:
        CheckpointError: on all ranks, naming each file that is missing, truncated or changed.
    """
    folder = Path(folder)
    with agreed(f"reading {folder}", group):
        manifest = read_manifest(folder) if rank(group) == 0 else None
    manifest = rank_zero_tells(manifest, group)
    if manifest is None:
        return None
    ranks, me = world_size(group), rank(group)
    with agreed(f"checking {folder}", group):
        mine: Mapping[str, dict[str, int]] = {
            name: entry for name, entry in manifest.files.items() if responsible(name, ranks) == me
        }
        problems = check_sizes(folder, Manifest(files=dict(mine)))
        if not problems:
            for name, entry in mine.items():
                try:
                    found = file_entry(folder / name)
                except OSError as error:
                    problems.append(f"{folder / name} cannot be read ({error.strerror or error})")
                    continue
                if found != entry:
                    problems.append(f"{folder / name} was changed since it was saved (its checksum differs)")
        if problems:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {'; '.join(problems[:4])}"
                + (f" (and {len(problems) - 4} others)" if len(problems) > 4 else "")
                + ". Nothing was loaded. Resume from an earlier checkpoint."
            )
    return manifest
