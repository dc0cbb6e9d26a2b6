"""The source code of functions and classes, for checks of what one run of a model cannot show: its other branches."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any


@functools.lru_cache(maxsize=4096)
def source_of(definition: Any) -> str:
    """The source of a function, method or class; of a decorated one, that of the original.

    "" where there is no source (built in, compiled, typed into an interpreter), so that checks find nothing there.
    """
    try:
        return textwrap.dedent(inspect.getsource(definition))
    except (OSError, TypeError):
        return ""


def syntax_tree(definition: Any) -> ast.Module:
    """The syntax tree of :func:`source_of`; empty where the text alone is not Python (a lambda inside of a call)."""
    try:
        return ast.parse(source_of(definition))
    except SyntaxError:
        return ast.Module([], [])
