"""Where the prepared data loaders stand, which Accelerate's checkpoints do not hold.

A loader draws the order of an epoch when the epoch begins. A run that continues within an epoch repeats that draw and
skips what was seen (``accelerator.skip_first_batches``), so it needs the generator's state at the beginning of the
epoch; one that continues between two epochs needs the present one.

To begin an epoch draws a number from the common random state, too (torch's ``DataLoader`` seeds its workers), and so
may a data set that is read. The uninterrupted run has done both before it saved, so a run that continues within an
epoch goes back to the saved random state once the first batch has been read.
"""

from __future__ import annotations

import logging
import random
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ..checkpoint.files import load_plain, save_plain
from ..checkpoint.manifest import Manifest

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

FILE = "dataloader_shuffling.bin"

#: Where a loader keeps the state of its generator at the beginning of its epoch.
_START = "_automodel_parallel_epoch_start"
#: Marks a loader whose position comes from a checkpoint, until it is read.
_RESUMED = "_automodel_parallel_resumed"


def watch_epochs(loader: Any) -> None:
    """Note the state of the loader's generator at the beginning of each epoch."""
    if getattr(loader, "synchronized_generator", None) is None or _START in vars(loader):
        return

    def begin(self: Any) -> None:
        setattr(self, _START, self.synchronized_generator.get_state())
        type(self).begin(self)

    setattr(loader, _START, loader.synchronized_generator.get_state())
    loader.begin = types.MethodType(begin, loader)


def save_positions(accelerator: Accelerator, folder: Path) -> None:
    """Write the state of all prepared loaders; called on one rank (the ranks' generators are synchronised)."""
    positions = []
    for loader in accelerator._dataloaders:
        generator = getattr(loader, "synchronized_generator", None)
        running = [item for item in loader.gradient_state.dataloader_references if item is not None]
        within = any(getattr(item, "synchronized_generator", None) is generator for item in running)
        state = None
        if generator is not None:
            state = vars(loader).get(_START) if within else None
            state = generator.get_state() if state is None else state
        positions.append({"generator": state, "iteration": int(getattr(loader, "iteration", 0))})
    save_plain(positions, folder / FILE)


def load_positions(accelerator: Accelerator, folder: Path, manifest: Manifest | None = None) -> None:
    """Restore what :func:`save_positions` wrote; without it (stock checkpoints) the loaders stay as they are."""
    for loader in accelerator._dataloaders:
        setattr(loader, _RESUMED, True)
    if not (folder / FILE).is_file():
        return
    positions = load_plain(folder / FILE, checksums=None if manifest is None else manifest.checksums(FILE))
    if len(positions) != len(accelerator._dataloaders):
        logger.warning(
            "%s holds the shuffling of %d data loaders, %d are prepared now; theirs is left as it is",
            folder,
            len(positions),
            len(accelerator._dataloaders),
        )
        return
    for loader, position in zip(accelerator._dataloaders, positions, strict=True):
        generator = getattr(loader, "synchronized_generator", None)
        state = position["generator"]
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)
            setattr(loader, _START, state)
        if hasattr(loader, "iteration"):
            loader.iteration = position["iteration"]


def skip_first_batches(self: Accelerator, dataloader: Any, num_batches: int = 0) -> Any:
    """Like ``Accelerator.skip_first_batches``; after ``load_state`` the first batch comes with the saved random
    state.
    """
    skipped = type(self).skip_first_batches(self, dataloader, num_batches)
    if vars(dataloader).pop(_RESUMED, False) and num_batches > 0 and hasattr(skipped, "base_dataloader"):
        _keep_random_state(skipped.base_dataloader, getattr(skipped, "skip_batches", 0))
    return skipped


def _keep_random_state(loader: Any, first: int) -> None:
    """The first time that ``loader`` is read, undo what was drawn until batch ``first`` is there."""

    def read_once() -> Iterator[Any]:
        del loader.__iter__
        states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        for index, batch in enumerate(loader):
            if index == first:
                random.setstate(states[0])
                numpy.random.set_state(states[1])
                torch.set_rng_state(states[2])
            yield batch

    loader.__iter__ = read_once  # Accelerate's loader calls it by name
