"""CRC-32 of files, computed while they are written and verified while they are read.

Large files are not read twice, neither after a save nor before a load. :func:`create` computes checksums of the bytes
that are written, and :class:`VerifiedReader` verifies each block when it is read. Checksums are per block, because a
rank reads only the chunks that it needs and could not verify these with a checksum of the entire file.
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

#: Size in bytes of a block, the unit that has a checksum.
BLOCK = 1 << 22
#: Blocks in a reader's cache: torch reads archives at the end, then from the start, and neighbouring tensors share one.
_KEPT = 4
#: Bytes of the buffer for small reads and writes. Larger ones go to the destination at once.
_BUFFER = 1 << 13


@dataclass(frozen=True)
class Checksums:
    """Size and CRC-32 of one file.

    Attributes:
        size: in bytes.
        crc32: CRC-32 of the entire file.
        block_size: bytes of each block except the last.
        blocks: CRC-32 of each block, four bytes each, big endian; empty if only the entire file has a checksum.
    """

    size: int
    crc32: int
    block_size: int = BLOCK
    blocks: bytes = b""

    def block(self, index: int) -> int:
        """CRC-32 of block ``index``."""
        return int.from_bytes(self.blocks[4 * index : 4 * index + 4], "big")


# ---- writing -------------------------------------------------------------------------------------------------------

#: Files that this process has written and no manifest lists yet: absolute path -> (checksums, st_mtime_ns).
#: A registry, because Accelerate and the Trainer call the code that writes files, and return no checksums.
_written: dict[str, tuple[Checksums, int]] = {}


class ChecksumWriter(io.RawIOBase):
    """A stream that writes to a file and computes checksums. Sequential only; ``close`` flushes to the disk."""

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
        """Checksums of all bytes written. Ends the last block, so nothing may be written afterwards."""
        if self._in_block:
            self._end_block()
        return Checksums(self._size, self._crc32, BLOCK, bytes(self._blocks))

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size + self._in_block

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._file.fileno()

    def flush(self) -> None:
        """Flush Python's buffer to the operating system."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Flush the bytes to the disk and close the file."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()


@contextmanager
def create(path: Path) -> Iterator[Any]:
    """Create the file ``path`` through a :class:`ChecksumWriter`; :func:`take_written` then returns its checksums."""
    with path.open("wb") as file:
        stream = ChecksumWriter(file)
        # torch writes a few bytes at a time, about 40 times for each tensor: collected in C instead of in Python.
        buffered = io.BufferedWriter(stream, _BUFFER)
        yield buffered
        buffered.close()
    record_written(path, stream.checksums())


def record_written(path: Path, checksums: Checksums) -> None:
    """Register the ``checksums`` of a file that was just written, for the manifest of the current save."""
    _written[os.path.abspath(path)] = checksums, path.stat().st_mtime_ns


def renamed(path: Path, new: Path) -> None:
    """Register that a file written by :func:`create` was renamed."""
    if (entry := _written.pop(os.path.abspath(path), None)) is not None:
        _written[os.path.abspath(new)] = entry


def take_written(path: Path) -> Checksums | None:
    """Checksums of a file that this process has written, once; None if it has not, or the file was changed since."""
    # Size and time are compared because a library may have written the file again by name.
    checksums, changed = _written.pop(os.path.abspath(path), (None, 0))
    found = path.stat()
    if checksums is None or (checksums.size, changed) != (found.st_size, found.st_mtime_ns):
        return None
    return checksums


def read_back(path: Path, sync: bool = False) -> Checksums:
    """Size and CRC-32 of a file, by reading it. With ``sync``, flush it to the disk, too."""
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
    """A seekable file for reading that verifies the checksum of each block when it reads the block from the disk.

    Use it as a context manager: torch's archive reader replaces an error of a read by its own, so ``__exit__`` raises
    the original one again.

    Raises:
        CheckpointError: from a read, and at the end of the context, if a block was changed or the file was truncated.
    """

    def __init__(self, path: Path, checksums: Checksums) -> None:
        self._path, self._checksums = path, checksums
        self._file = path.open("rb", buffering=0)
        self._position = 0
        self._blocks: OrderedDict[int, memoryview] = OrderedDict()
        self._error: CheckpointError | None = None

    def __enter__(self) -> Any:
        # torch asks for a few bytes at a time, about 20 times for each tensor: in C instead of in Python.
        return io.BufferedReader(self, _BUFFER)

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
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position."""
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
                self._read_block(index, target)  # an entire block: read it in place, without the cache
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
    """CRC-32 of the concatenation of two byte strings, from the CRC-32 of each and the second's ``length`` in bytes.

    Equals zlib's ``crc32_combine``, which Python does not expose. A CRC is linear over GF(2): appending n zero bytes is
    a matrix, and the matrix for 2n zero bytes is its square.
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
