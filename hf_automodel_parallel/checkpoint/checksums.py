"""CRC-32 of files, computed while they are written and verified while they are read.

No file is read back after a save or before a load: :func:`create` counts the bytes on their way to the disk, and
:class:`VerifiedReader` checks each block of a file when it is read from it. Blocks, because a rank reads only the
chunks that it needs; a checksum of the entire file could not tell it whether these are good.
"""

from __future__ import annotations

import functools
import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError

#: Bytes with a checksum of their own.
BLOCK = 1 << 22
#: Blocks that a reader keeps: torch's archives are read at their end, then from their start, and neighbours share one.
_KEPT = 4


@dataclass(frozen=True)
class Checksums:
    """Size and CRC-32 of one file.

    Attributes:
        size: in bytes.
        crc32: of the entire file.
        block_size: bytes of each block but the last.
        blocks: CRC-32 of each block, four bytes each, big endian; empty where only the entire file has one.
    """

    size: int
    crc32: int
    block_size: int = BLOCK
    blocks: bytes = b""

    def block(self, index: int) -> int:
        """CRC-32 of block ``index``."""
        return int.from_bytes(self.blocks[4 * index : 4 * index + 4], "big")


# ---- writing -------------------------------------------------------------------------------------------------------

#: Files that this process has written and no manifest lists yet: absolute path -> checksums, time of change.
#: A registry, because Accelerate and the Trainer stand between the save and the code that writes its files.
_written: dict[str, tuple[Checksums, int]] = {}


class ChecksumWriter(io.RawIOBase):
    """Passes bytes on to a file and computes their checksums. Sequential only; on the disk when it is closed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = self._crc32 = self._block_crc32 = self._in_block = 0
        self._blocks = bytearray()

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        rest = view
        while len(rest):
            part = rest[: BLOCK - self._in_block]
            self._block_crc32 = zlib.crc32(part, self._block_crc32)
            self._in_block += len(part)
            if self._in_block == BLOCK:
                self._end_block()
            rest = rest[len(part) :]
        return len(view)

    def _end_block(self) -> None:
        self._crc32 = concatenated(self._crc32, self._block_crc32, self._in_block)
        self._blocks += self._block_crc32.to_bytes(4, "big")
        self._size += self._in_block
        self._block_crc32 = self._in_block = 0

    def checksums(self) -> Checksums:
        """Of what was written; ends the file."""
        if self._in_block:
            self._end_block()
        return Checksums(self._size, self._crc32, BLOCK, bytes(self._blocks))

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size + self._in_block

    def fileno(self) -> int:
        """Of the file."""
        return self._file.fileno()

    def flush(self) -> None:
        """Pass Python's buffer on to the system."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Wait until the bytes are on the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()


@contextmanager
def create(path: Path) -> Iterator[Any]:
    """Create the file ``path`` with a :class:`ChecksumWriter`; then :func:`take_written` has its checksums."""
    with path.open("wb") as file:
        stream = ChecksumWriter(file)
        yield stream
        stream.close()
    record_written(path, stream.checksums())


def record_written(path: Path, checksums: Checksums) -> None:
    """Remember the ``checksums`` of a file that was just written, for the manifest of the save that is under way."""
    _written[os.path.abspath(path)] = checksums, path.stat().st_mtime_ns


def renamed(path: Path, new: Path) -> None:
    """A file that :func:`create` has written has another name now."""
    if (entry := _written.pop(os.path.abspath(path), None)) is not None:
        _written[os.path.abspath(new)] = entry


def take_written(path: Path) -> Checksums | None:
    """The checksums of a file that this process has written; None if it did not, or the file was changed since."""
    checksums, changed = _written.pop(os.path.abspath(path), (None, 0))
    found = path.stat()
    if checksums is None or (checksums.size, changed) != (found.st_size, found.st_mtime_ns):
        return None
    return checksums


def read_back(path: Path, sync: bool = False) -> Checksums:
    """Size and checksum of a file that a library has written, from its bytes; with ``sync`` wait until it is on the
    disk.
    """
    size = crc32 = 0
    with path.open("rb") as stream:
        while data := stream.read(BLOCK):
            size += len(data)
            crc32 = zlib.crc32(data, crc32)
        if sync:
            os.fsync(stream.fileno())
    return Checksums(size, crc32)


# ---- reading -------------------------------------------------------------------------------------------------------


class VerifiedReader(io.RawIOBase):
    """A file open for reading at any position; each block is compared with its checksum when it is read from the disk.

    Use it as a context: torch's archive reader replaces an error of the read by one of its own.

    Raises:
        CheckpointError: from a read, and at the end of the context, if a block was changed or the file has become
            shorter.
    """

    def __init__(self, path: Path, checksums: Checksums) -> None:
        self._path, self._checksums = path, checksums
        self._file = path.open("rb", buffering=0)
        self._position = 0
        self._blocks: OrderedDict[int, memoryview] = OrderedDict()
        self._error: CheckpointError | None = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
        if self._error is not None:
            raise self._error

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._checksums.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``, up to the end of the file."""
        view = memoryview(buffer).cast("B")
        view = view[: max(self._checksums.size - self._position, 0)]
        done = 0
        while done < len(view):
            index, start = divmod(self._position, self._checksums.block_size)
            length = min(self._checksums.block_size, self._checksums.size - (self._position - start))
            target = view[done : done + length - start]
            if len(target) == length and index not in self._blocks:
                self._read_block(index, target)  # all of a block: straight to where it belongs
            else:
                target[:] = self._block(index, length)[start : start + len(target)]
            done += len(target)
            self._position += len(target)
        return done

    def _block(self, index: int, length: int) -> memoryview:
        if index not in self._blocks:
            block = memoryview(bytearray(length))
            self._read_block(index, block)
            self._blocks[index] = block
            if len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(index)
        return self._blocks[index]

    def _read_block(self, index: int, target: memoryview) -> None:
        self._file.seek(index * self._checksums.block_size)
        done = 0
        while done < len(target) and (count := self._file.readinto(target[done:])):
            done += count
        if done < len(target) or zlib.crc32(target) != self._checksums.block(index):
            self._error = CheckpointError(
                f"{self._path} was changed since it was saved (its checksum differs). A part of the checkpoint may be "
                f"loaded already: do not train on with it, resume from an earlier checkpoint."
            )
            raise self._error

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def concatenated(first: int, second: int, length: int) -> int:
    """CRC-32 of the concatenation of two byte strings, from the CRC-32 of each and the ``length`` of the second.

    zlib's ``crc32_combine``, which Python does not offer. A CRC is linear over GF(2): appending zero bytes is a matrix,
    and the one for 2n bytes is the square of the one for n.
    """
    bit = 0
    while length >> bit:
        if length >> bit & 1:
            first = _times(_zeros(bit), first)
        bit += 1
    return first ^ second


@functools.cache
def _zeros(bit: int) -> list[int]:
    """The matrix that appends ``2**bit`` zero bytes, as its 32 columns."""
    if bit == 0:
        return [zlib.crc32(b"\0", 1 << column) ^ zlib.crc32(b"\0") for column in range(32)]
    half = _zeros(bit - 1)
    return [_times(half, column) for column in half]


def _times(matrix: list[int], vector: int) -> int:
    result = 0
    for column in matrix:
        if vector & 1:
            result ^= column
        vector >>= 1
    return result
