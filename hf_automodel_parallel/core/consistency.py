"""Checks across ranks before a model is sharded: equal configs, equal structure, equal values, equal random states."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ConfigError, PrepareError
from .ranks import broadcast_from_rank_zero, broadcast_object, difference, gather_tensors
from .sharding_spec import ShardingSpec

logger = logging.getLogger(__name__)


def check_same_configs(sizes: dict[str, int], choices: dict[str, Any]) -> None:
    """Raise on all ranks unless all have the same mesh sizes and the same options that decide collectives.

    Ranks that differ would make different process groups or call different collectives, and wait forever.

    Args:
        sizes: axis -> number of ranks.
        choices: option -> value.

    Raises:
        ConfigError: with the values of rank 0 and of the first rank that differs from it.
    """
    found = difference((sizes, choices))
    if found is None:
        return
    (sizes_0, choices_0), (sizes_r, choices_r) = found.reference, found.other
    names = [name for name in choices_0 if choices_0[name] != choices_r.get(name)]
    shown = []
    for axes, options in ((sizes_0, choices_0), (sizes_r, choices_r)):
        values: dict[str, Any] = {f"{axis}_size": size for axis, size in axes.items()} if sizes_0 != sizes_r else {}
        values |= {name: options.get(name) for name in names}
        shown.append(", ".join(f"{name}={value!r}" for name, value in values.items()))
    more = f" ({len(found.ranks) - 1} more ranks differ from rank 0)" if len(found.ranks) > 1 else ""
    raise ConfigError(
        f"the ranks have different parallelism configs: {shown[0]} on rank 0, {shown[1]} on rank {found.ranks[0]}"
        f"{more}. Start all processes with the same config file, environment and arguments."
    )


def check_same_structure(
    model: nn.Module,
    spec: ShardingSpec | None = None,
    group: dist.ProcessGroup | None = None,
    choices: Mapping[str, object] | None = None,
) -> None:
    """Raise on all ranks unless all hold the same model and will shard it in the same way.

    Compares names, shapes and dtypes of parameters and buffers, tied parameters, ``requires_grad``, the sharding spec
    and the choices. The ranks exchange one digest; they exchange the full text only if the digests differ.

    Args:
        model: the model, on every rank.
        spec: its sharding spec on the tp axis; None without tensor parallelism.
        group: the ranks that hold the model; None means all.
        choices: other settings that decide which collectives run: name -> value. The ``repr`` of a value must be the
            same in all processes.

    Raises:
        PrepareError: on all ranks, with the first difference between rank 0 and the first rank that differs from it.
    """
    specs = {} if spec is None else spec.parameters
    seen: dict[int, str] = {}
    described = [
        f"{name} {tuple(p.shape)} {p.dtype} {'trainable' if p.requires_grad else 'frozen'}"
        + (f", tied to {other}" if (other := seen.setdefault(id(p), name)) != name else "")
        + (f", planned as {specs[name]}" if name in specs else "")
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    described += [f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in model.named_buffers()]
    described += [] if spec is None else spec.described()
    described += [f"option {name}={value!r}" for name, value in (choices or {}).items()]
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()
    found = difference(digest, group)
    if found is None:
        return
    ranks = found.ranks
    # All ranks compare rank 0 with the same other rank, so that all of them raise the same message.
    # Only here the full text is exchanged; it has a line for each parameter.
    compared = [broadcast_object(described, group, source) for source in (0, ranks[0])]
    alone = [sorted(set(a) - set(b)) for a, b in (compared, compared[::-1])]
    examples = [f"{lines[0]!r} on rank {rank}" for lines, rank in zip(alone, (0, ranks[0]), strict=True) if lines]
    raise PrepareError(
        f"the model is not the same on all ranks: ranks {ranks} differ from rank 0"
        + (
            f", for example in {' and '.join(examples)}"
            if examples
            else ", in the order of their parameters or buffers"
        )
        + ". Build, wrap and plan it alike, with the same options, on every rank."
    )


@torch.no_grad()
def equalize_parameters(model: nn.Module, group: dist.ProcessGroup | None = None) -> list[str]:
    """Broadcast rank 0's parameters, buffers and quantisation scales, but only those that differ across ranks.

    Ranks that initialise with different seeds (new adapters, a model built from a config) have different values. Each
    rank would shard its own. If all values are equal, the normal case, the cost is one pass over the memory and one
    small all-gather.

    Args:
        model: the model, on every rank. Tensors on the meta device are left out.
        group: the ranks that hold the model; None means all.

    Returns:
        Names of the tensors that were broadcast.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **dict(state_tensors(model))}
    tensors = {name: t for name, t in tensors.items() if t.device.type != "meta" and t.numel()}
    mine = torch.tensor([fingerprint(t) for t in tensors.values()], dtype=torch.int64).reshape(-1)
    gathered = gather_tensors(mine, group)
    changed = (gathered != gathered[0]).any(0).tolist()
    names = [name for name, flag in zip(tensors, changed, strict=True) if flag]
    for name in names:
        broadcast_from_rank_zero(tensors[name], group)
    if names:
        logger.info(
            "%d tensors differed between ranks and were set to rank 0's values: %s", len(names), ", ".join(names[:4])
        )
    return names


def state_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and tensor of the scales and code books of quantised weights (``quant_state``, bitsandbytes).

    They are neither parameters nor buffers, so ``named_parameters`` and ``named_buffers`` do not list them.
    """
    for name, module in model.named_modules():
        state: Any = getattr(module, "quant_state", None)
        for part, owner in (("quant_state", state), ("quant_state.state2", getattr(state, "state2", None))):
            for key in ("absmax", "code", "offset"):
                value = getattr(owner, key, None)
                if isinstance(value, torch.Tensor):
                    yield f"{name}.{part}.{key}", value


def fingerprint(tensor: torch.Tensor) -> int:
    """Return a signed 64-bit checksum of the raw bytes of ``tensor`` (any dtype, any device)."""
    return int(checksum(tensor))


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Like :func:`fingerprint`, as an int64 tensor without dimensions on the device of ``tensor``: waits for nothing.

    The checksum is a sum weighted by position. Equal tensors have equal checksums, also across devices.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # one element is contiguous with any stride
    rest = data.numel() % 8
    words = data[: data.numel() - rest].view(torch.int64)
    total = data[data.numel() - rest :].sum(dtype=torch.int64)
    # In the cache of a CPU; few kernels on an accelerator.
    length = min(1 << (18 if data.device.type == "cpu" else 22), max(words.numel(), 1))
    # Modulo 2**64 an odd weight is invertible: a change of a single word always changes the sum.
    weights = torch.arange(1, 2 * length, 2, dtype=torch.int64, device=data.device)
    for index, part in enumerate(words.split(length)):
        total += (part * weights[: part.numel()]).sum() * (2 * index + 1)
    return total


def synchronize_rng(tp_mesh: DeviceMesh) -> None:
    """Copy the random states (torch, numpy, Python) of the first rank of a tp group to its other ranks.

    Activations outside of sharded blocks are replicated over tp, so a dropout there must draw the same mask on each
    rank of the group, whatever seeds the ranks started with. The same holds for masks that a model or a collator draws
    with numpy or ``random``. Ranks along the data-parallel axes keep their own states.
    """
    states: list[object] = [random.getstate(), numpy.random.get_state(), torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    states = broadcast_object(states, tp_mesh.get_group())
    random.setstate(states[0])  # type: ignore[arg-type]
    numpy.random.set_state(states[1])  # type: ignore[arg-type]
    torch.set_rng_state(states[2])  # type: ignore[arg-type]
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states[3])  # type: ignore[arg-type]
