"""Imports of what a user names: modules, and objects by their path."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError


def import_modules(names: Iterable[str]) -> None:
    """Import the modules of ``--import``, for what their import registers.

    Raises:
        ConfigError: one cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # the user's module runs here, and may raise anything
            raise ConfigError(f"--import {name}: {error}.") from error


def import_object(path: str) -> Any:
    """The object at ``package.module:name`` or ``package.module.name``; the name may have dots behind a colon.

    Raises:
        ValueError: ``path`` names no module, or nothing in it.
        Exception: whatever the import of the module raises.
    """
    module, separator, name = path.partition(":")
    if not separator:
        module, _, name = path.rpartition(".")
    if not module or not name:
        raise ValueError(f"{path!r} names no module")
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value
