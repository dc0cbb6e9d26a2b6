"""Data loaders, schedulers and gathered metrics by data-parallel rank, where Accelerate goes by process.

All ranks of a tp group read the same batches, and all ranks of a cp group the same rows.
:data:`.methods.BOUND_METHODS` binds these functions on an ``Accelerator`` instance.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.data_loader import IterableDatasetShard
from accelerate.scheduler import AcceleratedScheduler
from torch.utils.data import IterableDataset, RandomSampler

from ..context_parallel.buffers import check_whole
from ..errors import ConfigError
from .hooks import hooks_of
from .last_batch import fill_up, rows_over_all_ranks
from .sampler_state import watch_epochs

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def prepare_data_loader(
    self: Accelerator, data_loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
) -> Any:
    """Like ``Accelerator.prepare_data_loader``, but under tp or cp each rank reads an iterable dataset itself.

    Accelerate dispatches an ``IterableDataset`` from rank 0 by default, and its dispatcher refuses a mesh with both tp
    and data-parallel axes.

    Raises:
        ConfigError: ``dispatch_batches=True`` under tensor or context parallelism.
    """
    shared = self.parallelism_config.tp_enabled or self.parallelism_config.cp_enabled  # type: ignore[union-attr]
    dispatch = self.dispatch_batches
    if shared and dispatch:
        raise ConfigError(
            "dispatch_batches=True does not know tensor and context parallelism: it would send different data to the "
            "ranks of one tp or cp group. Leave it out; every rank then reads the data set itself."
        )
    if shared and dispatch is None and isinstance(getattr(data_loader, "dataset", None), IterableDataset):
        # For this loader only: the setting belongs to the Accelerator and is restored below.
        self.dataloader_config.dispatch_batches = False
    try:
        loader = type(self).prepare_data_loader(self, data_loader, device_placement, slice_fn_for_dispatch)
    finally:
        self.dataloader_config.dispatch_batches = dispatch
    _count_samples(loader)
    if shared and self.parallelism_config.data_parallel_size == 1:  # type: ignore[union-attr]
        _shuffle_alike(loader)
    watch_epochs(loader)
    return loader


def _shuffle_alike(loader: Any) -> None:
    """Synchronise the generator of the sampler over all ranks at the start of each epoch.

    Accelerate does so only with several data-parallel ranks. With one, the ranks of a tp or cp group would shuffle by
    their own seeds and read different batches.
    """
    from accelerate.data_loader import DataLoaderShard, SeedableRandomSampler, get_sampler

    sampler = get_sampler(loader) if isinstance(loader, DataLoaderShard) else None
    if not isinstance(sampler, RandomSampler) or isinstance(sampler, SeedableRandomSampler):
        return
    if sampler.generator is None:
        sampler.generator = torch.Generator()
        sampler.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    loader.synchronized_generator = sampler.generator
    loader.rng_types = [*(loader.rng_types or ()), "generator"]


class _Counted(IterableDataset):
    """An iterable dataset that counts what it yields.

    Attributes:
        samples: the number of samples of the last complete pass, -1 before. Shared with a loader's worker process.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.samples = dataset, torch.tensor(-1).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for sample in self.dataset:
            count += 1
            yield sample
        self.samples.fill_(count)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet: while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _count_samples(loader: Any) -> None:
    """Let an iterable dataset that is sharded over ranks be counted, so that what fills up the last batch is known.

    Its length is not known before. Several workers each fill up a last batch of their own.
    """
    shard = getattr(loader, "dataset", None)
    if isinstance(shard, IterableDatasetShard) and not shard.drop_last and getattr(loader, "num_workers", 0) <= 1:
        if not isinstance(shard.dataset, _Counted):
            shard.dataset = _Counted(shard.dataset)


