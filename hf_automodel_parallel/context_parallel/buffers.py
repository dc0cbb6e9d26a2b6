"""The context manager that shards a batch along the sequence (``accelerator.maybe_context_parallel``).

Also the checks around it: all ranks of a cp group have the same batch, and results that are gathered for metrics were
not computed on sequence shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from .. import compat
from ..core.ranks import gather_tensors, raise_on_all_ranks
from ..errors import ConfigError, PrepareError, UnsupportedError
from .layout import Layout


@dataclass(frozen=True)
class Active:
    """The context that is entered: forwards in it see sequence shards.

    Attributes:
        length: of the full sequences.
        originals: id of a buffer -> its full tensor.
    """

    length: int
    originals: Mapping[int, torch.Tensor]

    def full(self, tensor: Any, dim: int) -> torch.Tensor | None:
        """``tensor`` with full sequences along ``dim``; None if it is neither a buffer nor full itself."""
        if isinstance(tensor, torch.Tensor) and tensor.ndim > dim and tensor.shape[dim] == self.length:
            return tensor
        return self.originals.get(id(tensor))


_active: Active | None = None

#: Relative difference of one result between ranks that is still rounding (kernels with atomics).
_SAME_RESULT = 1e-2


def active() -> Active | None:
    """The active context, None outside of ``maybe_context_parallel``."""
    return _active


@contextmanager
def sharded_buffers(
    mesh: DeviceMesh,
    buffers: list[torch.Tensor] | None,
    dims: list[int] | None,
    no_restore: set[torch.Tensor] | None,
) -> Iterator[None]:
    """Within the block, each of ``buffers`` holds its sequence shard on this rank.

    The tensor objects change their storage (``Tensor.set_``), so all references to them see the shard. Other views of
    the old storage keep the full tensor; torch's own context overwrites it.

    Args:
        mesh: the cp axis.
        buffers: the tensors of the batch, all of one length S along their ``dims``, a multiple of 2 * cp.
        dims: the sequence dimension of each.
        no_restore: buffers that may stay sharded. The others are restored after the block.

    Raises:
        AutoParallelError: on all ranks, before anything has changed: unsuitable buffers, or ranks of a cp group with
            different batches.
    """
    global _active
    layout = Layout(mesh.get_local_rank(), mesh.size())
    error: Exception | None = None
    unique: dict[int, tuple[torch.Tensor, int]] = {}
    try:
        unique = _checked(layout, buffers, dims, no_restore)
    except Exception as caught:
        error = caught
    prints = [number for tensor, _ in unique.values() for number in _fingerprint(tensor)]
    # One collective carries both the errors and the fingerprints of the batch.
    everyone = _agree(error, torch.stack(prints).sum(0) if prints else torch.zeros(2, dtype=torch.float64))
    _check_same_batch(everyone, mesh)
    length = next(tensor.shape[dim] for tensor, dim in unique.values())
    # detach() keeps the old storage alive; set_() below replaces the storage of the tensor object itself.
    originals = {key: tensor.detach() for key, (tensor, _) in unique.items()}
    with torch.no_grad():
        for tensor, dim in unique.values():
            tensor.set_(layout.shard(tensor, dim))  # type: ignore[call-overload]
    _active = Active(length, originals)
    try:
        yield
    finally:
        _active = None
        kept = {id(tensor) for tensor in no_restore or ()}
        with torch.no_grad():
            for key, (tensor, _) in unique.items():
                if key not in kept:
                    tensor.set_(originals[key])  # type: ignore[call-overload]


def _checked(
    layout: Layout, buffers: list[torch.Tensor] | None, dims: list[int] | None, no_restore: set[torch.Tensor] | None
) -> dict[int, tuple[torch.Tensor, int]]:
    """The buffers with their sequence dimensions, by ``id``, each once (a batch may list one tensor twice)."""
    where = f"maybe_context_parallel (cp_size={layout.size})"
    if _active is not None:
        raise PrepareError(
            f"{where} was entered inside of another one; a batch can be sharded once. Leave the outer one."
        )
    if not buffers or not dims or len(buffers) != len(dims):
        raise ConfigError(
            f"{where}: buffers has {len(buffers or ())} tensors and buffer_seq_dims {len(dims or ())} numbers. Give "
            "the tensors of the batch (input_ids, labels, shift_labels, position_ids) and the sequence dimension of "
            "each, usually 1."
        )
    unique: dict[int, tuple[torch.Tensor, int]] = {}
    for tensor, dim in zip(buffers, dims, strict=True):
        if not isinstance(tensor, torch.Tensor) or not -tensor.ndim <= dim < tensor.ndim:
            raise ConfigError(f"{where}: {type(tensor).__name__} with sequence dimension {dim} is no buffer to shard.")
        if tensor.requires_grad:
            raise ConfigError(f"{where}: a buffer requires gradients; shard what it is computed from.")
        if unique.setdefault(id(tensor), (tensor, dim))[1] != dim:
            raise ConfigError(f"{where}: one tensor is given twice, with different sequence dimensions.")
    foreign = [tensor for tensor in no_restore or () if id(tensor) not in unique]
    if foreign:
        raise ConfigError(f"{where}: no_restore_buffers has {len(foreign)} tensors that are not in buffers.")
    lengths = {tensor.shape[dim] for tensor, dim in unique.values()}
    if len(lengths) > 1:
        raise ConfigError(f"{where}: the buffers have sequences of different lengths, {sorted(lengths)}.")
    length = lengths.pop()
    if length == 0 or length % layout.multiple:
        raise ConfigError(
            f"{where}: a sequence of {length} tokens cannot be split into {layout.multiple} equal chunks (two per "
            f"rank). Pad or cut the sequences to a multiple of {layout.multiple} (pad_to_multiple_of={layout.multiple} "
            f"in a data collator; labels of -100 and no attention_mask for what is padded at the end)."
        )
    return unique


def _fingerprint(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Sum and position-weighted sum, float64 of shape (2,); the weights distinguish permuted values."""
    flat = tensor.detach().double().reshape(-1).nan_to_num()
    weights = torch.linspace(1.0, 2.0, flat.numel(), dtype=torch.float64, device=flat.device)
    yield torch.stack([flat.sum(), (flat * weights).sum()])


