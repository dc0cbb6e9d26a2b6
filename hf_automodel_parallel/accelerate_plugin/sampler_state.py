"""The shuffling state of prepared data loaders, which Accelerate's checkpoints do not hold.

A loader draws the order of an epoch when the epoch begins. A run that resumes within an epoch repeats that draw and
skips the batches that were seen (``accelerator.skip_first_batches``). So it needs the generator's state at the
beginning of the epoch. A run that resumes between two epochs needs the current state.

Beginning an epoch also draws a number from the global random state (torch's ``DataLoader`` seeds its workers), and
reading a data set may draw more. The uninterrupted run had done both before it saved. So a run that resumes within an
epoch restores the saved random state after the first batch has been read.
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

#: Attribute of a loader: the generator's state at the beginning of the epoch.
_START = "_automodel_parallel_epoch_start"
#: Attribute of a loader: its position comes from a checkpoint, and it was not read since.
_RESUMED = "_automodel_parallel_resumed"


def watch_epochs(loader: Any) -> None:
    """Save the state of the loader's generator at the beginning of each epoch, on the loader."""
    if getattr(loader, "synchronized_generator", None) is None or _START in vars(loader):
        return

    def begin(self: Any) -> None:
        setattr(self, _START, self.synchronized_generator.get_state())
        type(self).begin(self)

    # For a save before the first epoch begins.
    setattr(loader, _START, loader.synchronized_generator.get_state())
    loader.begin = types.MethodType(begin, loader)


def save_positions(accelerator: Accelerator, folder: Path) -> None:
    """Write the shuffling state of all prepared loaders. One rank calls it: the ranks' generators are synchronised."""
    positions = []
    for loader in accelerator._dataloaders:
        generator = getattr(loader, "synchronized_generator", None)
        # A loader that is being read is in the middle of an epoch.
        running = [item for item in loader.gradient_state.dataloader_references if item is not None]
        within = any(getattr(item, "synchronized_generator", None) is generator for item in running)
        state = None
        if generator is not None:
            state = vars(loader).get(_START) if within else None
            state = generator.get_state() if state is None else state
        positions.append({"generator": state, "iteration": int(getattr(loader, "iteration", 0))})
    save_plain(positions, folder / FILE)


def load_positions(accelerator: Accelerator, folder: Path, manifest: Manifest | None = None) -> None:
    """Restore what :func:`save_positions` wrote. Stock checkpoints lack the file; then the loaders are unchanged."""
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
    """Like ``Accelerator.skip_first_batches``; after ``load_state``, the global random state is the saved one when the
    first batch has been read.
    """
    skipped = type(self).skip_first_batches(self, dataloader, num_batches)
    if vars(dataloader).pop(_RESUMED, False) and num_batches > 0 and hasattr(skipped, "base_dataloader"):
        _keep_random_state(skipped.base_dataloader, getattr(skipped, "skip_batches", 0))
    return skipped


def _keep_random_state(loader: Any, first: int) -> None:
    """In the first iteration of ``loader``, undo the random draws made up to batch ``first``."""

    def read_once() -> Iterator[Any]:
        # Only the first iteration: later epochs begin as in the uninterrupted run.
        del loader.__iter__
        states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        for index, batch in enumerate(loader):
            if index == first:
                random.setstate(states[0])
                numpy.random.set_state(states[1])
                torch.set_rng_state(states[2])
            yield batch

    loader.__iter__ = read_once  # on the instance: Accelerate's loader calls __iter__ by name
