"""Parameters that FSDP2 does not manage: each data-parallel rank has a replica.

These are parameters without dimensions (CLIP's ``logit_scale``), which FSDP2 cannot shard, and adapters that are
replicated over the data-parallel ranks (:mod:`.adapter_placement`). Between forwards a replica is a DTensor on the mesh
of the other parameters, replicated over its data-parallel axes, so that optimizers, clipping and checkpoints see one
kind of parameter. On the tp axis it has the placement that the plan gives it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from .. import compat
from .options import on_device

#: Module and name of a parameter; by name, because filling a model from its files replaces the objects.
Slot = tuple[nn.Module, str]


def scalar_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter without dimensions of ``model``; a tied one has an entry for each of its names."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.ndim == 0}


def replicas(model: nn.Module, adapters: Collection[str]) -> dict[str, nn.Parameter]:
    """Name -> parameter of ``model`` that every data-parallel rank has a replica of; a tied one has several names.

    Args:
        model: before or after sharding.
        adapters: first names of the adapters among them.
    """
    chosen = {p for name, p in model.named_parameters() if name in adapters}
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.ndim == 0 or p in chosen}


def move_replicas(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> set[nn.Parameter]:
    """The ``parameters``, moved to the device of ``mesh``: FSDP2 does not move what it ignores."""
    moved = set(parameters)
    for parameter in moved:
        if not isinstance(parameter, DTensor) and parameter.device.type != "meta":
            parameter.data = parameter.data.to(on_device(mesh.device_type))
    return moved


def make_replicas(model: nn.Module, names: Iterable[str], mesh: DeviceMesh) -> list[Slot]:
    """Make parameters of ``model`` DTensors that are replicated over the data-parallel axes, in place.

    Args:
        model: sharded by FSDP2, which has ignored these parameters; plain, or DTensors on the tp axis.
        names: all names of the parameters.
        mesh: the data-parallel axes.

    Returns:
        One module and name for each parameter.
    """
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor) and p.ndim]
    whole = max(meshes, key=lambda m: m.ndim, default=mesh)  # a replicated tower is on the tp axis alone
    made: dict[nn.Parameter, nn.Parameter] = {}
    slots = []
    for name in names:
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter: Any = owner._parameters[key]
        if parameter not in made:
            on_tp = isinstance(parameter, DTensor)
            local = parameter.to_local() if on_tp else parameter
            placements = list(parameter.placements) if on_tp else []
            replica = DTensor.from_local(
                local.detach(),
                whole,
                [*[Replicate()] * (whole.ndim - len(placements)), *placements],
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            made[parameter] = nn.Parameter(replica, parameter.requires_grad)
            slots.append((owner, key))
        owner._parameters[key] = made[parameter]
    return slots


class _Layout(NamedTuple):
    """Where the gradients of one dtype are in a flat buffer.

    Attributes:
        buffer: the gradients, then one number per parameter that counts the ranks on which it has a gradient.
        views: the part of the buffer for each parameter's gradient on this rank, in its local shape.
        means: a part of the buffer and the number of summands of its elements.
        counts: the numbers at the end.
    """

    buffer: torch.Tensor
    views: list[torch.Tensor]
    means: list[tuple[torch.Tensor, int]]
    counts: torch.Tensor


class ReplicaGradients:
    """Averages the gradients of replicas over the data-parallel ranks, by one flat all-reduce per dtype.

    As for :class:`~..tensor_parallel.grad_sync.PartialGradients`, the average is due before gradients are used: at the
    end of a backward, or, if the caller says so (:attr:`deferred`), when it calls :meth:`flush`. An average leaves what
    has been averaged before as it is. So gradients may accumulate over backwards, and flushing twice is safe.

    Every rank reduces all replicas, with zeros where it has no gradient, because ranks may have used other ones. A
    replica that any rank used has a gradient on all ranks afterwards, and one that no rank used has none, as in one
    process.

    After :meth:`join_axes` the same all-reduce completes Partial gradients over the tp axis. Of gradients that differ
    between tp ranks and are complete, each tp rank has a part of the buffer to itself.

    Attributes:
        deferred: the running backward is followed by a flush, so that gradients can wait for the last micro-batch.

    Args:
        units: the FSDP units, all of which run their post-backward in every backward on all ranks.
        slots: module and name of each replica.
        mesh: the data-parallel axes, of several ranks.
        reduce_dtype: dtype in which FSDP2 reduces, or None; gradients are not reduced in a narrower one than theirs.
    """

    deferred = False

    def __init__(
        self, units: Iterable[Any], slots: list[Slot], mesh: DeviceMesh, reduce_dtype: torch.dtype | None
    ) -> None:
        self._slots = list(slots)
        self._device = on_device(mesh.device_type)
        self._dp_size, self._reduce_dtype = mesh.size(), reduce_dtype
        # None means all ranks.
        self._groups: list[dist.ProcessGroup | None] = [
            mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1
        ]
        self._tp_rank, self._tp_size = 0, 1
        self._partial: set[Slot] = set()
        self._layouts: dict[tuple[int, ...], list[tuple[list[int], _Layout]]] = {}
        self._pending = False  # there are gradients that have not been averaged
        self._queued = False  # a callback for the end of the running backward is registered
        self.watch(units)

    def watch(self, units: Iterable[Any]) -> None:
        """Notice backwards through further FSDP units."""
        for unit in units:
            compat.before_reduction(unit, self._reached, only_if_reducing=True)

    def watch_outputs(self, model: nn.Module) -> None:
        """Notice backwards through a model whose parameters are all replicas, so that FSDP2 has nothing to reduce."""

        def watch(_: nn.Module, args: Any, output: Any) -> None:
            for tensor in compat.tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._reached())

        model.register_forward_hook(watch)

    def add(self, slots: Iterable[Slot], partial: Collection[nn.Parameter]) -> None:
        """Average the replicas in ``slots``, too; see :meth:`join_axes`."""
        added = list(slots)
        self._slots += added
        self._partial |= {(owner, key) for owner, key in added if owner._parameters[key] in partial}
        self._layouts.clear()

    def join_axes(
        self, group: dist.ProcessGroup | None, tp_mesh: DeviceMesh | None, partial: Collection[nn.Parameter]
    ) -> None:
        """Reduce over all axes by one collective: the data-parallel axes, and the tp axis for Partial gradients.

        Args:
            group: the ranks of all these axes; None means all ranks.
            tp_mesh: the tp axis, None without one.
            partial: the replicas with a Partial gradient, which comes multiplied by the size of the tp axis.
        """
        self._groups = [group]
        if tp_mesh is not None:
            self._tp_rank, self._tp_size = tp_mesh.get_local_rank(), tp_mesh.size()
        self._partial = {(owner, key) for owner, key in self._slots if owner._parameters[key] in partial}
        self._layouts.clear()

    @property
    def parameters(self) -> set[nn.Parameter]:
        """The replicas."""
        return {owner._parameters[key] for owner, key in self._slots}  # type: ignore[misc]

    def _reached(self) -> None:
        """Before the reduction of each unit, on all ranks and whether or not it has gradients."""
        self._pending = True
        if not self.deferred and not self._queued:
            self._queued = True
            compat.after_backward(self.flush)

    @torch.no_grad()
    def flush(self) -> None:
        """Average the outstanding gradients; without a backward since the last flush, do nothing.

        Collective over the data-parallel ranks (and the tp axis, if joined), which run the same backwards.
        """
        self._queued = False  # also where an error has ended the backward before its callbacks
        if not self._pending:
            return
        self._pending = False
        held = [owner._parameters.get(key) for owner, key in self._slots]
        trained = tuple(index for index, p in enumerate(held) if p is not None and p.requires_grad)
        if trained not in self._layouts:
            self._layouts = {trained: self._lay_out(trained)}
        for indices, layout in self._layouts[trained]:
            self._average([held[index] for index in indices], layout)  # type: ignore[misc]

    def _average(self, parameters: list[nn.Parameter], layout: _Layout) -> None:
        gradients = [None if p.grad is None else _local(p.grad) for p in parameters]
        layout.buffer.zero_()
        present = [(view, g) for view, g in zip(layout.views, gradients, strict=True) if g is not None]
        if present:
            compat.copy_each([view for view, _ in present], [g for _, g in present])
        if len(present) == len(parameters):
            layout.counts.fill_(1)
        else:
            layout.counts.copy_(torch.tensor([float(g is not None) for g in gradients]))
        for group in self._groups:
            dist.all_reduce(layout.buffer, group=group)
        for part, summands in layout.means:
            part.div_(summands)
        if len(present) < len(parameters):  # reading the numbers waits for the device
            for parameter, view, used in zip(parameters, layout.views, layout.counts.tolist(), strict=True):
                if parameter.grad is None and used:
                    parameter.grad = torch.zeros_like(parameter)
                    present.append((view, _local(parameter.grad)))
        if present:
            compat.copy_each([g for _, g in present], [view for view, _ in present])

    def _lay_out(self, trained: tuple[int, ...]) -> list[tuple[list[int], _Layout]]:
        """The layout of each dtype, with the indices of its parameters; the same one on every rank."""
        by_dtype: dict[torch.dtype, list[int]] = defaultdict(list)
        for index in trained:
            owner, key = self._slots[index]
            dtype = owner._parameters[key].dtype  # type: ignore[union-attr]
            by_dtype[torch.promote_types(dtype, self._reduce_dtype or dtype)].append(index)
        return [(indices, self._layout(indices, dtype)) for dtype, indices in by_dtype.items()]

    def _layout(self, indices: list[int], dtype: torch.dtype) -> _Layout:
        parameters: list[Any] = [owner._parameters[key] for owner, key in (self._slots[index] for index in indices)]
        partial = [self._slots[index] in self._partial for index in indices]
        sizes = [self._largest_shard(p) for p in parameters]
        summed = sum(size for size, is_partial in zip(sizes, partial, strict=True) if is_partial)
        own = sum(sizes) - summed  # elements that each tp rank has for itself
        end = summed + self._tp_size * own
        buffer = torch.zeros(end + len(indices), dtype=dtype, device=self._device)
        offsets = {True: 0, False: summed + self._tp_rank * own}
        views = []
        for parameter, size, is_partial in zip(parameters, sizes, partial, strict=True):
            local, start = _local(parameter), offsets[is_partial]
            views.append(buffer[start : start + local.numel()].view(local.shape))
            offsets[is_partial] = start + size
        means = [(buffer[:summed], self._dp_size * self._tp_size), (buffer[summed:end], self._dp_size)]
        return _Layout(buffer, views, [(part, n) for part, n in means if part.numel()], buffer[end:])

    def _largest_shard(self, parameter: Any) -> int:
        """The number of elements of the largest shard on the tp axis."""
        placement: Any = parameter.placements[-1] if self._tp_size > 1 else Replicate()
        if placement.is_replicate():
            return parameter.numel()
        rows = parameter.shape[placement.dim]
        return parameter.numel() // max(rows, 1) * -(-rows // self._tp_size)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
