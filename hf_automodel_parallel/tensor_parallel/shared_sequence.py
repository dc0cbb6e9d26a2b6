"""All-gathered sequences of one layer under sequence parallelism, and their copies to TP, for all its modules.

Two shortcuts make sequence parallelism cost what tensor parallelism alone costs (Korthikanti et al., 2022,
arXiv:2205.05198, section 4.2.2), and change no value. A column-wise layer that reads an all-gathered activation needs
no all-reduce in backward, because the reduce-scatter of the all-gather sums as well: its gradient goes to the shard
as Partial. A row-wise layer at the end of a block reduce-scatters in forward instead of all-reducing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .. import compat
from .boundary_hooks import ReduceOutput, SharedInputs
from .collectives import (
    copy_to_tp,
    gather_sequence,
    is_gathered,
    is_watched,
    partial_view,
    scatter_sequence,
    split_sequence,
    watched_view,
)
from .dropout_rng import TPRngTracker
from .saved_shards import SavedShards, same_storage, saving_shards
from .sequence_guards import note_version, refuse_changed

logger = logging.getLogger(__name__)


class SharedSequence(SharedInputs):
    """The sequences that one layer has all-gathered, and the length of the full sequence.

    Attributes:
        length: tokens of the full sequence while the layer works on sequence shards, else None.
        gathered: (shard, full) pairs; two blocks that read the same activation need one all-gather.
        again: under ``sequence_parallel_regather``, (full, its version, how to all-gather it again in backward) of a
            layer that is not compiled.
        numbers: the TP-local random numbers, None if the model draws none or is compiled.
    """

    def __init__(self, axis: DeviceMesh, regather: bool = False) -> None:
        super().__init__()
        self.group, self.rank, self.size = axis.get_group(), axis.get_local_rank(), axis.size()
        self.regather = regather
        self.again: list[tuple[torch.Tensor, int, SavedShards]] = []
        self.length: int | None = None
        self.gathered: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.numbers: TPRngTracker | None = None

    def run(self, length: int | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function``, which works on shards of a sequence of ``length``, with TP-local random numbers."""
        around, self.length = self.length, length
        self.draw_own()
        try:
            if self.regather:
                if not torch.compiler.is_compiling():
                    with saving_shards(self.source_of):
                        return function(*args, **kwargs)
                if not self.compiler_regathers:
                    _warn_of_foreign_compilation()
            return function(*args, **kwargs)
        finally:
            self.draw_common()
            self.length = around
            if around is None:
                self.clear()

    def resumed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.draw_common()  # so that the checkpoint saves, and its recomputation starts from, the common random state
        return functools.partial(self.run, self.length, function)

    def draw_own(self) -> None:
        """Draw TP-local random numbers from here on: activations are sequence shards."""
        if self.numbers is not None:
            self.numbers.enter()

    def draw_common(self) -> None:
        """Draw from the common random state of the tp ranks from here on: activations are full sequences."""
        if self.numbers is not None:
            self.numbers.leave()

    def gather(self, shard: torch.Tensor, writes: bool = False) -> torch.Tensor:
        """All-gather the full sequence ``(batch, length, ...)`` of ``shard``.

        The gradient of the result has to be complete on every rank.

        Args:
            shard: ``(batch, tokens, ...)``, or flat, ``(batch * tokens, width)``.
            writes: the caller changes the result in place. It gets a fresh tensor, and its column-wise layers take no
                shortcut to the shard past what it writes.
        """
        # A caller that writes needs memory that no other block reads.
        for known, full in self.gathered:
            if known is shard and not writes:
                return full
        length: int = self.length  # type: ignore[assignment]
        if shard.ndim == 2:  # flat: no shortcut, because the result is a view of the all-gathered tensor
            tokens = -(-length // self.size)
            shard = shard.reshape(-1, tokens, shard.shape[1])
            full = gather_sequence(shard, self.group, self.rank, self.size, length)
            self.note(shard, full, length)
            return full.flatten(0, 1)
        full = gather_sequence(shard, self.group, self.rank, self.size, length)
        if not writes:
            self.gathered.append((shard, full))
            if torch.compiler.is_compiling():
                note_version(full)
        self.note(shard, full, length)
        return full

    def note(self, shard: torch.Tensor, full: torch.Tensor, length: int) -> None:
        """Remember how to all-gather ``full`` again."""
        if not self.regather or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return

        def gather(shard: torch.Tensor) -> torch.Tensor:
            return gather_sequence(shard, self.group, self.rank, self.size, length)

        self.again.append((full, compat.version_of(full), SavedShards(shard, gather)))

    def source_of(self, tensor: torch.Tensor) -> SavedShards | None:
        """How to all-gather ``tensor`` again; None if it was not all-gathered, or has been changed in place since."""
        for full, version, source in self.again:
            if same_storage(tensor, full):
                return source if compat.version_of(full) == version else None
        return None

    def split(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's shard of ``full``, ``(batch, length, ...)`` or flat, ``(batch * length, width)``."""
        if full.ndim == 2:
            full = full.reshape(-1, self.length, full.shape[1])  # type: ignore[arg-type]
            return split_sequence(full, self.group, self.rank, self.size).flatten(0, 1)
        return split_sequence(full, self.group, self.rank, self.size)

    def copy(self, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """A copy to TP; of an all-gathered activation, one whose Partial gradient goes straight to the shard."""
        for _shard, full in self.gathered:
            if full is x and torch.compiler.is_compiling():
                refuse_changed(full)
        known = self.copied(x)
        if known is not None:
            return known
        for shard, full in self.gathered:
            if full is x and _is_unchanged(full) and (torch.compiler.is_compiling() or not is_watched(full)):
                return self.remember(x, partial_view(shard, full, self.group, self.size))
        return super().copy(x, group)

    def clear(self) -> None:
        super().clear()
        self.gathered.clear()
        self.again.clear()


@torch.compiler.assume_constant_result  # called once while the compiler traces, and not a part of the graph
def _warn_of_foreign_compilation() -> bool:
    if not _warned:
        _warned.append(True)
        logger.warning(
            "sequence_parallel_regather=True has no effect: the whole model was compiled after prepare, where the "
            "compiler is not told what to all-gather again. Results are right. Compile with compile=True in "
            "AutoParallelismConfig or with torch_compile=True in TrainingArguments instead of torch.compile(model)."
        )
    return True


_warned: list[bool] = []


class TailInputs(SharedInputs):
    """The same after the layers: the head reads the all-gathered hidden states, perhaps through a view of them."""

    def __init__(self, axis: DeviceMesh) -> None:
        super().__init__()
        self.size = axis.size()
        self.gathered: tuple[torch.Tensor, torch.Tensor] | None = None

    def copy(self, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        if self.gathered is not None and torch.is_grad_enabled() and _is_unchanged(self.gathered[1]):
            shard, full = self.gathered
            if torch.compiler.is_compiling():
                # Views are told by address below; a tensor in a trace has none.
                return partial_view(shard, x, group, self.size) if x is full else copy_to_tp(x, group)
            # The head usually reads hidden_states[:, slice(0, None)]: another object, the same values and history.
            if (x is full or _is_plain_view(x, full)) and not (is_watched(x) or is_watched(full)):
                return watched_view(shard, full, x, group, self.size)
        return copy_to_tp(x, group)

    def clear(self) -> None:
        super().clear()
        self.gathered = None


def _is_unchanged(full: torch.Tensor) -> bool:
    """False if the model has written into an all-gathered tensor, whose history then leads to more than the shard.

    While the compiler traces, :func:`refuse_changed` checks the same.
    """
    return torch.compiler.is_compiling() or full.grad_fn is None or is_gathered(full)


def _is_plain_view(x: torch.Tensor, full: torch.Tensor) -> bool:
    """True if ``x`` is all of ``full``, without a function of another backward (a scaled gradient) in between."""
    one, other = ((t.shape, t.stride(), t.dtype, t.data_ptr()) for t in (x, full))
    return one == other and x.numel() > 0 and compat.is_view_of(x, full)


class ScatterOutput(ReduceOutput):
    """Output hook of a row-wise layer that ends a block: reduce-scatter along the sequence, then add the bias."""

    def __init__(self, group: dist.ProcessGroup, bias_owner: nn.Module | None) -> None:
        super().__init__(group, bias_owner)
        self.shared: SharedSequence | None = None

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared
        if shared is None or shared.length is None:
            return super().reduce(x)
        shard = scatter_sequence(x, shared.group, shared.size)
        shared.draw_own()  # up to the end of the block, activations are sequence shards
        return shard
