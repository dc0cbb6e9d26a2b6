"""What sequence parallelism cannot rule out when a model is prepared: user hooks, and in-place changes in a trace.

* :func:`warn_of_hooks`: a user's hook that gets a sequence shard instead of the full sequence.
* :func:`note_version` and :func:`refuse_changed`: has an activation been changed in place since it was noted? A layer
  that reads the full sequence may give its gradient directly to the shard that was all-gathered, and skip the operators
  of the model in between. That is right if the model has not changed the tensor object, which it can only do in place.
  In eager mode the version counter of the tensor shows such a change. A compiled graph cannot depend on versions. But
  the fake implementation of an operator can read them, and it runs during the trace. The two operators here only do
  that. They have no result, so they are removed as dead code before the graph is compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import compat
from ..core.user_hooks import is_of_user
from ..errors import UnsupportedError

logger = logging.getLogger(__name__)


def warn_of_hooks(layers: Mapping[str, nn.Module], blocks: Iterable[str], size: int) -> None:
    """Log a warning on rank 0 for the first module that runs on sequence shards and has a hook of the user.

    Args:
        layers: the layers, by name.
        blocks: names of the modules inside of which the sequence is full; a hook on one of these itself sees shards.
        size: number of sequence shards.
    """
    for name, layer in layers.items():
        for path, module in layer.named_modules(prefix=name):
            if any(map(is_of_user, compat.hooks_on(module))) and not any(path.startswith(f"{b}.") for b in blocks):
                if dist.get_rank() == 0:
                    logger.warning(
                        "sequence_parallel=True: a hook on %s sees this rank's 1/%d of the sequence, and what it "
                        "computes from that enters the loss of this rank alone. For hidden states of the full sequence "
                        "use output_hidden_states=True, or sequence_parallel=False.",
                        path,
                        size,
                    )
                return


# ---- changes in place, in a trace ------------------------------------------------------------------------------------

_noted: dict[int, tuple[StorageWeakRef, int]] = {}


@torch.library.custom_op("hf_automodel_parallel::note_version", mutates_args=())
def _note(x: torch.Tensor) -> None:
    return None


@torch.library.custom_op("hf_automodel_parallel::refuse_changed", mutates_args=())
def _refuse(x: torch.Tensor) -> None:
    return None


@_note.register_fake
def _(x: torch.Tensor) -> None:
    for key, (storage, _version) in list(_noted.items()):
        if storage.expired():
            del _noted[key]
    storage = StorageWeakRef(x.untyped_storage())
    _noted[storage.cdata] = (storage, compat.version_of(x))


@_refuse.register_fake
def _(x: torch.Tensor) -> None:
    known = _noted.get(StorageWeakRef(x.untyped_storage()).cdata)
    if known is not None and known[1] != compat.version_of(x):
        raise UnsupportedError(
            "sequence_parallel=True with compile: a block changes its input in place before its layers read it, which "
            "it did not do when the model was prepared. Its gradient would be wrong. Change a copy of the input, or "
            "leave out compile."
        )


def note_version(x: torch.Tensor) -> None:
    """Remember the version of ``x`` while the compiler traces."""
    torch.ops.hf_automodel_parallel.note_version.default(x.detach())


def refuse_changed(x: torch.Tensor) -> None:
    """Compare the version of ``x`` with the one noted before, while the compiler traces.

    Raises:
        UnsupportedError: inside of the compiler's own error, if ``x`` has been changed in place since then.
    """
    torch.ops.hf_automodel_parallel.refuse_changed.default(x.detach())
