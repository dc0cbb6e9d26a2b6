"""Single files of a checkpoint: written to the disk or not at all, read without running code, named in errors."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from ..errors import CheckpointError, ExportError, without_stop
from .checksums import Checksums, VerifiedReader, create

#: Globals that unpickle numpy's numeric arrays: its random state and some state dicts have them.
_SAFE: list[Any] = [
    # The function that creates an empty array; the name of its module depends on numpy's version.
    numpy.array(0).__reduce__()[0],
    numpy.ndarray,
    numpy.dtype,
    *{
        type(numpy.dtype(name))
        for name in ("uint8", "uint32", "int32", "int64", "uint64", "float32", "float64", "bool")
    },
]


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block (no space left, read-only, ...) into a :class:`CheckpointError` with a path.

    torch reports a full disk as a ``RuntimeError`` of its archive writer without a file name, and ranks that do not
    write get an :class:`ExportError` without one. If the error names no file and ``path`` is a directory that several
    libraries write into, the message names the file that was modified last.
    """
    try:
        yield
    except ExportError as error:
        raise CheckpointError(f"cannot write {path}: {str(error).rstrip('.')}. The save was not completed.") from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise CheckpointError(
            f"cannot write {_written_last(path)}: {without_stop(error)}. The save was not completed."
        ) from error
    except OSError as error:
        where = error.filename or _written_last(path)
        raise CheckpointError(
            f"cannot write {where}: {error.strerror or error}. The save was not completed."
        ) from error


def _written_last(path: str | Path) -> str | Path:
    try:
        files = [found for found in Path(path).rglob("*") if found.is_file()] if Path(path).is_dir() else []
        return max(files, key=lambda found: found.stat().st_mtime_ns, default=path)
    except OSError:  # another rank deletes files at this moment
        return path


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file, flush it to the disk and rename it, so that ``path`` is never incomplete."""
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(path):
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Flush the entries of ``folder`` to the disk (renames survive a power cut), if the system supports that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def save_plain(value: Any, path: Path) -> None:
    """``torch.save`` that flushes to the disk and registers the checksums of the file.

    Raises:
        CheckpointError: the file cannot be written; names it.
    """
    with naming(path), create(path) as stream:
        torch.save(value, stream)


def load_plain(
    source: str | Path | BinaryIO | io.BytesIO,
    name: str | None = None,
    mmap: bool = False,
    checksums: Checksums | None = None,
) -> Any:
    """``torch.load(weights_only=True)`` that also accepts numpy's numeric arrays; tensors are on the CPU.

    Args:
        source: a path or an open stream.
        name: the name of the source in an error; None for its path.
        mmap: map tensors from the file instead of reading them; no effect with ``checksums``.
        checksums: of the file at the path ``source``, to verify it while it is read; None to skip that.

    Raises:
        CheckpointError: the file is missing or damaged, or holds more than tensors, numbers, strings and containers of
            them.
    """
    name = name or str(source)
    try:
        with torch.serialization.safe_globals(_SAFE):
            if checksums is not None:
                with VerifiedReader(Path(source), checksums) as stream:  # type: ignore[arg-type]
                    return torch.load(stream, map_location="cpu", weights_only=True)
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror or error}.") from error
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        unsafe = next(
            (line.strip() for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0] if reason else ""
        )
        raise CheckpointError(
            f"{name} holds more than tensors and plain values, or is damaged: {unsafe} Nothing of it was run. If it is "
            f"yours and names a class of yours, allow that with torch.serialization.add_safe_globals."
        ) from error
    except Exception as error:  # the errors of a damaged archive are not documented
        raise CheckpointError(f"{name} is damaged: {type(error).__name__}: {without_stop(error)}.") from error
