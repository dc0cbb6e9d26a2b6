"""Gathers full tensors of a sharded model, one at a time, on the rank that writes files.

The writer runs the libraries' code, which decides at run time which tensors it needs, and its disk may fill up in the
middle. So the other ranks run a server loop: the writer broadcasts the index of the tensor to gather next, and in the
end that it is done or has failed. Also the dtypes that parameters have in files, where those differ from training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from .. import compat
from ..core.ranks import communication_device
from ..core.shard_layout import chunks_at, chunks_of
from ..errors import ExportError
from ..fsdp.shard import fsdp_units

#: Name in the state dict -> the full tensor, on the CPU.
Fetch = Callable[[str], torch.Tensor]
#: Name in the state dict -> (shape, dtype), in its order.
Shapes = Mapping[str, tuple[Iterable[int], torch.dtype]]
#: Called with name and bytes of each tensor that is written.
Progress = Callable[[str, int], None]
T = TypeVar("T")

#: Values that the writer broadcasts in place of an index.
_DONE, _FAILED = -1, -2
#: Parts of a full tensor; a shard that is not contiguous in it is broadcast in pieces of at most one part.
_PIECES = 32
#: Attribute of a model: dtype in files by parameter name.
_FILE_DTYPES = "_automodel_parallel_file_dtypes"


def keep_file_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Store on ``model`` the dtypes in files of parameters that were upcast to float32 for training."""
    model.__dict__[_FILE_DTYPES] = dict(dtypes)


def file_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtypes of :func:`keep_file_dtypes`, under every name of a parameter (tied parameters have several)."""
    kept = model.__dict__.get(_FILE_DTYPES)
    if not kept:
        return {}
    # Kept by one name of each parameter; the state dict also has the further names of tied ones.
    of_parameter = {id(p): kept[name] for name, p in model.named_parameters() if name in kept}
    return {
        name: of_parameter[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in of_parameter
    }


def shapes_of(tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype] | None = None) -> Shapes:
    """Shapes and dtypes of ``tensors``; ``dtypes`` overrides some dtypes, by name."""
    return {name: (t.shape, (dtypes or {}).get(name, t.dtype)) for name, t in tensors.items()}


def cast(fetch: Fetch, shapes: Shapes) -> Fetch:
    """``fetch`` that casts to the dtypes of ``shapes``."""
    return lambda name: fetch(name).to(shapes[name][1])


def sharded_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of ``model.state_dict()``, detached; with FSDP2 shards, whether a unit was unsharded or not."""
    # An unsharded unit would put plain full parameters into the state dict instead of DTensors.
    for unit in fsdp_units(model):
        unit.reshard()
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


class ShardedState:
    """The state dict of a sharded model, with the same names in the same order on all ranks.

    Args:
        model: sharded; its FSDP units are resharded.
        writes: this rank may be a writer. megatron-fsdp's ``state_dict()`` returns full tensors, because its uneven
            shards are not DTensors; ranks that do not write drop them.
    """

    def __init__(self, model: nn.Module, writes: bool) -> None:
        self.tensors = sharded_tensors(model)
        if not any(isinstance(value, DTensor) for value in self.tensors.values()):
            self.tensors = {name: value.cpu() for name, value in self.tensors.items()} if writes else {}
        self._names = list(self.tensors)
        self._index = {name: index for index, name in enumerate(self._names)}
        self._device = communication_device()

    def led_by(self, writer: int, work: Callable[[Fetch], T]) -> T | None:
        """Run ``work`` on the rank ``writer`` while the other ranks serve its gathers; collective.

        Args:
            writer: global rank.
            work: called with a function that gathers the full tensor of a name on the CPU.

        Returns:
            The result of ``work`` on the writer, None on the other ranks.

        Raises:
            ExportError: on the other ranks, with the message of the writer's error, if ``work`` raised.
        """
        if dist.get_rank() != writer:
            self._serve(writer)
            return None
        with self._leading() as fetch:
            return work(fetch)

    @contextmanager
    def _leading(self) -> Iterator[Fetch]:
        try:
            yield self._fetch
        except BaseException as error:
            self._broadcast(_FAILED)
            dist.broadcast_object_list([f"{type(error).__name__}: {error}"], src=dist.get_rank(), device=self._device)
            raise
        self._broadcast(_DONE)

    def _serve(self, writer: int) -> None:
        """Take part in each gather until ``writer`` is done; raise :class:`ExportError` if it failed."""
        command = torch.zeros(1, dtype=torch.int64, device=self._device)
        while True:
            dist.broadcast(command, src=writer)
            index = int(command.item())
            if index == _DONE:
                return
            if index == _FAILED:
                message: list[str] = [""]
                dist.broadcast_object_list(message, src=writer, device=self._device)
                raise ExportError(f"saving failed on rank {writer}: {message[0]}")
            self._full_tensor(self._names[index])

    def _broadcast(self, index: int) -> None:
        dist.broadcast(torch.tensor([index], dtype=torch.int64, device=self._device), src=dist.get_rank())

    def _fetch(self, name: str) -> torch.Tensor:
        if isinstance(self.tensors[name], DTensor):
            self._broadcast(self._index[name])
        return self._full_tensor(name).cpu()

    def _full_tensor(self, name: str) -> torch.Tensor:
        return full_tensor(self.tensors[name])


