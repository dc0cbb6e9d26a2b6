"""Single files of a checkpoint: written completely or not at all, read without running code, named in every error."""

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

from ..errors import CheckpointError, ExportError
from .checksums import Checksums, VerifiedReader, create

#: Arrays of numbers, which numpy's random state and many a state dict contain.
_SAFE: list[Any] = [
    numpy.array(0).__reduce__()[
        0
    ],  # the function that makes an empty one; its module's name depends on numpy's version
    numpy.ndarray,
    numpy.dtype,
    *{
        type(numpy.dtype(name))
        for name in ("uint8", "uint32", "int32", "int64", "uint64", "float32", "float64", "bool")
    },
]


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block (no space left, read-only, ...) into a :class:`CheckpointError` with ``path``.

    torch's serialisation reports a full disk as a ``RuntimeError`` of its archive writer, without a name. The ranks
    that did not write get an :class:`ExportError` without one. Where ``path`` is a directory that several libraries
    write into and the error names no file, it is the one that was touched last.
    """
    try:
        yield
    except ExportError as error:
        raise CheckpointError(f"cannot write {path}: {str(error).rstrip('.')}. The save was not completed.") from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise CheckpointError(f"cannot write {_written_last(path)}: {error}. The save was not completed.") from error
    except OSError as error:
        where = error.filename or _written_last(path)
        raise CheckpointError(
            f"cannot write {where}: {error.strerror or error}. The save was not completed."
        ) from error


def _written_last(path: str | Path) -> str | Path:
    try:
        files = [found for found in Path(path).rglob("*") if found.is_file()] if Path(path).is_dir() else []
        return max(files, key=lambda found: found.stat().st_mtime_ns, default=path)
    except OSError:  # another rank is cleaning up
        return path


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file, flush it to the disk and rename it to ``path``: complete, or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(path):
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Let the names in ``folder`` survive a power cut, where the system can do that."""
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
    """``torch.save`` with the path in the error, on the disk when this returns."""
    with naming(path), create(path) as stream:
        torch.save(value, stream)


def load_plain(
    source: str | Path | BinaryIO | io.BytesIO,
    name: str | None = None,
    mmap: bool = False,
    checksums: Checksums | None = None,
) -> Any:
    """``torch.load(weights_only=True)`` that also takes numpy's arrays of numbers.

    Args:
        source: a path or an open stream.
        name: what to call it in an error; None for the path.
        mmap: map tensors from the file instead of reading them, if it is not verified.
        checksums: of the file at the path ``source``, which is verified while it is read; None to leave that out.

    Raises:
        CheckpointError: missing, damaged, or asks for something else than tensors, numbers, strings and containers of
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
    except Exception as error:  # what a damaged archive raises is not documented
        raise CheckpointError(f"{name} is damaged: {type(error).__name__}: {error}.") from error
