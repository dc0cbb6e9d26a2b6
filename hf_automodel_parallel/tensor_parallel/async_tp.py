"""Async tensor parallelism: overlap the collectives of sequence parallelism with the matrix products beside them.

Inductor replaces an all-gather before a matrix product, and a reduce-scatter after one, by an operator that exchanges
chunks through symmetric memory while other chunks are multiplied (Wang et al., 2023, "Overlap communication with
dependent computation via decomposition"; torch's ``symm_mem`` operators). It needs such pairs in one compiled graph,
and GPUs that can read each other's memory.

It is limited to the tp group in two ways: the inductor option is set for the compiled layers only and not in the global
config, and symmetric memory is enabled for the tp group only, without which inductor leaves a collective as it is.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import compat
from ..errors import ConfigError, UnsupportedError

_FIELD = "async_tensor_parallel=True"


def check_async_tensor_parallel(
    mesh: DeviceMesh | None, sequence_parallel: bool, compile_options: dict[str, Any] | None, device: torch.device
) -> None:
    """Raise unless the collectives of tensor parallelism can be overlapped. No collective.

    Args:
        mesh: the tp axis, None without tensor parallelism.
        sequence_parallel: activations outside of attention and MLP are sharded along the sequence.
        compile_options: options of ``torch.compile`` for the layers, None for eager.
        device: where this rank computes.

    Raises:
        ConfigError: an option is missing, or contradicts.
        UnsupportedError: the machine cannot do it.
    """
    if mesh is None:
        raise ConfigError(
            f"{_FIELD} with tp_size=1: there are no collectives to overlap. Remove it, or give a tp_size."
        )
    if not sequence_parallel:
        raise ConfigError(
            f"{_FIELD} needs sequence_parallel=True: all-gathers before and reduce-scatters after matrix products can "
            "be split into chunks, the all-reduces of plain tensor parallelism cannot. Set it, or remove "
            "async_tensor_parallel."
        )
    if compile_options is None:
        raise ConfigError(
            f"{_FIELD} needs compile=True: it is done by the compiler. Set it, or remove async_tensor_parallel."
        )
    backend = compile_options.get("backend", "inductor")
    if backend != "inductor":
        raise ConfigError(f"{_FIELD} with compile={backend!r}: only inductor does it. Use compile=True.")
    if compile_options.get("mode") not in (None, "default"):
        raise ConfigError(
            f"{_FIELD} with torch.compile's mode={compile_options['mode']!r}: it is one of inductor's options, and "
            f"torch takes either a mode or options. Leave out the mode."
        )
    if device.type != "cuda":
        raise UnsupportedError(
            f"{_FIELD} on {device.type}: it needs the symmetric memory of CUDA devices. Remove it; the same is "
            "computed without."
        )
    missing = _why_no_symmetric_memory(mesh, device)
    if missing:
        raise UnsupportedError(f"{_FIELD} needs symmetric memory over the tp group, and {missing}. Remove it.")


def _why_no_symmetric_memory(mesh: DeviceMesh, device: torch.device) -> str:
    """Why the GPUs of the tp group cannot read each other's memory; "" if no reason is known."""
    if not dist.is_nccl_available():
        return "this build of torch has no NCCL"
    ranks = sorted(mesh.mesh.flatten().tolist())
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    # torchrun numbers the ranks of a machine consecutively.
    if ranks[0] // local != ranks[-1] // local:
        return f"ranks {ranks[0]} and {ranks[-1]} of one group are on different machines ({local} ranks on each)"
    mine = torch.cuda.current_device() if device.index is None else device.index
    others = [rank % local for rank in ranks if rank % local != mine]
    if torch.cuda.device_count() >= local:  # else each process sees its own device only
        blocked = next((other for other in others if not torch.cuda.can_device_access_peer(mine, other)), None)
        if blocked is not None:
            return f"GPU {mine} cannot access the memory of GPU {blocked}"
    return ""


def with_async_tensor_parallel(compile_options: dict[str, Any], group: dist.ProcessGroup) -> dict[str, Any]:
    """Enable symmetric memory for ``group``, and return ``compile_options`` with overlapped collectives."""
    compat.enable_symmetric_memory(group)
    # check_async_tensor_parallel has let through no mode but the default, and torch takes no mode beside options.
    plain = {key: value for key, value in compile_options.items() if key != "mode"}
    return {**plain, "options": {**(plain.get("options") or {}), compat.ASYNC_TENSOR_PARALLEL_OPTION: True}}
