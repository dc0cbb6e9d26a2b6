"""The record of what was tried: modeling code of known releases, and the plans that compute what one process does.

``make record`` (``tests/sweep/record.py``) tries each plan as :mod:`.proof` does, and writes ``proven_record.json``:

* ``files``: name of a Python module of transformers -> digest of its source -> the releases that have it;
* ``plans``: name of the Python module of a layer's class -> digests of its source with the entries for its layers that
  were proven;
* ``untried``: the same, of plans that a tiny proxy model cannot try; each with the reason.

A source is known by its text without comments and blank lines. So another release with the same modeling code is known,
too, and one with other code is tried at ``prepare``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..core.model_view import pattern_regex
from ..core.sharding_spec import Plan

#: Where the record is.
RECORD = Path(__file__).with_name("proven_record.json")


@functools.cache
def record() -> dict[str, Any]:
    """The record, as this module's text describes it."""
    return json.loads(RECORD.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def is_recorded(model: nn.Module, plan: Plan, modules: Iterable[str]) -> bool:
    """True if ``plan`` was tried with the code of ``model`` when this package was made. Takes milliseconds.

    Args:
        model: the model, unwrapped.
        plan: its plan.
        modules: names of transformers' Python modules whose code it runs.
    """
    known = record()
    if any(source_digest(name) not in known["files"].get(name, {}) for name in modules):
        return False
    tables = known["plans"], known["untried"]
    return all(
        any(digest in table.get(name, ()) for table in tables)
        for name, digest in layer_plans(model, plan)
        if name.startswith("transformers.")  # layers of other libraries are trusted, those of the user's own are tried
    )


def source_digest(name: str) -> str:
    """The :func:`file_digest` of the imported Python module ``name``."""
    return file_digest(getattr(sys.modules.get(name), "__file__", None) or "")


@functools.cache
def file_digest(path: str) -> str:
    """A digest of the source in a file; "" if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = (line.rstrip() for line in text.splitlines())
    return _digest("\n".join(line for line in lines if line and not re.match(r"\s*#", line)))


def layer_plans(model: nn.Module, plan: Plan) -> list[tuple[str, str]]:
    """For each stack of layers: the Python module of their class, and a digest of its source and the plan's entries."""
    stacks: dict[str, list[str]] = {}
    for pattern, entry in plan.entries.items():
        stack, star, inside = pattern.partition(".*.")
        if star:
            stacks.setdefault(stack, []).append(f"{inside}: {entry.style_name}")
    names = [name for name, _ in model.named_modules()]
    found = []
    for stack, entries in stacks.items():
        regex = pattern_regex(f"{stack}.*")
        layers = [model.get_submodule(name) for name in names if regex.fullmatch(name)]
        for module in sorted({type(layer).__module__ for layer in layers}):
            found.append((module, _digest("\n".join([source_digest(module), *sorted(entries)]))))
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
