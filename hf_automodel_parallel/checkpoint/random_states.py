"""Restores random states: each rank's own on the same mesh, a defined state on any other mesh.

The ranks of a tp group share one random state; tp groups have different ones. So a checkpoint holds one state per *row*
of tp ranks. On the same mesh each rank gets its own state. On another mesh row i gets the state of row i. A new row,
beyond the saved ones, gets the state of row i modulo the number of saved rows, reseeded with a number drawn from it
plus i, so that all rows draw different numbers. All ranks of a row get the same state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

#: The names under which Accelerate and the Trainer save each state.
_NAMES = {
    "python": ("random_state", "python"),
    "numpy": ("numpy_random_seed", "numpy"),
    "cpu": ("torch_manual_seed", "cpu"),
    "cuda": ("torch_cuda_manual_seed", "cuda"),
}


@dataclass
class Origin:
    """Where a rank's random state comes from.

    Attributes:
        rank: the rank that saved the state.
        row: the row of this rank if the state has to be reseeded, else None.
    """

    rank: int
    row: int | None = None


def origin(rank: int, mesh: Mapping[str, int], saved_mesh: Mapping[str, int], saved_world: int) -> Origin:
    """The origin of the random state that ``rank`` of ``mesh`` restores.

    Args:
        rank: of this process.
        mesh: axis -> size, outermost first, tp innermost.
        saved_mesh: the mesh of the save, in the same form.
        saved_world: number of processes that saved.
    """
    tp, saved_tp = mesh.get("tp", 1), saved_mesh.get("tp", 1)
    row, rows = rank // tp, max(saved_world // saved_tp, 1)
    if tp == saved_tp and row < rows:
        return Origin(rank)
    return Origin(row % rows * saved_tp, row if row >= rows else None)


def restore(states: Mapping[str, Any], source: Origin, same_place: bool) -> None:
    """Set the random states of Python, numpy, torch and the accelerator.

    Args:
        states: the content of Accelerate's ``random_states_N.pkl`` or the Trainer's ``rng_state_N.pth``.
        source: from :func:`origin`.
        same_place: the state is this rank's own, so each device gets its own state if their number is the same.
    """
    found = {kind: states[name] for kind, names in _NAMES.items() for name in names if name in states}
    if "python" in found:
        version, content, gauss = found["python"]
        random.setstate((version, tuple(content), gauss))
    if "numpy" in found:
        numpy.random.set_state(found["numpy"])
    if "cpu" in found:
        torch.set_rng_state(found["cpu"])
    if "cuda" in found and torch.cuda.is_available():
        cuda = found["cuda"]
        if isinstance(cuda, torch.Tensor):
            torch.cuda.set_rng_state(cuda)
        elif same_place and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        else:
            torch.cuda.set_rng_state(cuda[source.rank % len(cuda)])
    if source.row is not None:
        seed = int(torch.randint(2**31, ()).item()) + source.row
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)  # of all devices
