"""Writes safetensors files tensor by tensor: first the header, from shapes and dtypes, then each tensor at its offset.

``safetensors.torch.save_file`` needs all tensors of a file in memory, up to 50 GB by default. The format is simple
(https://github.com/huggingface/safetensors#format): the length of a JSON header in eight bytes, the header, the data.
Order of the tensors (by alignment, then name) and padding are those of the library, so files equal its files byte by
byte.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import UnsupportedError

#: Names of dtypes in the header.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
#: The library's enum of dtypes, ordered by alignment. Tensors of later dtypes come first in a file.
_ORDER = (
    "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 F16 BF16 I32 U32 F32 C64 "
    "F64 I64 U64"
).split()
#: Bytes written in one call, so that a slow file system does not copy an entire tensor.
_CHUNK = 64 * 2**20


class SafetensorsWriter:
    """A safetensors file whose tensors may be written in any order.

    Args:
        path: of the file to create.
        tensors: name -> (shape, dtype).
        metadata: key -> text, for the header.

    Raises:
        UnsupportedError: the format does not have a dtype.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.Size, torch.dtype]], metadata: Mapping[str, str] | None
    ) -> None:
        unknown = {str(dtype): name for name, (_, dtype) in tensors.items() if dtype not in DTYPE_NAMES}
        if unknown:
            raise UnsupportedError(
                f"{path.name}: safetensors files cannot hold {unknown} (dtype: a tensor that has it)."
            )
        self.path = path
        self._tensors = dict(tensors)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._offsets: dict[str, int] = {}
        position = 0
        for name in sorted(tensors, key=lambda n: (-_ORDER.index(DTYPE_NAMES[tensors[n][1]]), n)):
            shape, dtype = tensors[name]
            size = shape.numel() * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, position + size],
            }
            self._offsets[name] = position
            position += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The data begins at a multiple of eight bytes.
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self.missing = set(tensors)
        self._file: BinaryIO = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        # The full size at once: tensors may be written in any order.
        self._file.truncate(self._start + position)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Write ``value``, of the declared shape and dtype and on any device, at its offset.

        Raises:
            ValueError: another shape or dtype than declared.
        """
        shape, dtype = self._tensors[name]
        if value.shape != shape or value.dtype != dtype:
            raise ValueError(f"{name}: got {value.dtype} {tuple(value.shape)}, declared was {dtype} {tuple(shape)}")
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(self._start + self._offsets[name])
        for begin in range(0, flat.nbytes, _CHUNK):
            self._file.write(flat[begin : begin + _CHUNK].data)
        self.missing.discard(name)

    def close(self) -> None:
        """Flush the file to the disk and close it.

        Raises:
            ValueError: a declared tensor was not written.
        """
        if self.missing:
            self._file.close()
            raise ValueError(f"{self.path.name}: not written: {sorted(self.missing)}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file, complete or not."""
        self._file.close()
