"""Staging, commit and rollback of a checkpoint directory, and the choice of the checkpoint to resume from.

* :func:`stage` writes the mark ``checkpoint_incomplete.json``. It renames the files of a complete checkpoint in the
  same directory to ``.previous/`` below it, as a backup.
* :func:`commit` writes the manifest, atomically and last. Then the directory is complete, and mark and backup are
  deleted.
* :func:`roll_back` restores the backup after an error.

A job that is killed at any time leaves the last complete checkpoint on the disk; mark and manifest show the state of
each directory. The Trainer and Accelerate choose the directory and write into it themselves, so a save cannot be staged
in another directory and renamed.

:func:`last_complete_checkpoint` and :func:`to_load` choose a directory to load from; :func:`rotate` deletes old ones.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.ranks import broadcast_object, rank
from ..errors import CheckpointError, without_stop
from .files import naming, write_atomically
from .manifest import (
    MANIFEST,
    MARK,
    PREVIOUS,
    STATE_NAMES,
    Manifest,
    add_new_files,
    check_sizes,
    holds_a_save,
    read_manifest,
    write_manifest,
)
from .steps import checkpoint_step

logger = logging.getLogger(__name__)

#: Phase in the mark. Marks are on users' disks, so the text must not change.
_BACKING_UP = "setting aside"
_NUMBERED = re.compile(r"^checkpoint[-_](\d+)$")


@dataclass
class Status:
    """Status of a checkpoint directory.

    Attributes:
        folder: the directory.
        kind: "complete", "incomplete", "damaged" or "unverified" (without manifest: from stock Accelerate or an earlier
            version).
        reason: why ``folder`` cannot be used; empty if it can.
        usable: the directory to load from: ``folder``, or the backup below it; None if there is neither.
    """

    folder: Path
    kind: str
    reason: str = ""
    usable: Path | None = None


def status(folder: str | Path) -> Status:
    """The status of ``folder``, from its mark, its manifest and the sizes of its files. Not collective."""
    folder = Path(folder)
    own = _own_status(folder)
    if own.usable is None and (folder / PREVIOUS).is_dir():
        previous = _own_status(folder / PREVIOUS)
        if previous.usable is not None:
            own.usable = previous.usable
    return own


def _own_status(folder: Path) -> Status:
    if not folder.is_dir():
        return Status(folder, "incomplete", "there is no such directory")
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return Status(folder, "damaged", str(error))
    # The manifest decides, also beside a mark: commit() writes it before it deletes the mark.
    if manifest is not None:
        problems = check_sizes(folder, manifest)
        if problems:
            return Status(folder, "damaged", problems[0])
        return Status(folder, "complete", usable=folder)
    if (folder / MARK).exists():
        return Status(folder, "incomplete", f"its save was interrupted: it has a {MARK} and no {MANIFEST}")
    if holds_a_save(folder):
        return Status(folder, "unverified", usable=folder)
    return Status(folder, "incomplete", "it is empty")


# ---- saving --------------------------------------------------------------------------------------------------------


@dataclass
class StagedSave:
    """A save between :func:`stage` and :func:`commit`.

    Attributes:
        folder: absolute path.
        since: ``st_mtime_ns`` of the mark, in nanoseconds of the file system's clock; older files are not of this save.
    """

    folder: Path
    since: int


def stage(folder: str | Path, group: Any = None) -> StagedSave:
    """Mark ``folder`` as incomplete and back up a checkpoint in it; collective.

    Raises:
        CheckpointError: on all ranks: the directory cannot be written to. Its content is unchanged.
    """
    folder = Path(folder).absolute()  # a background save must not follow a change of the working directory
    since = 0
    with checkpoint_step(f"saving to {folder}", group):
        if rank(group) == 0:
            since = _stage(folder)
    return StagedSave(folder, broadcast_object(since, group))


def _stage(folder: Path) -> int:
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _recover_backup(folder)
        if _own_status(folder).usable is not None:
            # From the phase a later run knows that the files are a complete checkpoint, spread over two directories.
            _mark(folder, _BACKING_UP)
            _back_up(folder)
        else:
            _remove_partial_files(folder)
        _mark(folder, "writing")
        (folder / MANIFEST).unlink(missing_ok=True)  # of a damaged one
        return (folder / MARK).stat().st_mtime_ns


def _mark(folder: Path, phase: str) -> None:
    content = {"phase": phase, "begun": time.time(), "host": platform.node()}
    write_atomically(folder / MARK, json.dumps(content).encode())


def _recover_backup(folder: Path) -> None:
    """Undo a :func:`_back_up` in which a job was killed: the files are still a complete checkpoint."""
    try:
        phase = json.loads((folder / MARK).read_text(encoding="utf-8")).get("phase")
    except (OSError, ValueError):
        return
    if phase == _BACKING_UP and not (folder / MANIFEST).exists():
        _restore_backup(folder)


def _back_up(folder: Path) -> None:
    """Move the files of a usable checkpoint to :data:`PREVIOUS`, the manifest first.

    The order matters after a crash in between: ``folder`` has no manifest, so it does not count as complete. Each file
    is in one of the two directories, and :func:`_restore_backup` joins them.
    """
    previous = folder / PREVIOUS
    if previous.exists():
        shutil.rmtree(previous)
    previous.mkdir()
    manifest = read_manifest(folder)
    if manifest is not None:
        (folder / MANIFEST).rename(previous / MANIFEST)
        names = list(manifest.files)
    else:
        # Only training state. An exported model in the same directory stays: no save replaces it.
        names = [name for name in os.listdir(folder) if STATE_NAMES.match(name)]
    for name in names:
        (previous / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(previous / name)


def _restore_backup(folder: Path) -> bool:
    """Undo :func:`_back_up`, after a failed save or a crash; False if there is no backup."""
    previous = folder / PREVIOUS
    if not previous.is_dir():
        return False
    manifest = read_manifest(previous)
    names = list(manifest.files) if manifest is not None else [n for n in os.listdir(previous) if n != MANIFEST]
    for name in names:
        # A crash may have left only some of the files in the backup.
        if (previous / name).exists():
            target = folder / name
            if target.is_dir():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            (previous / name).replace(target)
    # The manifest last: only then is `folder` complete.
    if manifest is not None:
        (previous / MANIFEST).replace(folder / MANIFEST)
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(previous, ignore_errors=True)
    return True


def _remove_partial_files(folder: Path) -> None:
    """Delete large files of an interrupted save: the next save's manifest would list what is left of them."""
    if not (folder / MARK).exists():
        return
    for name in os.listdir(folder):
        if name.startswith(("pytorch_model_fsdp", "optimizer")):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def commit(save: StagedSave, manifest: Manifest, group: Any = None) -> None:
    """List all files in the manifest, write it, and delete mark and backup; collective.

    Raises:
        CheckpointError: on all ranks; the directory stays marked as incomplete.
    """
    add_new_files(manifest, save.folder, save.since, group)
    with checkpoint_step(f"completing {save.folder}", group):
        if rank(group) == 0:
            # In this order: a crash after the first line leaves a complete checkpoint.
            write_manifest(save.folder, manifest)
            with naming(save.folder):
                (save.folder / MARK).unlink()
                shutil.rmtree(save.folder / PREVIOUS, ignore_errors=True)


