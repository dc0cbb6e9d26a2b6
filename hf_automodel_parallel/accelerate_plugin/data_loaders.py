"""Data loaders, schedulers and gathered metrics by data-parallel rank, where Accelerate goes by process.

All ranks of a tp group read the same batches, and all ranks of a cp group the same rows.
:data:`.methods.BOUND_METHODS` binds these functions on an ``Accelerator`` instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch.utils.data import IterableDataset, RandomSampler

from ..context_parallel.buffers import check_whole
from ..errors import ConfigError
from .sampler_state import watch_epochs

if TYPE_CHECKING:
    from accelerate import Accelerator


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


class _DataParallelScheduler(AcceleratedScheduler):
    """Advances once per data-parallel rank and optimizer step.

    Stock Accelerate steps a scheduler once per process. The ranks of a tp or cp group train on one batch, so its
    schedules would advance tp x cp times too fast.
    """

    def __init__(self, scheduler: Any, optimizers: Any, step_with_optimizer: bool, split_batches: bool, ranks: int):
        self.repeats = 1 if split_batches else ranks
        self.limited = not split_batches  # stop silently at the end of a OneCycleLR, like Accelerate
        super().__init__(scheduler, optimizers, step_with_optimizer, split_batches=True)  # True: one step per call

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the wrapped scheduler once per data-parallel rank; once in all if it is not tied to the optimizer."""
        # During gradient accumulation super().step() only counts, which must happen once.
        tied = self.step_with_optimizer and self.gradient_state.sync_gradients
        for _ in range(self.repeats if tied else 1):
            total = getattr(self.scheduler, "total_steps", None)
            # A OneCycleLR raises beyond total_steps; several steps per call may cross that limit.
            if tied and self.limited and total is not None and self.scheduler._step_count > total:
                return
            super().step(*args, **kwargs)


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
    )
    # Stock has just appended its own wrapper.
    self._schedulers[-1] = paced
    return paced


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
    copies = self.num_processes // self.parallelism_config.data_parallel_size  # type: ignore[union-attr]
    tp = self.parallelism_config.tp_size  # type: ignore[union-attr]
    if tensors:
        whole = self.gather(input_data)

        def once(x: torch.Tensor) -> torch.Tensor:
            # tp and cp are the innermost mesh axes: every `copies` adjacent ranks have the same samples.
            per_rank = x.reshape(self.num_processes, x.shape[0] // self.num_processes, *x.shape[1:])
            # Under cp: one tp rank of each cp rank, to find results that were computed on sequence shards.
            if copies > tp:
                check_whole(per_rank.unflatten(0, (-1, copies))[:, ::tp])
            return per_rank[::copies].flatten(0, 1)

        data = recursively_apply(once, whole)
    else:
        data = [item for objects in gather_object([input_data])[::copies] for item in objects]
    # Accelerate fills up the last batch with samples from the start of the data set; drop these.
    remainder = self.gradient_state.remainder if self.gradient_state.end_of_dataloader else 0
    if remainder is None or remainder <= 0:
        return data
    return data[:remainder] if not tensors else recursively_apply(lambda x: x[:remainder], data)
