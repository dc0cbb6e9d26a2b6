"""Trainers that generate their batches (TRL's GRPO, RLOO, distillation): each data-parallel rank counts once.

Such a Trainer gathers rewards over all processes, puts them into groups and takes its own slice by ``process_index``.
All ranks of a tp or cp group have the same rows. So groups would hold copies, standard deviations and numbers of tokens
would be those of copies, and a generation batch would have more prompts than the data-parallel ranks generate for.

While such a Trainer makes a batch or computes a loss, its ``Accelerator`` numbers the data-parallel ranks, and what is
gathered has each of them once. The functions ``gather`` and ``gather_object`` are imported by name, so they are
replaced where the modules of the Trainer's own packages have them, for that time.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import accelerate.utils
from torch.utils.data import Sampler
from transformers import Trainer

from ..accelerate_plugin.data_loaders import copies_of_each_batch, each_once
from ..accelerate_plugin.hooks import hooks_of
from .rollout_weights import bind_rollouts

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

#: Packages whose functions go by process.
_LIBRARIES = {"accelerate", "transformers", "torch", "builtins", "hf_automodel_parallel"}


def generates_batches(cls: type) -> bool:
    """Whether a class of Trainers makes its batches itself from those of the data loader."""
    return cls._prepare_inputs is not Trainer._prepare_inputs  # type: ignore[attr-defined]


class CountsRanksOnce(Trainer):
    """Stands in front of a class for which :func:`generates_batches` is true."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        bind_rollouts(self)
        with ranks_once(self):
            return super()._prepare_inputs(inputs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with ranks_once(self):
            return super().compute_loss(*args, **kwargs)

    def get_tp_size(self) -> int:
        """Like the Trainer's; code that divides ``num_processes`` by it gets the data-parallel ranks either way."""
        return 1 if hooks_of(self.accelerator).ranks_once else int(super().get_tp_size())

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        with ranks_once(self):
            return super()._get_train_sampler(*args, **kwargs)


@contextmanager
def ranks_once(trainer: Any) -> Iterator[None]:
    """Let ``trainer`` see the data-parallel ranks as the processes, inside of this context."""
    hooks, copies = hooks_of(trainer.accelerator), copies_of_each_batch(trainer.accelerator)
    if copies == 1 or hooks.ranks_once:
        yield
        return
    places = _places(type(trainer), trainer.accelerator, copies)
    hooks.ranks_once = True
    for namespace, name, _, once in places:
        namespace[name] = once
    try:
        yield
    finally:
        hooks.ranks_once = False
        for namespace, name, original, _ in places:
            namespace[name] = original


def _places(cls: type, accelerator: Accelerator, copies: int) -> list[tuple[dict[str, Any], str, Any, Any]]:
    """Where the packages of a Trainer's classes have Accelerate's functions: namespace, name, function, replacement."""

    def gather(tensor: Any) -> Any:
        return each_once(accelerate.utils.gather(tensor), accelerator.state.num_processes, copies)

    def gather_object(object: Any) -> Any:
        return [*itertools.chain(*accelerate.utils.gather_object([object])[::copies])]

    replacements = {"gather": gather, "gather_object": gather_object}
    return [
        (namespace, name, namespace[name], replacements[function])
        for namespace, name, function in _imported_names(cls)
        if namespace.get(name) is getattr(accelerate.utils, function)
    ]


@functools.cache
def _imported_names(cls: type) -> list[tuple[dict[str, Any], str, str]]:
    packages = {base.__module__.partition(".")[0] for base in cls.__mro__} - _LIBRARIES
    functions = {id(getattr(accelerate.utils, name)): name for name in ("gather", "gather_object")}
    return [
        (vars(module), name, functions[id(value)])
        for module_name, module in [*sys.modules.items()]
        if module_name.partition(".")[0] in packages and module is not None
        for name, value in [*vars(module).items()]
        if id(value) in functions
    ]


@functools.cache
def _numbered(cls: type[Accelerator]) -> type[Accelerator]:
    """A subclass that numbers the data-parallel ranks while :func:`ranks_once` is active."""

    class Numbered(cls):  # type: ignore[valid-type, misc]
        @property
        def num_processes(self) -> int:
            return int(self.state.num_processes) // (copies_of_each_batch(self) if hooks_of(self).ranks_once else 1)

        @property
        def process_index(self) -> int:
            return int(self.state.process_index) // (copies_of_each_batch(self) if hooks_of(self).ranks_once else 1)

    Numbered.__name__, Numbered.__qualname__, Numbered.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Numbered


def number_ranks(accelerator: Accelerator, trainer: Any) -> None:
    """Prepare ``accelerator`` and the arguments of ``trainer`` for :func:`ranks_once`.

    TRL's config counts the completions of a generation step by processes, before it knows the mesh.
    """
    accelerator.__class__ = _numbered(type(accelerator))  # type: ignore[arg-type]
    args = trainer.args
    counted, steps = getattr(args, "generation_batch_size", None), getattr(args, "steps_per_generation", None)
    if not isinstance(counted, int) or not isinstance(steps, int):
        return
    ranks = accelerator.parallelism_config.data_parallel_size  # type: ignore[union-attr]
    args.generation_batch_size = args.per_device_train_batch_size * steps * ranks
    if args.generation_batch_size != counted and accelerator.is_main_process:
        logger.warning(
            "generation_batch_size=%d counts all processes; the data-parallel ranks together have %d completions to a "
            "generation step (per_device_train_batch_size=%d x steps_per_generation=%d x %d ranks), and these are "
            "used. For more, raise steps_per_generation.",
            counted,
            args.generation_batch_size,
            args.per_device_train_batch_size,
            steps,
            ranks,
        )