def roll_back(save: StagedSave, group: Any = None) -> None:
    """After a failed save, delete its large files and restore the backup; without a backup the mark stays.

    Not collective; rank 0 does it. Its own errors are logged, so that the error of the save is raised.
    """
    if rank(group) != 0 or (save.folder / MANIFEST).exists():  # the save is complete: a later step failed
        return
    try:
        _remove_partial_files(save.folder)
        if _restore_backup(save.folder):
            logger.warning("the save to %s failed; the previous checkpoint of that name was restored", save.folder)
    except (OSError, CheckpointError) as error:
        logger.warning(
            "the save to %s failed, and the previous checkpoint of that name could not be restored (%s); it is in %s",
            save.folder,
            error,
            save.folder / PREVIOUS,
        )


# ---- choosing ------------------------------------------------------------------------------------------------------


def numbered(folder: str | Path) -> list[Path]:
    """The directories ``checkpoint-N`` or ``checkpoint_N`` in ``folder``, the highest number first."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = [(int(match[1]), name) for name in names if (match := _NUMBERED.match(name))]
    return [Path(folder) / name for _, name in sorted(found, reverse=True) if (Path(folder) / name).is_dir()]


def last_complete_checkpoint(folder: str | Path, group: Any = None) -> Path | None:
    """The checkpoint to resume from: the last complete one among ``folder/checkpoint-N`` (or ``checkpoint_N``).

    Collective: rank 0 looks and broadcasts its answer. The log names skipped checkpoints with the reason. A checkpoint
    without a manifest counts, with a warning, unless a mark says that its save was interrupted.

    Returns:
        Its path; None if there is none to resume from.

    Examples:
        >>> last = last_complete_checkpoint("out/checkpoints")
        >>> if last is not None:
        ...     accelerator.load_state(str(last))
    """
    chosen: Path | None = None
    with checkpoint_step(f"looking for checkpoints in {folder}", group):
        if rank(group) == 0:
            for path in numbered(folder):
                # A job may have been killed while it moved a complete checkpoint to its backup.
                _try_to_recover(path)
                found = status(path)
                if found.kind != "complete":
                    logger.warning(
                        "%s %s",
                        path,
                        f"is {found.kind}: {found.reason}"
                        if found.reason
                        else "has no manifest, so it is not known to be complete",
                    )
                if found.usable is not None:
                    chosen = found.usable
                    break
            if chosen is not None:
                logger.warning("resuming from the last complete checkpoint, %s", chosen)
    return broadcast_object(chosen, group)


def _try_to_recover(folder: Path) -> None:
    try:
        _recover_backup(folder)
    except (OSError, CheckpointError) as error:
        logger.warning("the backup in %s cannot be restored: %s", folder, error)


def to_load(folder: str | Path, group: Any = None) -> Path:
    """The directory to load from when the user names ``folder``; collective.

    Raises:
        CheckpointError: on all ranks: there is nothing to load. Names the reason and the last complete checkpoint
            beside it.
    """
    folder = Path(folder)
    answer: Path | None = None
    with checkpoint_step(f"loading {folder}", group):
        if rank(group) == 0:
            _try_to_recover(folder)
            found = status(folder)
            answer = found.usable
            if answer is None:
                others = [status(path) for path in numbered(folder.parent) if path != folder]
                last = next((other.usable for other in others if other.usable is not None), None)
                raise CheckpointError(
                    f"the checkpoint {folder} is {found.kind}: {without_stop(found.reason)}."
                    + (f" The last complete one beside it is {last}." if last is not None else "")
                )
            if found.kind == "unverified":
                logger.warning(
                    "%s has no %s: it was saved by stock Accelerate or an earlier version, and it is not known "
                    "whether it is complete",
                    folder,
                    MANIFEST,
                )
            elif answer != folder:
                logger.warning(
                    "%s is %s (%s); loading the previous checkpoint of that name, %s",
                    folder,
                    found.kind,
                    found.reason,
                    answer,
                )
    return broadcast_object(answer, group)  # type: ignore[return-value]


def _by_time(folders: list[Path]) -> list[Path]:
    """``folders`` by modification time, the newest first.

    In the given order if all times are within one second: cloud file systems may not keep them.
    """
    times: dict[Path, float] = {}
    for path in folders:
        try:
            times[path] = path.stat().st_mtime
        except OSError:
            pass  # another job has just deleted it
    folders = list(times)
    if not times or max(times.values()) - min(times.values()) < 1.0:
        return folders
    return sorted(folders, key=times.__getitem__, reverse=True)


def rotate(folder: str | Path, limit: int | None, keep: set[Path]) -> list[Path]:
    """Delete old checkpoints in ``folder`` until ``limit`` are left, unusable ones first. Not collective.

    Oldest first by modification time, as in transformers: a run may restart with lower numbers beside an earlier run.
    Never deletes the last complete checkpoint or those in ``keep``.

    Args:
        folder: holds the checkpoints.
        limit: how many to keep; None or 0 for any number.
        keep: the checkpoint that was just completed, and the best one.

    Returns:
        The deleted directories.
    """
    if limit is None or limit <= 0:
        return []
    found = [status(path) for path in _by_time(numbered(folder))]
    usable = [item for item in found if item.usable is not None]
    protected = {path.resolve() for path in keep} | {item.folder.resolve() for item in usable[:1]}
    order = [item for item in found if item.usable is None][::-1] + usable[::-1]
    deleted: list[Path] = []
    for item in order:
        if len(found) - len(deleted) <= limit:
            break
        if item.folder.resolve() not in protected:
            shutil.rmtree(item.folder, ignore_errors=True)
            deleted.append(item.folder)
    return deleted
