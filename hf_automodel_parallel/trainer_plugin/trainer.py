"""``ParallelTrainer``: what an extended Trainer does differently in evaluation and with checkpoints.

Evaluation gathers each sample once. A checkpoint has the Trainer's own files, is complete or marked as incomplete, and
resumes on any mesh. :mod:`.extend` imports this module only when a Trainer exists.
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..accelerate_plugin import checkpoints
from ..accelerate_plugin.checkpoints import (
    asynchronous,
    describe,
    finish,
    how_to_save,
    load_random_state,
    model_task,
    optimizer_task,
)
from ..accelerate_plugin.data_loaders import copies_of_each_batch
from ..accelerate_plugin.last_batch import own_rows, ranks_have_unequal_rows
from ..checkpoint.background import wait_for_saves
from ..checkpoint.commit import last_complete_checkpoint, roll_back, rotate, stage, to_load
from ..checkpoint.files import load_plain, naming, save_plain
from ..checkpoint.manifest import Manifest, verify
from ..checkpoint.steps import checkpoint_step
from ..checkpoint.training import Task, restore_model, restore_optimizer
from ..core.output import tell
from ..errors import CheckpointError
from ..optim.handoff import raw_optimizer
from .generation_batches import generates_batches
from .metrics import ParallelMetrics
from .reference_model import let_references_follow


class ParallelEvaluation(Trainer):
    """Evaluation of a Trainer with an :class:`AutoParallelismConfig`."""

    _gathering: Any = None

    @property  # type: ignore[override]
    def gather_function(self) -> Any:
        """The function that gathers predictions, losses and labels over the ranks.

        ``Seq2SeqTrainer`` sets ``Accelerator.gather`` before it predicts. That returns each sample once per tp rank,
        and the samples that pad the last batch twice. So the setter replaces it by ``gather_for_metrics``.
        """
        return self._gathering

    @gather_function.setter
    def gather_function(self, function: Any) -> None:
        if function == self.accelerator.gather:
            function = self.accelerator.gather_for_metrics
        self._gathering = function

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Like the Trainer's; losses are not computed with the samples that fill up the last batch.

        A Trainer that makes its batches itself from those of the loader (GRPO's groups of generations) gets full ones.
        """
        with nullcontext() if generates_batches(type(self)) else own_rows(dataloader):
            return super().evaluation_loop(dataloader, *args, **kwargs)


logger = logging.getLogger(__name__)


class ParallelCounts(ParallelEvaluation):
    """Losses and counts of a Trainer by data-parallel rank, where the Trainer goes by process."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Like the Trainer's; a loss that does not divide by ``num_items_in_batch`` is not multiplied by the ranks.

        Gradients are averaged over the ranks that share the data, so the Trainer multiplies the loss by their number.
        That is right for a sum over one rank's labels that is divided by the labels of all. But most models accept the
        argument and ignore it, and an auxiliary loss beside the sum is a mean of its own. So the number of items is
        divided by the ranks instead, and nothing is multiplied: what is divided by it comes out the same, and what is
        not stays as it is.
        """
        ranks = self._ranks_of_one_loss()
        if num_items_in_batch is None or ranks == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if ranks_have_unequal_rows(self.accelerator):
            # The evaluation weighs each rank's loss by its rows, so that has to be a mean over them.
            return super().compute_loss(model, inputs, return_outputs)
        # The Trainer multiplies under this option, of which this method has no other use.
        self.args.average_tokens_across_devices = False
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch / ranks)
        finally:
            self.args.average_tokens_across_devices = True

    def _ranks_of_one_loss(self) -> int:
        """The number by which the Trainer would multiply a loss: data-parallel x cp."""
        if not (self.is_fsdp_enabled and self.args.average_tokens_across_devices):
            return 1
        return int(self.accelerator.state.num_processes // self.accelerator.parallelism_config.tp_size)

    def _copies(self) -> int:
        """The number of ranks that have the same batch: tp x cp."""
        config = self.accelerator.parallelism_config if self.is_fsdp_enabled else None
        return 1 if config is None else copies_of_each_batch(self.accelerator)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Like the Trainer's, with the metrics of a callback :class:`.metrics.ParallelMetrics` in the training logs."""
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ParallelMetrics):
                    logs.update(callback.measured())
        super().log(logs, *args, **kwargs)

    def store_flos(self) -> None:
        """Like the Trainer's, which sums over all processes, with each batch once."""
        before = self.state.total_flos
        super().store_flos()
        self.state.total_flos = before + (self.state.total_flos - before) / self._copies()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Like the Trainer's (5.24), with each batch once."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._copies()

    @property
    def _tp_size(self) -> int:
        """TRL's trainers divide by it what ``gather_for_metrics`` returns; here that has each sample once already."""
        return 1

    @_tp_size.setter
    def _tp_size(self, size: int) -> None:
        pass


