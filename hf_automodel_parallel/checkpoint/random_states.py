"""Random states: each rank's own on the mesh they were saved on, a defined one on any other.

The ranks of a tp group share one random state, the others have each their own. So what a checkpoint holds is one state
per *row* of tp ranks. On the same mesh each rank gets back its own. On another one, row i gets what row i had; a row
that did not exist then gets the state of row i modulo the number of old rows, reseeded with a number drawn from it plus
i, so that no two rows draw alike. All ranks of a row get the same.
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
        rank: the rank that saved it.
        row: this rank's row, if it has to be made different from that of the rank, else None.
    """

    rank: int
    row: int | None = None


def origin(rank: int, mesh: Mapping[str, int], saved_mesh: Mapping[str, int], saved_world: int) -> Origin:
    """Whose random state ``rank`` of ``mesh`` gets from a checkpoint of ``saved_world`` ranks on ``saved_mesh``.

    Args:
        rank: of this process.
        mesh: axis -> size, outermost first, tp innermost.
        saved_mesh: likewise, when it was saved.
        saved_world: number of processes then.
    """
    tp, saved_tp = mesh.get("tp", 1), saved_mesh.get("tp", 1)
    row, rows = rank // tp, max(saved_world // saved_tp, 1)
    if tp == saved_tp and row < rows:
        return Origin(rank)
    return Origin(row % rows * saved_tp, row if row >= rows else None)


def restore(states: Mapping[str, Any], source: Origin, same_place: bool) -> None:
    """Set the random states of Python, numpy, torch and the accelerator.

    Args:
        states: what Accelerate (``random_states_N.pkl``) or the Trainer (``rng_state_N.pth``) saves.
        source: from :func:`origin`.
        same_place: this rank saved it on the same number of devices, so that each device gets back its own.
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
