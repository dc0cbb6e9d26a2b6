"""``Accelerator.save_state`` and ``load_state``, and the helpers that the Trainer's checkpoints share with them.

A checkpoint has the files of stock Accelerate, loads on any mesh, and is either complete or marked as incomplete.
Models on the megatron-fsdp backend keep Accelerate's own functions for weights and optimizer state.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backends.megatron_fsdp.accelerate import loading_full_tensors
from ..backends.megatron_fsdp.sharding import managed_by_megatron
from ..checkpoint.background import background_group, start, wait_for_saves
from ..checkpoint.commit import StagedSave, commit, last_complete_checkpoint, roll_back, rotate, stage, to_load
from ..checkpoint.files import load_plain, naming
from ..checkpoint.manifest import Manifest, verify, verify_for_others
from ..checkpoint.random_states import origin, restore
from ..checkpoint.steps import checkpoint_step
from ..checkpoint.training import How, Task, collect_model, collect_optimizer, restore_model, restore_optimizer
from ..core.output import tell
from ..core.ranks import rank, world_size
from ..errors import CheckpointError
from ..optim.handoff import raw_optimizer
from .prepared import attached_to
from .sampler_state import load_positions, save_positions

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


# ---- shared with the Trainer's checkpoints -------------------------------------------------------------------------


def how_to_save(accelerator: Accelerator, adapter_only: bool = False) -> How:
    """How states are saved, from the FSDP plugin's ``state_dict_type`` and the config's ``async_save``."""
    sharded = "SHARDED_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)
    return How(sharded, copy=asynchronous(accelerator), adapter_only=adapter_only)


def asynchronous(accelerator: Accelerator) -> bool:
    """True if a background thread writes the large files (``async_save``)."""
    return bool(getattr(accelerator.parallelism_config, "async_save", False))


def mesh_sizes(accelerator: Accelerator) -> dict[str, int]:
    """Mesh axis -> size, outermost first; axes of size 1 are left out."""
    mesh = accelerator.torch_device_mesh
    if mesh is None:
        return {}
    names = mesh.mesh_dim_names or ()
    return {name: size for name, size in zip(names, mesh.shape, strict=True) if size > 1}


def describe(accelerator: Accelerator, step: int | None, how: How) -> Manifest:
    """The manifest of a checkpoint that ``accelerator`` saves; :func:`~..checkpoint.commit.commit` lists the files."""
    config = accelerator.parallelism_config
    return Manifest(
        step=step,
        world_size=world_size(),
        mesh=mesh_sizes(accelerator),
        data_parallel_size=config.data_parallel_size if config is not None else 1,
        state_dict_type="SHARDED_STATE_DICT" if how.sharded else "FULL_STATE_DICT",
        adapter_only=how.adapter_only,
        devices=torch.cuda.device_count() if torch.cuda.is_available() else 0,
    )


def model_task(accelerator: Accelerator, model: nn.Module, folder: Path, index: int, how: How) -> Task:
    """Collect the weights of a prepared model; the returned task writes them. Both are collective.

    Under megatron-fsdp Accelerate's function has written them when this returns, and the task is empty.
    """
    if managed_by_megatron(model) is None:
        return collect_model(model, folder, index, how)
    from accelerate.utils import save_fsdp_model

    with checkpoint_step(f"saving to {folder}"):
        save_fsdp_model(
            accelerator.state.fsdp_plugin, accelerator, model, str(folder), index, adapter_only=how.adapter_only
        )
    return lambda group: None


def optimizer_task(
    accelerator: Accelerator, optimizer: Any, model: nn.Module, folder: Path, index: int, how: How
) -> Task:
    """Collect the state of a prepared optimizer; see :func:`model_task`."""
    if managed_by_megatron(model) is None:
        return collect_optimizer(raw_optimizer(optimizer), model, folder, index, how)
    from accelerate.utils import save_fsdp_optimizer

    with checkpoint_step(f"saving to {folder}"):
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, str(folder), index)
    return lambda group: None


def load_model(
    accelerator: Accelerator, model: nn.Module, folder: Path, index: int, adapter_only: bool, manifest: Manifest | None
) -> None:
    """Load the weights of a prepared model; collective. ``adapter_only``: frozen base weights may be missing."""
    if managed_by_megatron(model) is None:
        restore_model(model, folder, index, adapter_only, manifest)
        return
    from accelerate.utils import load_fsdp_model

    verify_for_others(folder, manifest, "pytorch_model_fsdp")
    with checkpoint_step(f"loading {folder}"), loading_full_tensors(model):
        load_fsdp_model(
            accelerator.state.fsdp_plugin, accelerator, model, str(folder), index, adapter_only=adapter_only
        )


def load_optimizer(
    accelerator: Accelerator, optimizer: Any, model: nn.Module, folder: Path, index: int, manifest: Manifest | None
) -> None:
    """Load the state of a prepared optimizer; collective."""
    if managed_by_megatron(model) is None:
        restore_optimizer(raw_optimizer(optimizer), model, folder, index, manifest)
        return
    from accelerate.utils import load_fsdp_optimizer

    verify_for_others(folder, manifest, "optimizer")
    with checkpoint_step(f"loading {folder}"):
        load_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, str(folder), index)


def finish(save: StagedSave, manifest: Manifest, tasks: list[Task], background: bool, afterwards: Any = None) -> None:
    """Run the ``tasks`` and commit the directory, now or in a background thread; collective.

    Args:
        save: from :func:`stage`.
        manifest: from :func:`describe`.
        tasks: each writes some of the large files.
        background: return at once and let a thread do the work.
        afterwards: called on each rank after the commit.

    Raises:
        CheckpointError: on all ranks. The directory holds the previous checkpoint again, or is marked as incomplete.
    """
    # The thread needs a process group of its own: its collectives would interleave with those of training.
    group = background_group() if background else None

    def work() -> None:
        try:
            for task in tasks:
                task(group)
            commit(save, manifest, group)
        except BaseException:
            # On any error, KeyboardInterrupt included: the previous checkpoint of that name is restored.
            roll_back(save, group)
            raise
        tell(logger, f"saved the checkpoint {save.folder}")
        if afterwards is not None:
            with checkpoint_step(f"deleting old checkpoints beside {save.folder}", group):
                afterwards()

    start(work) if background else work()


def load_random_state(
    accelerator: Accelerator, folder: Path, manifest: Manifest | None, file: str
) -> Mapping[str, Any]:
    """Restore this rank's random state; on another mesh, that of :func:`~..checkpoint.random_states.origin`.

    Args:
        accelerator: of this run.
        folder: the checkpoint.
        manifest: of the checkpoint. Without one (None) the saved mesh is assumed to equal this run's.
        file: file name with ``{rank}`` for the rank that saved it.

    Returns:
        The content of the file; empty if the checkpoint has neither manifest nor file.

    Raises:
        CheckpointError: on all ranks, if a file is missing or damaged.
    """
    # The file of another rank may be read: on another mesh the states of the ranks are assigned anew.
    mesh, me = mesh_sizes(accelerator), rank()
    source = origin(me, mesh, manifest.mesh if manifest else mesh, manifest.world_size if manifest else world_size())
    path = folder / file.format(rank=source.rank)
    states: Mapping[str, Any] = {}
    with checkpoint_step(f"loading {folder}"):
        if manifest is None and not path.is_file():
            logger.warning("%s is missing, the random state of this rank is not restored", path)
        else:
            states = load_plain(path)
            restore(states, source, source.rank == me and source.row is None)
    if manifest is not None and manifest.mesh != mesh and me == 0:
        logger.info(
            "the mesh was %s and is %s now: rows of tp ranks keep the random states of the same number",
            manifest.mesh,
            mesh,
        )
    return states


def repaced(state: dict[str, Any], manifest: Manifest | None, repeats: int) -> dict[str, Any]:
    """A scheduler's state with its counters converted to this run's number of data-parallel ranks.

    A prepared scheduler advances ``repeats`` times per optimizer step, once per data-parallel rank. A checkpoint from
    another number of ranks has to continue at the same optimizer step, so the counters are rescaled.
    """
    # Stock checkpoints do not say how many data-parallel ranks there were.
    if manifest is None or repeats == manifest.data_parallel_size:
        return state

    def convert(values: dict[str, Any]) -> dict[str, Any]:
        result = dict(values)
        for name in ("last_epoch", "_step_count"):
            if isinstance(result.get(name), int):
                first = 0 if name == "last_epoch" else 1  # the constructor takes the first step
                result[name] = (result[name] - first) * repeats // manifest.data_parallel_size + first
        inner = result.get("_schedulers")
        if isinstance(inner, list):
            result["_schedulers"] = [convert(item) if isinstance(item, dict) else item for item in inner]
        return result

    return convert(state)


# ---- Accelerate's loop ---------------------------------------------------------------------------------------------


def save_state(
    self: Accelerator, output_dir: str | None = None, safe_serialization: bool = True, **save_model_func_kwargs: Any
) -> str:
    """Like ``Accelerator.save_state``: the same files, and a manifest that is written last.

    A complete checkpoint in ``output_dir`` stays on the disk until the new one is complete. With ``async_save`` the
    call copies weights and optimizer state to the CPU, and a thread writes them.

    Returns:
        The directory.

    Raises:
        CheckpointError: on all ranks: an argument that FSDP's checkpoints do not take, an existing numbered directory,
            or a file that cannot be written.
    """
    from accelerate.checkpointing import save_accelerator_state, save_custom_state

    # One save at a time; an error of the previous background save is raised here.
    wait_for_saves()
    if save_model_func_kwargs:
        raise CheckpointError(
            f"save_state was given {', '.join(save_model_func_kwargs)}, which are for DeepSpeed and Megatron-LM. Leave "
            "them out."
        )
    project = self.project_configuration
    naming_ourselves = project.automatic_checkpoint_naming
    if naming_ourselves:
        parent = Path(self.project_dir) / "checkpoints"
        output_dir = str(parent / f"checkpoint_{self.save_iteration}")
    if output_dir is None:
        raise CheckpointError(
            "save_state needs output_dir, unless ProjectConfiguration(automatic_checkpoint_naming=True)."
        )
    folder = Path(output_dir)
    if naming_ourselves:
        with checkpoint_step(f"saving to {folder}"):
            if rank() == 0 and folder.exists():
                raise CheckpointError(
                    f"{folder} already exists. Set accelerator.project_configuration.iteration to the number to go on "
                    "with."
                )
    # The mark comes first: if the job dies after it, the directory does not count as complete.
    save = stage(folder)
    # Absolute: a background save must not follow a change of the working directory.
    folder = save.folder
    how = how_to_save(self)
    try:
        tasks: list[Task] = []
        for index, model in enumerate(self._models):
            _now_or_later(model_task(self, model, folder, index, how), how, tasks)
        for index, optimizer in enumerate(self._optimizers):
            model = _model_of(self, optimizer, index)
            _now_or_later(optimizer_task(self, optimizer, model, folder, index, how), how, tasks)
        with checkpoint_step(f"saving to {folder}"), naming(folder):
            # No weights: they are not gathered here. Hooks may save other things beside them.
            for hook in self._save_model_state_pre_hook.values():
                hook(self._models, [], str(folder))
            # Without models and optimizers, which are collected above: only Accelerate's small files.
            save_accelerator_state(
                str(folder),
                [],
                [],
                self._schedulers,
                self._dataloaders,
                self.state.process_index,
                self.step,
                # Otherwise all ranks would write scaler.pt at the same time.
                self.scaler if rank() == 0 else None,
                save_on_each_node=project.save_on_each_node,
                safe_serialization=safe_serialization,
            )
            if rank() == 0:
                save_positions(self, folder)
            for index, custom in enumerate(self._custom_objects):
                save_custom_state(custom, str(folder), index, save_on_each_node=project.save_on_each_node)
    except BaseException:
        roll_back(save)
        raise
    step = self.step or None

    def afterwards() -> None:
        if naming_ourselves and rank() == 0:
            rotate(folder.parent, project.total_limit, {folder})

    finish(save, describe(self, step, how), tasks, how.copy, afterwards)
    project.iteration += 1
    return output_dir


def _now_or_later(task: Task, how: How, later: list[Task]) -> None:
    """Run ``task`` at once, or append it to ``later`` if it holds copies.

    At once, so that full weights and full optimizer state are never in rank 0's memory together.
    """
    if how.copy:
        later.append(task)
    else:
        task(None)


def _model_of(accelerator: Accelerator, optimizer: Any, index: int) -> nn.Module:
    # Accelerate keeps no link from an optimizer to its model; for foreign optimizers the index has to do.
    record = attached_to(raw_optimizer(optimizer))
    return record.context.model if record is not None else accelerator._models[min(index, len(accelerator._models) - 1)]


def load_state(
    self: Accelerator, input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **kwargs: Any
) -> None:
    """Like ``Accelerator.load_state``: on any mesh, with verified files, and without running code from a file.

    Raises:
        CheckpointError: on all ranks, naming the file or key. Unless the message says that nothing was loaded, some
            states may be loaded already: do not continue training.
    """
    from accelerate.checkpointing import load_accelerator_state

    wait_for_saves()
    with checkpoint_step("load_state"):
        unknown = set(kwargs) - {"map_location"}  # accepted and not needed: shards are read to the device of the model
        if unknown:
            raise CheckpointError(
                f"load_state was given {', '.join(sorted(unknown))}, which FSDP's checkpoints do not take. Leave it "
                "out."
            )
        if load_kwargs and load_kwargs.get("weights_only", True) is not True:
            raise CheckpointError(
                "load_kwargs has weights_only=False, which would run code from the checkpoint. Leave it out."
            )
        if input_dir is None and not self.project_configuration.automatic_checkpoint_naming:
            raise CheckpointError(
                "load_state needs input_dir, unless ProjectConfiguration(automatic_checkpoint_naming=True)."
            )
    if input_dir is None:
        parent = Path(self.project_dir) / "checkpoints"
        found = last_complete_checkpoint(parent)
        if found is None:
            raise CheckpointError(f"there is no complete checkpoint in {parent}.")
        folder = found
    else:
        folder = to_load(os.path.expanduser(input_dir))
    # Before anything is loaded, so that a damaged small file leaves the run as it was.
    manifest = verify(folder)
    tell(logger, f"loading the training state from {folder}")
    for index, model in enumerate(self._models):
        load_model(self, model, folder, index, bool(manifest and manifest.adapter_only), manifest)
    if self.scaler is not None:
        with checkpoint_step(f"loading {folder}"):
            self.scaler.load_state_dict(load_plain(folder / "scaler.pt"))
    for index, optimizer in enumerate(self._optimizers):
        load_optimizer(self, optimizer, _model_of(self, optimizer, index), folder, index, manifest)
    with checkpoint_step(f"loading {folder}"):
        for hook in self._load_model_state_pre_hook.values():
            hook([], str(folder))
        load_accelerator_state(
            str(folder), [], [], [], self._dataloaders, self.state.process_index, None, "cpu", load_kwargs
        )
        for index, scheduler in enumerate(self._schedulers):
            state = load_plain(folder / ("scheduler.bin" if index == 0 else f"scheduler_{index}.bin"))
            scheduler.load_state_dict(repaced(state, manifest, _pace(scheduler, manifest)))
        load_positions(self, folder, manifest)
        _load_custom_states(self, folder)
    # After load_accelerator_state, which restores random states by process index, whatever the mesh.
    states = load_random_state(self, folder, manifest, "random_states_{rank}.pkl")
    if "step" in states:
        self.step = states["step"]


def _pace(scheduler: Any, manifest: Manifest | None) -> int:
    """Scheduler steps per optimizer step.

    For a scheduler that is not tied to the optimizer, the saved number of data-parallel ranks, so that
    :func:`repaced` leaves its counters alone.
    """
    tied = scheduler.step_with_optimizer and getattr(scheduler, "limited", not scheduler.split_batches)
    if not tied:
        return manifest.data_parallel_size if manifest is not None else 1
    return int(getattr(scheduler, "repeats", 1))


def _load_custom_states(accelerator: Accelerator, folder: Path) -> None:
    """Load the objects of ``register_for_checkpointing``, with ``weights_only`` (Accelerate loads any pickle)."""
    found = sorted(folder.glob("custom_checkpoint_*.pkl"))
    # Objects are matched by their order, so another number of them would load states into the wrong ones.
    if len(found) != len(accelerator._custom_objects):
        raise CheckpointError(
            f"{folder} holds {len(found)} states of objects registered with register_for_checkpointing, but "
            f"{len(accelerator._custom_objects)} are registered now. Register the same objects in the same order."
        )
    for index, custom in enumerate(accelerator._custom_objects):
        custom.load_state_dict(load_plain(folder / f"custom_checkpoint_{index}.pkl"))


def end_training(self: Accelerator) -> None:
    """Like ``Accelerator.end_training``, after the background save: stock closes the process group that it needs."""
    wait_for_saves()
    type(self).end_training(self)


def load_state_in_one_process(self: Accelerator, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
    """Like ``Accelerator.load_state`` in one process without a process group, for checkpoints of parallel runs too.

    Stock Accelerate cannot read ``pytorch_model_fsdp*`` there. Other checkpoints go to the stock method.
    """
    folder = None if input_dir is None else Path(os.path.expanduser(input_dir))
    if folder is None or not (
        any(folder.glob("pytorch_model_fsdp*")) or any(folder.glob(".previous/pytorch_model_fsdp*"))
    ):
        type(self).load_state(self, input_dir, *args, **kwargs)
        return
    load_state(self, input_dir, *args, **kwargs)