class ParallelTrainer(ParallelCounts):
    """A Trainer with an :class:`AutoParallelismConfig`; :mod:`.extend` inserts it in front of ``Trainer``.

    Methods that override the Trainer's fall back to ``super()`` where FSDP is off: an extended class may also resume in
    one process, from a checkpoint of a parallel run.
    """

    #: Tasks that write the large files of the current save; None outside of a save.
    _tasks: list[Task] | None = None
    #: The checkpoint to push to the hub when it is complete.
    _to_push: str | None = None
    #: The checkpoint that ``train`` resumes from and its manifest, so that its files are verified (and read) once.
    _verified: tuple[str, Manifest | None] | None = None

    # ---- resuming --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Like ``Trainer.train``; ``resume_from_checkpoint=True`` takes the last complete checkpoint.

        The log names the checkpoints that were skipped, with the reason.

        Raises:
            CheckpointError: on all ranks: there is no complete checkpoint, or the chosen one is damaged.
        """
        wait_for_saves()
        let_references_follow(self)
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(self.args.output_dir)
            if found is None:
                raise CheckpointError(
                    "resume_from_checkpoint=True, but there is no complete checkpoint in "
                    f"output_dir={self.args.output_dir!r}."
                )
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint:
            resume_from_checkpoint = str(to_load(resume_from_checkpoint))
        if resume_from_checkpoint:
            self._verified = (resume_from_checkpoint, verify(resume_from_checkpoint))
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._verified = None  # a later save may write to the same directory
        wait_for_saves()
        return result

    def _manifest_of(self, checkpoint: str) -> Manifest | None:
        if self._verified is not None and self._verified[0] == str(checkpoint):
            return self._verified[1]
        return verify(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Like the Trainer's; a checkpoint with FSDP's training state loads on any mesh, or in one process."""
        folder = Path(resume_from_checkpoint)
        if not (self.is_fsdp_enabled or _has_training_state(folder)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        manifest = self._manifest_of(resume_from_checkpoint)
        self._load_weights(folder, self.model if model is None else model, manifest)

    def _load_weights(self, folder: Path, model: nn.Module, manifest: Manifest | None) -> None:
        tell(logger, f"loading the weights from {folder}")
        if self.is_fsdp_enabled:
            checkpoints.load_model(self.accelerator, model, folder, 0, adapter_only=True, manifest=manifest)
        else:
            restore_model(model, folder, adapter_only=True, manifest=manifest)

    def _load_best_model(self) -> None:
        """Like the Trainer's, from verified files."""
        best = self.state.best_model_checkpoint
        wait_for_saves()
        if best is None or not (self.is_fsdp_enabled or _has_training_state(Path(best))):
            super()._load_best_model()
            return
        folder = to_load(best)
        manifest = verify(folder)
        tell(logger, f"loading the best model from {folder} (score: {self.state.best_metric})")
        self._load_weights(folder, self.model, manifest)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Like the Trainer's, but a checkpoint without optimizer state raises; stock starts with a fresh optimizer.

        Raises:
            CheckpointError: on all ranks.
        """
        if checkpoint is None or not (self.is_fsdp_enabled or _has_training_state(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder, manifest = Path(checkpoint), self._manifest_of(checkpoint)
        if self.is_fsdp_enabled:
            checkpoints.load_optimizer(self.accelerator, self.optimizer, self.model, folder, 0, manifest)
        else:
            restore_optimizer(raw_optimizer(self.optimizer), self.model, folder, manifest=manifest)
        checksums = None if manifest is None else manifest.checksums("scheduler.pt")
        with checkpoint_step(f"loading {folder}"):
            self.lr_scheduler.load_state_dict(load_plain(folder / "scheduler.pt", checksums=checksums))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Like the Trainer's; an error names the file."""
        if checkpoint is None or getattr(self.accelerator, "scaler", None) is None:
            return
        path = Path(checkpoint) / "scaler.pt"
        with checkpoint_step(f"loading {checkpoint}"):
            if path.is_file():
                self.accelerator.scaler.load_state_dict(load_plain(path))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Like the Trainer's; for another mesh than that of the save see :mod:`..checkpoint.random_states`."""
        if checkpoint is None:
            return
        manifest = self._manifest_of(checkpoint)
        if manifest is None and not self.is_fsdp_enabled:
            super()._load_rng_state(checkpoint)
            return
        load_random_state(self.accelerator, Path(checkpoint), manifest, "rng_state_{rank}.pth")

    # ---- saving ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Like the Trainer's, but staged and committed; old checkpoints are deleted after the commit."""
        if not self.is_fsdp_enabled:
            super()._save_checkpoint(model, trial, *args, **kwargs)
            return
        wait_for_saves()
        # With save_only_model there is no training state to write in the background.
        background = asynchronous(self.accelerator) and not self.args.save_only_model
        run_dir = Path(self._get_output_dir(trial=trial)).absolute()
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        save = stage(folder)
        # Without a limit, the Trainer does not rotate checkpoints before the new one is complete; afterwards() does.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._tasks = []
        try:
            with checkpoint_step(f"saving to {folder}"), naming(folder):
                super()._save_checkpoint(model, trial, *args, **kwargs)
            tasks = self._tasks
        except BaseException:
            roll_back(save)
            raise
        finally:
            self.args.save_total_limit = limit
            self._tasks = None
        best = self.state.best_model_checkpoint
        # load_best_model_at_end needs the best checkpoint, whatever its age.
        keep = {folder} if best is None else {folder, Path(best).absolute()}

        def afterwards() -> None:
            if self.args.should_save:
                for path in rotate(run_dir, limit, keep):
                    logger.info("deleted the old checkpoint %s (save_total_limit=%s)", path, limit)

        manifest = describe(self.accelerator, self.state.global_step, how_to_save(self.accelerator, adapter_only=True))
        manifest.adapter_only = True
        finish(save, manifest, tasks, background, afterwards)
        to_push, self._to_push = self._to_push, None
        if to_push is not None:
            with checkpoint_step(f"pushing {to_push}"):
                super()._push_from_checkpoint(to_push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Like the Trainer's, but deferred to the end of the save, so that the hub gets the manifest and not the mark
        of an incomplete checkpoint.
        """
        # Outside of _save_checkpoint there is nothing to defer to.
        if self._tasks is None:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        self._to_push = checkpoint_folder

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Like the Trainer's, after the background save: stock may delete the last checkpoint
        (``save_total_limit=1``) while the thread still writes it.
        """
        wait_for_saves()
        return super()._finalize_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like the Trainer's; within a checkpoint, an error on rank 0 is raised on all ranks."""
        if self._tasks is None:
            super().save_model(output_dir, _internal_call)
            return
        with checkpoint_step(f"saving to {output_dir}"), naming(str(output_dir)):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save weights, optimizer state and scheduler under the Trainer's file names."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir).absolute()
        how = how_to_save(self.accelerator, adapter_only=True)
        collect = [
            lambda: model_task(self.accelerator, self.model, folder, 0, how),
            lambda: optimizer_task(self.accelerator, self.optimizer, self.model, folder, 0, how),
        ]
        for make in collect:
            task = make()
            if how.copy and self._tasks is not None:
                self._tasks.append(task)
            else:
                # Before the next state is collected: full weights and full optimizer state never coexist in memory.
                task(None)
        with checkpoint_step(f"saving to {folder}"):
            if self.args.should_save:
                save_plain(self.lr_scheduler.state_dict(), folder / "scheduler.pt")


def _has_training_state(folder: Path) -> bool:
    return folder.is_dir() and any(name.startswith("pytorch_model_fsdp") for name in os.listdir(folder))