def _rows_in_last_batch(accelerator: Accelerator) -> int:
    """The number of rows in the last batch over all ranks that are not repeated; 0 if all, or nobody knows."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader:
        return 0
    shard = getattr(state.active_dataloader, "dataset", None)
    if isinstance(shard, IterableDatasetShard) and isinstance(shard.dataset, _Counted):
        count = int(shard.dataset.samples)
        return max(count, 0) % (shard.batch_size * (1 if shard.split_batches else shard.num_processes))
    rows = rows_over_all_ranks(getattr(state.active_dataloader, "batch_sampler", None))
    return max(state.remainder or 0, 0) if rows is None else rows


class _DataParallelScheduler(AcceleratedScheduler):
    """Advances once per data-parallel rank and optimizer step.

    Stock Accelerate steps a scheduler once per process. The ranks of a tp or cp group train on one batch, so its
    schedules would advance tp x cp times too fast.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Any,
        step_with_optimizer: bool,
        split_batches: bool,
        ranks: int,
        processes: int,
    ) -> None:
        self.repeats = 1 if split_batches else ranks
        self.limited = not split_batches  # stop silently at the end of a OneCycleLR, like Accelerate
        self.processes = 0 if split_batches else processes
        super().__init__(scheduler, optimizers, step_with_optimizer, split_batches=True)  # True: one step per call

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the wrapped scheduler once per data-parallel rank; once in all if it is not tied to the optimizer."""
        # During gradient accumulation super().step() only counts, which must happen once.
        tied = self.step_with_optimizer and self.gradient_state.sync_gradients
        self._say_when_it_ends()
        for _ in range(self.repeats if tied else 1):
            total = getattr(self.scheduler, "total_steps", None)
            # A OneCycleLR raises beyond total_steps; several steps per call may cross that limit.
            if tied and self.limited and total is not None and self.scheduler._step_count > total:
                return
            super().step(*args, **kwargs)

    def _say_when_it_ends(self) -> None:
        """Warn once if the length of the schedule may have been multiplied by all processes instead of the ranks.

        A length that was counted in batches of the unprepared loader is right. Scripts that multiply a number of
        optimizer steps by ``accelerator.num_processes`` mean the ranks that share the data. Both are multiples of it.
        """
        (length, warmup), processes = _planned_steps(self.scheduler), self.processes
        self.processes = 0
        if not processes or not self.step_with_optimizer or processes == self.repeats or dist.get_rank() != 0:
            return
        for steps, verb in ((length, "ends"), (warmup, "has warmed up")):
            if not steps or steps % processes:
                continue
            logger.warning(
                "The schedule %s after %d steps of its own and advances by %d per optimizer step (once per "
                "data-parallel rank), so it %s after %d optimizer steps. If this number was multiplied by "
                "accelerator.num_processes (%d), it was meant to be %d optimizer steps: multiply by "
                "accelerator.parallelism_config.data_parallel_size (%d) instead, the length and the warm-up alike.",
                verb,
                steps,
                self.repeats,
                verb,
                steps // self.repeats,
                processes,
                steps // processes,
                self.repeats,
            )
            return


def _planned_steps(scheduler: Any) -> tuple[int | None, int | None]:
    """The length of a schedule and of its warm-up; None if it has none, or hides it."""
    for functions in getattr(scheduler, "lr_lambdas", ()):
        keywords = getattr(functions, "keywords", {})  # of transformers' get_scheduler
        lengths = [keywords.get(name) for name in ("num_training_steps", "num_warmup_steps")]
        if any(isinstance(length, int) for length in lengths):
            return lengths[0], lengths[1]
    lengths = [getattr(scheduler, name, None) for name in ("total_steps", "T_max", "total_iters")]
    return next((length for length in lengths if isinstance(length, int)), None), None


def prepare_scheduler(self: Accelerator, scheduler: Any) -> Any:
    """Like ``Accelerator.prepare_scheduler``; the scheduler advances once per data-parallel rank."""
    result = type(self).prepare_scheduler(self, scheduler)
    if not isinstance(result, AcceleratedScheduler) or isinstance(result, _DataParallelScheduler):
        return result
    paced = _DataParallelScheduler(
        result.scheduler,
        result.optimizers,
        result.step_with_optimizer,
        self.split_batches,
        self.parallelism_config.data_parallel_size,  # type: ignore[union-attr]
        self.state.num_processes,
    )
    # Stock has just appended its own wrapper.
    self._schedulers[-1] = paced
    return paced


def gather(self: Accelerator, tensor: Any) -> Any:
    """Like ``Accelerator.gather``, but in a script without a Trainer the samples of a tp group once.

    Scripts cut what they have gathered to the number of samples (``samples_seen``). The Trainer knows about tp, and
    divides by its size what it has gathered. Under cp each rank's part is kept. A tensor without dimensions is one of
    the process and not a sample: scripts divide its sum by ``num_processes``, which counts tp, so each is kept.
    A Trainer that counts data-parallel ranks as processes gets what each of them has, once.
    """
    from accelerate.utils.operations import recursively_apply

    tensor = fill_up(self, tensor)
    gathered = type(self).gather(self, tensor)
    ranks = self.state.num_processes
    if hooks_of(self).ranks_once:
        return each_once(gathered, ranks, copies_of_each_batch(self))
    tp = self.parallelism_config.tp_size  # type: ignore[union-attr]
    if tp == 1 or hooks_of(self).gathers_by_process:
        return gathered
    given: list[torch.Tensor] = []  # in the order in which recursively_apply visits them

    def visit(x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        return x

    recursively_apply(visit, tensor)
    visited = iter(given)

    def once(x: torch.Tensor) -> torch.Tensor:
        if next(visited).ndim == 0:
            return x
        return _per_rank(x, ranks)[::tp].flatten(0, 1)

    return recursively_apply(once, gathered)


def copies_of_each_batch(accelerator: Accelerator) -> int:
    """The number of ranks that have the same rows: tp x cp, the innermost axes of the mesh."""
    config: Any = accelerator.parallelism_config
    return int(accelerator.state.num_processes // config.data_parallel_size)


def each_once(gathered: Any, ranks: int, copies: int) -> Any:
    """Of what was gathered over ``ranks`` processes, of which ``copies`` adjacent ones have the same, each once."""
    from accelerate.utils.operations import recursively_apply

    return recursively_apply(lambda x: _per_rank(x, ranks)[::copies].flatten(0, 1), gathered)


def _per_rank(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """What was gathered over ``ranks`` processes along the first dimension, with a dimension for the process."""
    return x.reshape(ranks, x.shape[0] // ranks, *x.shape[1:])


def gather_for_metrics(self: Accelerator, input_data: Any, use_gather_object: bool = False) -> Any:
    """Like ``Accelerator.gather_for_metrics``, but each sample once, although all ranks of a tp and cp group hold it.

    Raises:
        UnsupportedError: the results differ within a cp group, because they were computed on sequence shards.
    """
    from accelerate.utils import gather_object
    from accelerate.utils.operations import recursively_apply

    tensors = not use_gather_object
    if tensors:
        try:
            recursively_apply(lambda x: x, input_data, error_on_other_type=True)
        except TypeError:
            tensors = False
    copies = copies_of_each_batch(self)
    tp = self.parallelism_config.tp_size  # type: ignore[union-attr]
    if tensors:
        gathered = type(self).gather(self, fill_up(self, input_data))

        def once(x: torch.Tensor) -> torch.Tensor:
            # tp and cp are the innermost mesh axes: every `copies` adjacent ranks have the same samples.
            per_rank = _per_rank(x, self.state.num_processes)
            # Under cp: one tp rank of each cp rank, to find results that were computed on sequence shards.
            if copies > tp:
                check_whole(per_rank.unflatten(0, (-1, copies))[:, ::tp])
            return per_rank[::copies].flatten(0, 1)

        data = recursively_apply(once, gathered)
    else:
        data = [item for objects in gather_object([input_data])[::copies] for item in objects]
    # Accelerate fills up the last batch with samples from the start of the data set; drop these.
    rows = _rows_in_last_batch(self)
    if rows == 0:
        return data
    return data[:rows] if not tensors else recursively_apply(lambda x: x[:rows], data)
