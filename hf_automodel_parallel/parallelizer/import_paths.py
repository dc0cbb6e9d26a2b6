"""Import objects by dotted names from configs and command lines."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError, without_stop


def import_class_from_path(name: str) -> Any:
    """Import ``package.module.Class`` (also nested: ``package.module.Class.Inner``, and ``package.module:Class``).

    Raises:
        ConfigError: (a ``ValueError``) ``name`` is not a dotted path.
        ImportError, AttributeError: Python's own, if the module does not exist or does not have the name.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{name!r} is not an import path; give a string such as 'torch.optim.AdamW'.")
    module_name, separator, attribute = name.partition(":")
    parts = attribute.split(".") if separator else []
    if not separator:
        *path, last = name.split(".")
        module_name, parts = ".".join(path), [last]
    if not module_name or not all(parts):
        raise ConfigError(
            f"{name!r} is not an import path; give one with a module and a name in it, such as 'torch.optim.AdamW'."
        )
    while True:
        try:
            value: Any = importlib.import_module(module_name)
            break
        except ModuleNotFoundError as error:
            # The last component may be an outer class instead of a module. Another missing module means that the
            # imported module itself fails on an import: raise that error.
            parent, _, last = module_name.rpartition(".")
            if separator or not parent or error.name != module_name or not last[:1].isupper():
                raise
            module_name, parts = parent, [last, *parts]
    for part in parts:
        value = getattr(value, part)
    return value


def import_classes_from_paths(class_paths: Iterable[str] | None) -> list[Any]:
    """Import all paths of ``class_paths`` and return the objects in order.

    An import that fails raises instead of being skipped: the classes name modules to be sharded, and without one the
    model would be sharded differently without a message.

    Raises:
        ConfigError: (a ``ValueError`` with Python's error as its cause) an import failed; the message names its path.
    """
    if class_paths is None or isinstance(class_paths, str):
        raise ConfigError(f"class_paths={class_paths!r}: give a list of import paths, [] for none.")
    classes = []
    for path in class_paths:
        try:
            classes.append(import_class_from_path(path))
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"class_paths: importing {path!r} failed: {without_stop(error)}. Correct or remove it."
            ) from error
    return classes
