"""Where the shuffling of the prepared data loaders stands, which Accelerate's checkpoints do not hold.

A loader draws the order of an epoch when the epoch begins. A run that continues within an epoch repeats that draw and skips what
was seen (``accelerator.skip_first_batches``), so it needs the generator's state at the beginning of the epoch; one that continues
between two epochs needs the present one.
"""

from __future__ import annotations

import logging
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.files import load_plain, save_plain

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

FILE = "dataloader_shuffling.bin"

#: Where a loader keeps the state of its generator at the beginning of its epoch.
_START = "_automodel_parallel_epoch_start"


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


def load_positions(accelerator: Accelerator, folder: Path) -> None:
    """Restore what :func:`save_positions` wrote; nothing happens without it (stock checkpoints)."""
    if not (folder / FILE).is_file():
        return
    positions = load_plain(folder / FILE)
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