def _agree(error: Exception | None, numbers: torch.Tensor) -> torch.Tensor:
    """All-gather ``numbers``, (k,) to (world, k), and raise on all ranks if one has an ``error``."""
    mine = torch.cat([torch.tensor([float(error is not None)], dtype=torch.float64), numbers.cpu()])
    table = gather_tensors(mine).cpu()
    if table[:, 0].any():
        with raise_on_all_ranks("context parallelism"):
            if error is not None:
                raise error
    return table[:, 1:]


def raise_together(error: Exception | None) -> None:
    """Raise on all ranks if one of them has an ``error``; the other ranks' error quotes it. Collective."""
    _agree(error, torch.zeros(0, dtype=torch.float64))


def _check_same_batch(everyone: torch.Tensor, mesh: DeviceMesh) -> None:
    """Raise on all ranks unless all ranks of each cp group have the same buffers. ``everyone``: (world, 2)."""
    root, name = compat.root_mesh(mesh), mesh.mesh_dim_names[0]  # type: ignore[index]
    groups = root.mesh.cpu().movedim(root.mesh_dim_names.index(name), -1).reshape(-1, mesh.size())
    by_group = everyone[groups]  # (groups, cp, 2)
    if torch.allclose(by_group, by_group[:, :1].expand_as(by_group), rtol=1e-9, atol=0.0):
        return
    raise PrepareError(
        "the ranks of a cp group were given different batches, so that their shards are of different sequences. "
        "Likely cause: rows chosen by process_index, or a data loader with a DistributedSampler. Remedy: pass a plain "
        "data loader through accelerator.prepare, which gives all ranks of a cp group the same rows."
    )


def check_whole(copies: torch.Tensor) -> None:
    """Raise if the ranks of a cp group have different results: then they were computed on sequence shards.

    Args:
        copies: gathered results, (groups, cp, ...), equal on all ranks.

    Raises:
        UnsupportedError: on all ranks.
    """
    numbers = copies.double().nan_to_num()
    difference = (numbers - numbers[:, :1]).norm()
    if bool(difference <= _SAME_RESULT * numbers.norm()):
        return
    raise UnsupportedError(
        "gather_for_metrics: the ranks of a cp group have different results for the same samples, because each "
        "computed a shard of every sequence. In maybe_context_parallel only the loss is complete. Evaluate logits "
        "outside of it, where each rank computes full sequences; with the Trainer leave out compute_metrics "
        "(prediction_loss_only=True)."
    )
