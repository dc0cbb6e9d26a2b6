"""``generate`` on a prepared model: the ranks that compute together draw the same tokens and stop after the same one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from .. import compat
from ..errors import PrepareError
from ..plan.names import unwrapped
from ..synchronize import agreement, fingerprint, synchronize_rng

_SHARED = "_automodel_parallel_generate"


def guard_generation(model: nn.Module, tp_mesh: DeviceMesh | None, shared_parameters: bool) -> None:
    """Make ``model.generate`` safe on every mesh, on this instance alone; a model that cannot generate is left as it is.

    * Data-parallel ranks that share parameters have to run equally many forwards, however long their texts get.
      transformers does this (``synced_gpus``) for models that it knows to be under FSDP.
    * The ranks of a tp group need one prompt and one random state: with tokens of their own, each would go on with a cache
      that fits another text, and the first to stop would leave the others waiting. A script may have seeded each process
      by its index (Accelerate's ``set_seed(..., device_specific=True)``).

    Args:
        model: the prepared model, PEFT-wrapped or not.
        tp_mesh: the tp axis, None without one.
        shared_parameters: data-parallel ranks hold parts of one model (dp_shard or cp of more than one rank).
    """
    inner, _ = unwrapped(model)
    if not hasattr(inner, "generate"):
        return
    if inner is not model and hasattr(model, "generate"):
        # PEFT's wrapper hands generate() to the model inside, past the wrapper's forward, which is the root of FSDP2.
        register_fsdp_forward_method(model, "generate")
    if shared_parameters:
        compat.mark_as_fsdp_managed(inner)
    if tp_mesh is None or _SHARED in inner.__dict__:
        return
    original: Callable[..., Any] = inner.generate  # type: ignore[assignment]
    # All ranks meet in a generation that gathers parameters; otherwise each tp group generates when it likes to.
    group = None if shared_parameters else tp_mesh.get_group()

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with agreement("generate", group):
            _check_same_prompt([*enumerate(args), *kwargs.items()], tp_mesh)
        synchronize_rng(tp_mesh)
        return original(*args, **kwargs)

    inner.generate = generate  # type: ignore[assignment]
    inner.__dict__[_SHARED] = True


def _check_same_prompt(arguments: list[tuple[int | str, Any]], tp_mesh: DeviceMesh) -> None:
    group = tp_mesh.get_group()
    mine = {
        "inputs" if name == 0 else str(name): (tuple(value.shape), fingerprint(value))
        for name, value in arguments
        if isinstance(value, torch.Tensor)
    }
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    names = sorted({name for theirs in everyone for name in theirs})
    differ = [name for name in names if any(theirs.get(name) != everyone[0].get(name) for theirs in everyone)]
    if differ:
        shapes = [theirs.get(differ[0], ("absent",))[0] for theirs in everyone]
        raise PrepareError(
            f"generate() was given different {', '.join(differ)} on the ranks of one tp group (shapes {shapes}): they compute "
            f"one text together. Deal the prompts by data-parallel rank (a data loader that went through accelerator.prepare "
            f"does), not by process_index."
        )
