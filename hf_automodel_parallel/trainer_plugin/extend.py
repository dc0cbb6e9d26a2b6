"""The Trainer plugin: extends one Trainer instance, checks its arguments, and synchronises its SIGTERM handler.

The Trainer calls Accelerate's functions for FSDP checkpoints by imported names, so there is no object to bind methods
on. But it builds its ``Accelerator`` in its own constructor, which is on the stack when Accelerate calls our config.
That one instance gets a new class with :class:`.trainer.ParallelTrainer` between the Trainer's subclasses and
``Trainer``. Overrides of a subclass (TRL's, the user's) come first, and their ``super()`` calls reach ours. FSDP2
extends the classes of modules in the same way. No existing class changes, and other Trainers of the process stay stock.

:func:`check_trainer` refuses arguments that would train wrongly or push checkpoints without weights.
:func:`adopt_signal_handler` and :func:`agree_on_signal` let all ranks save after the same step when one of them is
preempted.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .. import compat
from ..accelerate_plugin import methods
from ..accelerate_plugin.hooks import Hooks
from ..accelerate_plugin.saving import bind_trainer
from ..core.mesh import inherit_timeouts
from ..core.output import level_of_name, set_verbosity, tell, verbosity
from ..core.ranks import communication_device
from ..errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator, ParallelismConfig


class TrainerHooks(Hooks):
    """The hooks of a Trainer on the ``Accelerator`` that it builds; without a Trainer only the SIGTERM handler."""

    _trainer: weakref.ref[Any] | None = None

    def attach(self, trainer: Any) -> None:
        """Set the Trainer. A weak reference: the Trainer refers to the ``Accelerator`` that has these hooks."""
        self._trainer = weakref.ref(trainer)

    @property
    def trainer(self) -> Any | None:
        """The Trainer; None if there is none, or it is gone."""
        return None if self._trainer is None else self._trainer()

    def check(self, accelerator: Accelerator) -> None:
        if self.trainer is not None:
            check_trainer(accelerator, self.trainer)

    def before_prepare(self) -> None:
        adopt_signal_handler()

    @property
    def gathers_by_process(self) -> bool:  # type: ignore[override]
        return self.trainer is not None

    def training_batch(self) -> tuple[int, int] | None:
        args = getattr(self.trainer, "args", None)
        if args is None:
            return None
        rows = 0 if args.auto_find_batch_size else int(args.train_batch_size)
        return rows, int(args.gradient_accumulation_steps)

    def trains(self, model: Any) -> bool:
        return self.trainer is not None and getattr(self.trainer, "model", None) is model

    def before_step(self) -> None:
        agree_on_signal()


def install(accelerator: Accelerator, config: ParallelismConfig) -> None:
    """Bind this package to ``accelerator``, and to the Trainer that builds it, if there is one.

    Raises:
        ConfigError: other arguments of the ``Accelerator`` contradict the config.
    """
    hooks = TrainerHooks()
    methods.install(accelerator, config, hooks)
    # Also without a process group, so that one process can resume from a checkpoint of a parallel run.
    trainer = _extend_trainer(accelerator)
    level = verbosity(getattr(config, "verbose", None))
    if level is None and trainer is not None:
        level = level_of_name(trainer.args.log_level)
    set_verbosity(level)
    if trainer is None or config.device_mesh is None:
        return
    bind_trainer(trainer, accelerator)
    hooks.attach(trainer)
    _count_ranks_once(accelerator, trainer)
    timeout = getattr(trainer.args, "ddp_timeout_delta", None)
    if accelerator.device.type == "cpu" and timeout is not None:
        # TrainingArguments (5.17 to 5.24) set the timeout of the process group from ddp_timeout on accelerators only.
        compat.set_timeout(timeout)
        inherit_timeouts(accelerator.torch_device_mesh)


def _count_ranks_once(accelerator: Accelerator, trainer: Any) -> None:
    # Here and not above: the module imports transformers' Trainer.
    from .generation_batches import generates_batches, number_ranks

    if generates_batches(type(trainer)):
        number_ranks(accelerator, trainer)


def _extend_trainer(accelerator: Accelerator) -> Any | None:
    """Extend the Trainer whose constructor is building ``accelerator`` and return it; None if there is none."""
    module = sys.modules.get("transformers.trainer")
    trainer = None if module is None else compat.owner_of_running_accelerator_init(accelerator, module.Trainer)
    if trainer is not None:
        trainer.__class__ = _extended(type(trainer))  # type: ignore[arg-type]
    return trainer


@functools.cache
def _extended(cls: type) -> type[Any]:
    """A subclass of ``cls`` with :class:`.trainer.ParallelTrainer` in front of ``Trainer`` in its MRO.

    It has the name of ``cls``. Cached, so that all Trainers of one class get the same extended class.
    """
    from transformers import Trainer

    # Not at module level: without a Trainer, transformers.trainer need not be imported.
    from .generation_batches import CountsRanksOnce, generates_batches
    from .trainer import ParallelTrainer

    if issubclass(cls, ParallelTrainer):
        return cls
    bases = (ParallelTrainer,) if cls is Trainer else (cls, ParallelTrainer)
    if generates_batches(cls):
        bases = (CountsRanksOnce, *bases)
    attributes = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, bases, attributes)


# ---- checks of the Trainer's arguments -----------------------------------------------------------------------------


if TYPE_CHECKING:
    from accelerate import Accelerator


def check_trainer(accelerator: Accelerator, trainer: Any) -> None:
    """Check the arguments of ``trainer`` before its model is prepared for training.

    Raises:
        ConfigError: one of

            * ``average_tokens_across_devices=False`` under tp or cp. The Trainer divides the number of tokens by
              tp x cp although it has not summed it over the ranks, so gradients would be tp x cp times too large.
            * A ``hub_strategy`` that uploads checkpoints without weights (``SHARDED_STATE_DICT``), or before they are
              written (``async_save``).
            * ``bf16_full_eval`` or ``fp16_full_eval`` with several data-parallel ranks: they cast the model after
              FSDP2 has sharded it.
            * Groups of completions (TRL's ``num_generations``) that the batches of the data-parallel ranks do not hold.
    """
    _check_hub(accelerator, trainer.args)
    _check_group(accelerator, trainer.args)
    for field in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(trainer.args, field, False) and _has_data_parallel_ranks(accelerator):
            raise ConfigError(
                f"{field}=True casts the model when it is evaluated, and FSDP2 cannot gather parameters whose dtype "
                f"has changed. Use {field[:4]}=True (mixed precision), which evaluates in that dtype, too."
            )
    if getattr(trainer.args, "average_tokens_across_devices", True):
        return
    counts = getattr(trainer, "model_accepts_loss_kwargs", True) or getattr(trainer, "compute_loss_func", None)
    shared = accelerator.parallelism_config.non_data_parallel_size  # type: ignore[union-attr]
    if counts and shared > 1:
        raise ConfigError(
            f"average_tokens_across_devices=False with {shared} ranks to a batch (tp_size x cp_size): the Trainer "
            f"would make losses and gradients {shared} times too large. Leave it at True, its default."
        )


def _has_data_parallel_ranks(accelerator: Accelerator) -> bool:
    return accelerator.num_processes > accelerator.parallelism_config.non_data_parallel_size  # type: ignore[union-attr]


def _check_group(accelerator: Accelerator, args: Any) -> None:
    group, steps = getattr(args, "num_generations", None), getattr(args, "steps_per_generation", None)
    if not isinstance(group, int) or not isinstance(steps, int):
        return
    # TRL counts all processes, of which those of one tp or cp group have the same rows.
    ranks = accelerator.parallelism_config.data_parallel_size  # type: ignore[union-attr]
    rows = args.per_device_train_batch_size * steps * ranks
    if rows % group:
        raise ConfigError(
            f"num_generations={group}: the {ranks} data-parallel ranks together have {rows} completions to a batch "
            "(per_device_train_batch_size x steps_per_generation x ranks), which are no whole groups. Choose a "
            "per_device_train_batch_size or steps_per_generation so that the group divides them."
        )
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        return
    field = "num_generations" if getattr(args, "num_generations_eval", None) is None else "num_generations_eval"
    group, rows = getattr(args, field), args.per_device_eval_batch_size * ranks
    if rows % group:
        raise ConfigError(
            f"{field}={group}: the {ranks} data-parallel ranks together have {rows} completions to a batch of an "
            "evaluation (per_device_eval_batch_size x ranks), which are no whole groups. Choose a "
            "per_device_eval_batch_size so that the group divides them."
        )


def _check_hub(accelerator: Accelerator, args: Any) -> None:
    if not getattr(args, "push_to_hub", False) or str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        return
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if strategy == "every_save" and "SHARDED_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type):
        raise ConfigError(
            "hub_strategy='every_save' uploads the model of each checkpoint, which SHARDED_STATE_DICT does not write: "
            "there would be configs without weights on the hub. Use state_dict_type='FULL_STATE_DICT', or "
            "hub_strategy='end' or 'checkpoint'."
        )
    if "checkpoint" in strategy and getattr(accelerator.parallelism_config, "async_save", False):
        raise ConfigError(
            f"hub_strategy={strategy!r} uploads a checkpoint at once, async_save=True writes it later. Use one of the "
            "two."
        )


# ---- SIGTERM (preemption) ------------------------------------------------------------------------------------------


logger = logging.getLogger(__name__)

#: Attribute of the Trainer's signal manager: this process has received SIGTERM.
_NOTED = "_automodel_parallel_signal"


def adopt_signal_handler() -> None:
    """Change the Trainer's SIGTERM handler, if it has one, to set a flag only; call it before the first step.

    Stock, each rank saves by itself when its signal arrives. A save is collective, and signals arrive at different
    steps on different ranks. Changes the handler's instance, once.
    """
    manager = _manager()
    if manager is None or hasattr(manager, _NOTED):
        return
    # A request that arrived before this call is kept in the flag, until all ranks know of it.
    setattr(manager, _NOTED, bool(manager.is_checkpoint_requested))
    manager.is_checkpoint_requested = False

    def note() -> None:
        setattr(manager, _NOTED, True)

    def save() -> None:
        # Like the Trainer's, but without its file "checkpoint-is-incomplete.txt": each rank would write and remove it.
        manager.is_checkpoint_requested = False
        setattr(manager, _NOTED, False)
        tell(logger, f"SIGTERM: checkpoint at step {manager.trainer.state.global_step}, then the end")
        compat.save_trainer_checkpoint(manager.trainer)

    compat.replace_checkpoint_request(manager, note)
    manager.execute_jit_checkpoint = save


def agree_on_signal() -> None:
    """If any rank has received SIGTERM, let the Trainer of every rank save after this step; collective.

    Called in each optimizer step. Costs an all-reduce of one number; nothing if ``enable_jit_checkpoint`` is off.
    """
    manager = _manager()
    if manager is None or not hasattr(manager, _NOTED):
        return
    noted = torch.tensor(int(getattr(manager, _NOTED)), device=communication_device())
    dist.all_reduce(noted, op=dist.ReduceOp.MAX)
    manager.is_checkpoint_requested = bool(noted.item())


def _manager() -> Any | None:
    """The Trainer's signal manager if it handles SIGTERM in this process, else None."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, compat.trainer_signal_manager_type() or ()) else None
