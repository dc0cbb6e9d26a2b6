"""TRL's rollouts with vLLM: weights come from the shards one at a time, and ranks with the same rows get one result.

TRL merges adapters into the sharded model for each synchronisation and subtracts them again, which changes weights in
bfloat16 a little each time, and sends the names of modules instead of those of files. If its client fails on rank 0,
the other ranks wait in their gathers. Here a ``VLLMGeneration`` sends what
:func:`~hf_automodel_parallel.export.streaming.stream_weights` yields.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import torch

from .. import compat
from ..accelerate_plugin.prepared import prepared
from ..core.ranks import broadcast_object, raise_on_all_ranks
from ..errors import ExportError
from ..export.streaming import stream_weights

#: Attribute of a VLLMGeneration that is bound.
_BOUND = "_automodel_parallel_bound"


def bind_rollouts(trainer: Any) -> None:
    """Bind the ``vllm_generation`` of ``trainer``, if it has one for a prepared model and that is not bound yet."""
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None or _BOUND in vars(generation) or prepared(generation.model) is None:
        return
    vars(generation)[_BOUND] = True
    if getattr(generation, "mode", None) == "colocate":
        generation.generate = _once_for_each_batch(generation.generate, trainer.accelerator)
    if compat.iterates_over_weights(generation):
        _bind_weights(generation)


def _bind_weights(generation: Any) -> None:
    """Let ``generation.sync_weights`` send what :func:`stream_weights` yields."""
    model = generation.model
    streams = ExitStack()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        return streams.enter_context(closing(stream_weights(model, merged=compat.is_peft_model(model))))

    sync_weights = generation.sync_weights

    @functools.wraps(sync_weights)
    def sync(*args: Any, **kwargs: Any) -> Any:
        # A failing client holds its stream in a traceback, so the stream is closed here.
        with raise_on_all_ranks(f"{type(generation).__name__}.sync_weights()", raises=ExportError), streams:
            return sync_weights(*args, **kwargs)

    compat.bind_weights(generation, weights)
    generation.sync_weights = sync


def _once_for_each_batch(generate: Any, accelerator: Any) -> Any:
    """``generate`` with the result of the first rank with the same rows: each colocated vLLM samples on its own."""
    mesh = accelerator.torch_device_mesh
    groups = [mesh[axis].get_group() for axis in ("tp", "cp") if axis in mesh.mesh_dim_names and mesh[axis].size() > 1]
    if not groups:
        return generate

    @functools.wraps(generate)
    def once(*args: Any, **kwargs: Any) -> Any:
        with raise_on_all_ranks("generate() of the colocated vLLM", raises=ExportError):
            result = generate(*args, **kwargs)
        for group in groups:
            result = broadcast_object(result, group)
        return result

    return once
