"""The source code of functions and classes. Checks read it, because one run of a model shows only one branch."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any


@functools.lru_cache(maxsize=4096)
def source_of(definition: Any) -> str:
    """Return the source of a function, method or class; for a decorated one the source of the original.

    Returns "" if there is no source (built-in, compiled, typed into an interpreter).
    """
    try:
        return textwrap.dedent(inspect.getsource(definition))
    except (OSError, TypeError):
        return ""


def syntax_tree(definition: Any) -> ast.Module:
    """Return the syntax tree of :func:`source_of`; empty if the text does not parse on its own (a lambda in a call)."""
    try:
        return ast.parse(source_of(definition))
    except SyntaxError:
        return ast.Module([], [])