@torch.no_grad()
def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in full, on the device of its mesh; itself if it is not a DTensor. Collective over its mesh."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    # Under FSDP2's CPU offload shards are on the CPU, while collectives run on the device.
    if tensor.device.type != mesh.device_type:
        tensor = _with_local(tensor, tensor.to_local().to(mesh.device_type))
    compat.mark_packed_placements([tensor])
    return tensor.full_tensor()


@torch.no_grad()
def cast_shard(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in ``dtype``; of a DTensor the local shard is cast."""
    if tensor.dtype == dtype or not isinstance(tensor, DTensor):
        return tensor.to(dtype)
    return _with_local(tensor, tensor.to_local().to(dtype))


def _with_local(tensor: DTensor, local: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@torch.no_grad()
def full_tensor_by_shards(tensor: DTensor) -> torch.Tensor:
    """``tensor`` in full, like :func:`full_tensor`, with a sixteenth of its memory beside it. Collective.

    DTensor's own all-gathers, one for each mesh axis and each with a copy into order, need up to 2.5 times the full
    tensor. Here each shard is broadcast into its place: more collectives, for the few largest tensors of a model.
    """
    mesh = tensor.device_mesh
    local = tensor.to_local().to(mesh.device_type)
    axes = [axis for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    coordinate = mesh.get_coordinate()
    if not axes or coordinate is None:
        return local
    mine = list(coordinate)
    chunks_of(tensor)  # raises if the layout is not known
    full = torch.empty(tensor.shape, dtype=local.dtype, device=local.device)
    for indices in itertools.product(*(range(mesh.size(axis)) for axis in axes)):
        source = list(mine)
        for axis, index in zip(axes, indices, strict=True):
            source[axis] = index
        for chunk in chunks_at(tensor, source):
            place = chunk.of_full(full)
            in_place = place.is_contiguous()
            rows = len(place) if in_place else max(1, len(place) * (full.numel() // _PIECES) // place.numel())
            mine_here = chunk.of_local(local).split(rows) if source == mine else itertools.repeat(place)
            for part, own in zip(place.split(rows), mine_here, strict=False):
                piece = part if in_place else torch.empty_like(part, memory_format=torch.contiguous_format)
                if source == mine:
                    piece.copy_(own)
                for position, axis in enumerate(axes):
                    # Along each axis in turn; ranks off the source on a later axis receive it along that one.
                    if all(mine[later] == source[later] for later in axes[position + 1 :]):
                        root = list(mine)
                        root[axis] = source[axis]
                        dist.broadcast(piece, src=int(mesh.mesh[tuple(root)]), group=mesh.get_group(axis))
                if not in_place:
                    part.copy_(piece)
                del piece  # before the next one is made; gloo's thread may hold it a little longer
    return full
