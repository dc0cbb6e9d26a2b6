"""A directory that gets its files at the end, all of them or none."""

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
    """A temporary directory inside ``directory``, whose files move there when the block has ended well.

    An interrupted save leaves what was there before. Weights of an earlier save in another number of files are removed
    with their index (transformers removes the shards): ``from_pretrained`` would read a single old file rather than new
    shards.
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
    """A temporary directory beside ``directory``, which takes its place when the block has ended well."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    incomplete = Path(tempfile.mkdtemp(prefix=f".{directory.name}.incomplete-", dir=directory.parent))
    old = incomplete.with_name(incomplete.name.replace("incomplete", "replaced"))
    try:
        yield incomplete
        mode = os.umask(0)
        os.umask(mode)
        incomplete.chmod(0o777 & ~mode)  # mkdtemp's is for its owner alone
        if directory.exists():
            directory.rename(old)
        incomplete.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    written = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    # An index comes last: whoever reads the directory meanwhile finds an index that fits the shards, or none of the
    # new.
    for path in sorted(written, key=lambda p: p.name.endswith(".index.json")):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / path, target / path)
    new = {path.name for path in written if len(path.parts) == 1}
    weights = {_weights_name(name) for name in new} - {None}
    for old in target.iterdir():
        if old.is_file() and old.name not in new and _weights_name(old.name) in weights:
            old.unlink()


def _weights_name(name: str) -> str | None:
    """What a file of weights and all shards and the index of the same weights have in common; None for other files."""
    index = _INDEX.fullmatch(name)
    if index is not None:
        return ".".join(part for part in (index[1], index[3], index[2]) if part)
    if not name.endswith((".bin", ".safetensors")):
        return None
    stem, _, extension = name.rpartition(".")
    match = _SHARD.fullmatch(stem)
    return f"{match[1] if match else stem}.{extension}"
