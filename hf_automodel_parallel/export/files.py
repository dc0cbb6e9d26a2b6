"""Context managers for directories whose files appear when all of them are complete, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHARD = re.compile(r"(.*?)-\d{5}-of-\d{5}")
#: model.safetensors.index.json, or with a variant model.safetensors.index.fp8.json
_INDEX = re.compile(r"(.*)\.(safetensors|bin)\.index\.(?:(.*)\.)?json")


@contextmanager
def completed_at_end(directory: Path) -> Iterator[Path]:
    """A temporary directory inside ``directory``, whose files move up when the block ends without an error.

    An interrupted save does not touch the earlier files. A complete one removes weights of an earlier save that was
    split differently, and their index: ``from_pretrained`` would prefer an old single file to new shards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    incomplete = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=directory))
    try:
        yield incomplete
        _move(incomplete, directory)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


@contextmanager
def replaced_at_end(directory: Path) -> Iterator[Path]:
    """A temporary directory beside ``directory``, which replaces it when the block ends without an error."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    incomplete = Path(tempfile.mkdtemp(prefix=f".{directory.name}.incomplete-", dir=directory.parent))
    old = incomplete.with_name(incomplete.name.replace("incomplete", "replaced"))
    try:
        yield incomplete
        mode = os.umask(0)
        os.umask(mode)
        incomplete.chmod(0o777 & ~mode)  # mkdtemp creates it with access for the owner only
        # The old directory is deleted last, when the new one has its name.
        if directory.exists():
            directory.rename(old)
        incomplete.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    written = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    # The index moves last, so that a concurrent reader never finds an index without its shards.
    for path in sorted(written, key=lambda p: p.name.endswith(".index.json")):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / path, target / path)
    new = {path.name for path in written if len(path.parts) == 1}
    weights = {_weights_name(name) for name in new} - {None}
    for old in target.iterdir():
        if old.is_file() and old.name not in new and _weights_name(old.name) in weights:
            old.unlink()


def _weights_name(name: str) -> str | None:
    """The file name without shard number, equal for all shards and their index; None if it holds no weights."""
    index = _INDEX.fullmatch(name)
    if index is not None:
        return ".".join(part for part in (index[1], index[3], index[2]) if part)
    if not name.endswith((".bin", ".safetensors")):
        return None
    stem, _, extension = name.rpartition(".")
    match = _SHARD.fullmatch(stem)
    return f"{match[1] if match else stem}.{extension}"
