"""Objects by their dotted names, as configs and command lines give them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError


def import_class_from_path(name: str) -> Any:
    """Import ``package.module.Class`` (also nested: ``package.module.Class.Inner``, and ``package.module:Class``).

    Raises:
        ConfigError: (a ``ValueError``) ``name`` is no dotted path.
        ImportError, AttributeError: of Python, if there is no such module, or nothing of that name in it.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{name!r} is no import path; give a string such as 'torch.optim.AdamW'.")
    module_name, separator, attribute = name.partition(":")
    parts = attribute.split(".") if separator else []
    if not separator:
        *path, last = name.split(".")
        module_name, parts = ".".join(path), [last]
    if not module_name or not all(parts):
        raise ConfigError(
            f"{name!r} is no import path; give one with a module and a name in it, such as 'torch.optim.AdamW'."
        )
    while True:
        try:
            value: Any = importlib.import_module(module_name)
            break
        except ModuleNotFoundError as error:
            # The last part of the module may be a class; any other module that is missing is an error of that import.
            parent, _, last = module_name.rpartition(".")
            if separator or not parent or error.name != module_name or not last[:1].isupper():
                raise
            module_name, parts = parent, [last, *parts]
    for part in parts:
        value = getattr(value, part)
    return value


def import_classes_from_paths(class_paths: Iterable[str] | None) -> list[Any]:
    """Import every path of ``class_paths``, in order; one that fails raises, because it names something that is to be
    sharded.

    Raises:
        ConfigError: (a ``ValueError`` whose cause is Python's error) the message names the path that failed.
    """
    if class_paths is None or isinstance(class_paths, str):
        raise ConfigError(f"class_paths={class_paths!r}: give a list of import paths, [] for none.")
    classes = []
    for path in class_paths:
        try:
            classes.append(import_class_from_path(path))
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"class_paths: importing {path!r} failed: {error}. Correct or remove it.") from error
    return classes
