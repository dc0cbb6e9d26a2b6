"""Asynchronous saves (``async_save``): one thread per process, one save at a time."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..core.ranks import known_to_all
from ..errors import CheckpointError

logger = logging.getLogger(__name__)

_thread: threading.Thread | None = None
_error: list[BaseException] = []
# Keyed by the default group, so that a new one (after destroy and init) gets a new group for saves.
_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def background_group() -> Any:
    """The process group of background saves: gloo, separate from those of training. The first call is collective.

    Returns:
        The group; None in a process without a process group.
    """
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo")
    return _groups[world]


def start(work: Callable[[], None]) -> None:
    """Run ``work`` in a thread after the previous save has ended.

    Raises:
        CheckpointError: the previous save failed; on all ranks.
    """
    global _thread
    wait_for_saves()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            logger.error("a checkpoint was not completed: %s", error)
            _error.append(error)

    _finish_at_exit()
    _thread = threading.Thread(target=run, name="checkpoint")  # not a daemon: the interpreter waits for it
    _thread.start()


def wait_for_saves() -> None:
    """Wait for the background save (``async_save=True``), if there is one.

    Called before the next save, before a load, at the end of ``Trainer.train`` and by ``Accelerator.end_training``.

    Raises:
        CheckpointError: it failed; on all ranks.
    """
    global _thread
    thread, _thread = _thread, None
    if thread is not None:
        thread.join()
    if _error:
        error = _error.pop()
        _error.clear()
        raised = CheckpointError(f"the last checkpoint, saved in the background, was not completed: {error}")
        raise known_to_all(raised) from error


_registered = False


def _finish_at_exit() -> None:
    """Join the thread at exit, before the process group is destroyed. ``start`` has logged a failure already."""
    global _registered
    if _registered:
        return
    _registered = True

    def wait() -> None:
        if _thread is not None:
            _thread.join()

    atexit.register(wait)
