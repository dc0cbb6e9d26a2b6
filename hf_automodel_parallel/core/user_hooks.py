"""Whose hook is it? Hooks of the user and hooks of libraries on modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

#: Attribute of a hook that may see this rank's part of sharded activations, because it changes nothing.
SEES_SHARDS = "sees_shards"

_LIBRARIES = frozenset(
    [__name__.partition(".")[0], "torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes"]
)


def is_of_user(hook: Callable[..., Any]) -> bool:
    """True if neither this package nor a library that knows what it hooks has made ``hook``.

    False also for a hook with the attribute ``sees_shards = True``, by which the user says that it may see shards.
    """
    if getattr(_unwrapped(hook), SEES_SHARDS, False):
        return False
    return _module_of(hook).partition(".")[0] not in _LIBRARIES


def hook_name(hook: Callable[..., Any]) -> str:
    """``hook`` as an error names it: module and qualified name."""
    hook = _unwrapped(hook)
    return f"{_module_of(hook)}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"


def _module_of(hook: Callable[..., Any]) -> str:
    hook = _unwrapped(hook)
    return getattr(hook, "__module__", None) or type(hook).__module__


def _unwrapped(hook: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook
