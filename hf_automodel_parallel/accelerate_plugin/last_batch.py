"""The last batch of an evaluation without the samples that fill it up.

Accelerate fills up the last batches with samples from the start of the data set, so that all ranks get as many.
``gather_for_metrics`` drops their rows. But a loss is a mean over the batch, with them in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import BatchSamplerShard

if TYPE_CHECKING:
    from accelerate import Accelerator


class _OwnRows(BatchSamplerShard):
    """A batch sampler of one rank whose last batch has only samples of that rank's own.

    A rank whose last batch would be empty gets the filled one: all ranks run the same number of forwards. Its rows are
    behind all others, so ``gather_for_metrics`` drops them, and the Trainer its loss.
    """

    def __iter__(self) -> Iterator[Any]:
        if not self.rows_over_all_ranks():
            yield from super().__iter__()
            return
        last, own = len(self) - 1, self._rows_of_last_batch()
        for position, batch in enumerate(super().__iter__()):
            yield batch[:own] if own > 0 and position == last else batch

    def rows_over_all_ranks(self) -> int:
        """The number of samples in the last batches that are not repeated; 0 if all, or nobody knows."""
        return rows_over_all_ranks(self) or 0

    def _rows_of_last_batch(self) -> int:
        """The number of samples in this rank's last batch that are not repeated; 0 or less if all or none."""
        left = self.rows_over_all_ranks() - _rows(self) * self.process_index
        return left if left < _rows(self) else 0


def rows_over_all_ranks(batches: Any) -> int | None:
    """The number of samples in the last batches of all ranks that are not repeated; 0 if all, None if nobody knows.

    Accelerate goes by the length of the data set, of which a sampler may take a part, or a part several times. A
    subclass of torch's batch sampler may make other batches of its sampler.
    """
    shard = batches if isinstance(batches, BatchSamplerShard) else None
    whole = batches if shard is None else shard.batch_sampler
    if type(whole) is not torch.utils.data.BatchSampler or not isinstance(whole.sampler, Sized):
        return None
    if shard is None:
        return 0 if whole.drop_last else len(whole.sampler) % whole.batch_size
    if shard.batch_size is None or not shard.even_batches:
        return None
    return 0 if shard.drop_last else len(whole.sampler) % (_rows(shard) * shard.num_processes)


def _rows(shard: BatchSamplerShard) -> int:
    return int(shard.batch_size // shard.num_processes if shard.split_batches else shard.batch_size)


@contextmanager
def own_rows(data_loader: Any) -> Iterator[None]:
    """Let the last batch of a prepared loader have only this rank's own samples, inside of this context."""
    shard = getattr(data_loader, "batch_sampler", None)
    if type(shard) is not BatchSamplerShard:
        yield
        return
    shard.__class__ = _OwnRows
    try:
        yield
    finally:
        shard.__class__ = BatchSamplerShard


def ranks_have_unequal_rows(accelerator: Accelerator) -> bool:
    """True, on all ranks, in a last batch inside of :func:`own_rows` that would have been filled up."""
    state = accelerator.gradient_state
    shard = getattr(state.active_dataloader, "batch_sampler", None)
    return state.end_of_dataloader and isinstance(shard, _OwnRows) and shard.rows_over_all_ranks() > 0


def fill_up(accelerator: Accelerator, data: Any) -> Any:
    """Repeat the last row of each tensor until all ranks have as many rows, if ranks have unequal ones.

    Collective where :func:`ranks_have_unequal_rows`.
    """
    from accelerate.utils.operations import recursively_apply

    if not ranks_have_unequal_rows(accelerator):
        return data
    rows: list[int] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape[0] if x.ndim else 0)
        return x

    recursively_apply(note, data)
    counts = torch.tensor([rows], device=accelerator.device)
    most = iter(type(accelerator).gather(accelerator, counts).amax(0).tolist())

    def fill(x: torch.Tensor) -> torch.Tensor:
        wanted = next(most)
        if x.ndim == 0 or x.shape[0] in (0, wanted):
            return x
        return torch.cat([x, x[-1:].expand(wanted - x.shape[0], *x.shape[1:])])

    return recursively_apply(fill, data)
