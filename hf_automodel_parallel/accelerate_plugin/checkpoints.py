"""``Accelerator.save_state`` and ``load_state``: the files of stock Accelerate, complete or recognisably not, on any
mesh.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backends.megatron_fsdp.accelerate import loading_whole
from ..backends.megatron_fsdp.sharding import managed_by_megatron
from ..checkpoint.background import background_group, start, wait_for_saves
from ..checkpoint.commit import StagedSave, commit, last_complete_checkpoint, roll_back, rotate, stage, to_load
from ..checkpoint.files import load_plain, naming
from ..checkpoint.manifest import Manifest, verify
from ..checkpoint.random_states import origin, restore
from ..checkpoint.steps import checkpoint_step
from ..checkpoint.training import How, Task, collect_model, collect_optimizer, restore_model, restore_optimizer
from ..core.ranks import rank, world_size
from ..errors import CheckpointError
from ..optim.handoff import raw_optimizer
from .prepared import attached_to
from .sampler_state import load_positions, save_positions

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


# ---- what both Accelerate's loop and the Trainer use ---------------------------------------------------------------


def how_to_save(accelerator: Accelerator, adapter_only: bool = False) -> How:
    """What the plugin and the config say about saving."""
    sharded = "SHARDED_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)
    return How(sharded, copy=asynchronous(accelerator), adapter_only=adapter_only)


def asynchronous(accelerator: Accelerator) -> bool:
    """True if saves go on in the background."""
    return bool(getattr(accelerator.parallelism_config, "async_save", False))


def mesh_sizes(accelerator: Accelerator) -> dict[str, int]:
    """Axis -> size of the axes that are larger than one, outermost first."""
    mesh = accelerator.torch_device_mesh
    if mesh is None:
        return {}
    names = mesh.mesh_dim_names or ()
    return {name: size for name, size in zip(names, mesh.shape, strict=True) if size > 1}


def describe(accelerator: Accelerator, step: int | None, how: How) -> Manifest:
    """The manifest of a checkpoint that ``accelerator`` saves, still without its files."""
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
    """Collect the weights of a prepared model; the result writes them."""
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
    """Collect the state of a prepared optimizer; the result writes it."""
    if managed_by_megatron(model) is None:
        return collect_optimizer(raw_optimizer(optimizer), model, folder, index, how)
    from accelerate.utils import save_fsdp_optimizer

    with checkpoint_step(f"saving to {folder}"):
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, str(folder), index)
    return lambda group: None


def load_model(
    accelerator: Accelerator, model: nn.Module, folder: Path, index: int, adapter_only: bool, manifest: Manifest | None
) -> None:
    """Load the weights of a prepared model."""
    if managed_by_megatron(model) is None:
        restore_model(model, folder, index, adapter_only, manifest)
        return
    from accelerate.utils import load_fsdp_model

    with checkpoint_step(f"loading {folder}"), loading_whole(model):
        load_fsdp_model(
            accelerator.state.fsdp_plugin, accelerator, model, str(folder), index, adapter_only=adapter_only
        )


def load_optimizer(
    accelerator: Accelerator, optimizer: Any, model: nn.Module, folder: Path, index: int, manifest: Manifest | None
) -> None:
    """Load the state of a prepared optimizer."""
    if managed_by_megatron(model) is None:
        restore_optimizer(raw_optimizer(optimizer), model, folder, index, manifest)
        return
    from accelerate.utils import load_fsdp_optimizer

    with checkpoint_step(f"loading {folder}"):
        load_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, str(folder), index)


def finish(save: StagedSave, manifest: Manifest, tasks: list[Task], background: bool, afterwards: Any = None) -> None:
    """Write what was collected and complete the directory, now or in the background.

    Args:
        save: from :func:`stage`.
        manifest: what :func:`describe` returned.
        tasks: what writes the large files.
        background: return at once; a thread does it.
        afterwards: called on each rank when the checkpoint is complete.

    Raises:
        CheckpointError: on all ranks; the directory is what it was before, or recognisably incomplete.
    """
    group = background_group() if background else None

    def work() -> None:
        try:
            for task in tasks:
                task(group)
            commit(save, manifest, group)
        except BaseException:
            roll_back(save, group)
            raise
        logger.info("saved the checkpoint %s", save.folder)
        if afterwards is not None:
            with checkpoint_step(f"deleting old checkpoints beside {save.folder}", group):
                afterwards()

    start(work) if background else work()


def load_random_state(
    accelerator: Accelerator, folder: Path, manifest: Manifest | None, file: str
) -> Mapping[str, Any]:
    """Restore this rank's random state, or on another mesh the one that it is given by :func:`.random_states.origin`.

    Args:
        accelerator: of this run.
        folder: the checkpoint.
        manifest: of the checkpoint, None if it has none; then the mesh is taken to be the same.
        file: name with ``{rank}`` in the place of the rank that saved it.

    Returns:
        The content of the file, empty if a checkpoint without a manifest lacks it.
    """
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
    """A scheduler's state, counted in the steps of this run.

    A prepared scheduler advances once per data-parallel rank and optimizer step; what counts is the number of optimizer
    steps.
    """
    if manifest is None or repeats == manifest.data_parallel_size:
        return state

    def convert(values: dict[str, Any]) -> dict[str, Any]:
        result = dict(values)
        for name in ("last_epoch", "_step_count"):
            if isinstance(result.get(name), int):
                first = 0 if name == "last_epoch" else 1  # the constructor counts as a step
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
    """Like ``Accelerator.save_state``: the same files, and a manifest when all of them are there.

    A complete checkpoint in ``output_dir`` stays on the disk until the new one is complete. With ``async_save`` the
    weights and the optimizer's state are copied and written in the background.
    """
    from accelerate.checkpointing import save_accelerator_state, save_custom_state

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
    save = stage(folder)
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
            for hook in self._save_model_state_pre_hook.values():
                hook(self._models, [], str(folder))
            save_accelerator_state(
                str(folder),
                [],
                [],
                self._schedulers,
                self._dataloaders,
                self.state.process_index,
                self.step,
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
    """Write at once, before the next state is gathered, or in the background."""
    if how.copy:
        later.append(task)
    else:
        task(None)


def _model_of(accelerator: Accelerator, optimizer: Any, index: int) -> nn.Module:
    record = attached_to(raw_optimizer(optimizer))
    return record.context.model if record is not None else accelerator._models[min(index, len(accelerator._models) - 1)]


def load_state(
    self: Accelerator, input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **kwargs: Any
) -> None:
    """Like ``Accelerator.load_state``: on any mesh, with verified files, and without running code from one.

    Raises:
        CheckpointError: on all ranks, naming the file or key. Where its message does not say that nothing was loaded,
            a part of the checkpoint may have been: do not train on.
    """
    from accelerate.checkpointing import load_accelerator_state

    wait_for_saves()
    with checkpoint_step("load_state"):
        unknown = set(kwargs) - {"map_location"}  # values go straight to where the model is
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
    manifest = verify(folder)
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
    states = load_random_state(self, folder, manifest, "random_states_{rank}.pkl")
    if "step" in states:
        self.step = states["step"]


def _pace(scheduler: Any, manifest: Manifest | None) -> int:
    """Steps of the scheduler per optimizer step; one that is not tied to the optimizer is left as it was."""
    tied = scheduler.step_with_optimizer and getattr(scheduler, "limited", not scheduler.split_batches)
    if not tied:
        return manifest.data_parallel_size if manifest is not None else 1
    return int(getattr(scheduler, "repeats", 1))


def _load_custom_states(accelerator: Accelerator, folder: Path) -> None:
    """The states of ``register_for_checkpointing``, which Accelerate loads without ``weights_only``."""
    found = sorted(folder.glob("custom_checkpoint_*.pkl"))
    if len(found) != len(accelerator._custom_objects):
        raise CheckpointError(
            f"{folder} holds {len(found)} states of objects registered with register_for_checkpointing, but "
            f"{len(accelerator._custom_objects)} are registered now. Register the same objects in the same order."
        )
    for index, custom in enumerate(accelerator._custom_objects):
        custom.load_state_dict(load_plain(folder / f"custom_checkpoint_{index}.pkl"))


def end_training(self: Accelerator) -> None:
    """Like ``Accelerator.end_training``, which closes the process group that a save in the background still needs."""
    wait_for_saves()
    type(self).end_training(self)


def load_state_in_one_process(self: Accelerator, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
    """Like ``Accelerator.load_state``, which in a process without a process group cannot read what a mesh has saved."""
    folder = None if input_dir is None else Path(os.path.expanduser(input_dir))
    if folder is None or not (
        any(folder.glob("pytorch_model_fsdp*")) or any(folder.glob(".previous/pytorch_model_fsdp*"))
    ):
        type(self).load_state(self, input_dir, *args, **kwargs)
        return
    load_state(self, input_dir, *args, **kwargs)
