"""Whole tensors on the rank that writes, one at a time: that rank asks, all others help.

The writing rank runs the libraries' code, which no other rank could follow step by step, and its disk may be full in
the middle. So it leads: before each tensor it tells the others which one, and at the end that it is done or has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.ranks import communication_device
from ..errors import ExportError
from ..fsdp.shard import fsdp_units

_DONE, _FAILED = -1, -2

Fetch = Callable[[str], torch.Tensor]
T = TypeVar("T")

#: Attribute of a model: dtype in files by parameter name.
_FILE_DTYPES = "_automodel_parallel_file_dtypes"


def keep_file_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Remember that the parameters in ``dtypes``, float32 while they are trained, have another dtype in files."""
    model.__dict__[_FILE_DTYPES] = dict(dtypes)


def file_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Dtypes in files, of all names (tied ones, too) of the parameters whose dtype in files is another one."""
    kept = model.__dict__.get(_FILE_DTYPES)
    if not kept:
        return {}
    of_parameter = {id(p): kept[name] for name, p in model.named_parameters() if name in kept}
    return {
        name: of_parameter[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in of_parameter
    }


class ShardedState:
    """The state dict of a sharded model, the same names in the same order on all ranks.

    Args:
        model: sharded; its FSDP units are resharded.
        writes: this rank may be a writer. Other ranks keep only their shards, and nothing of a state dict that is full
            already (megatron-fsdp gathers in ``state_dict()``, because its uneven shards are not DTensors).
    """

    def __init__(self, model: nn.Module, writes: bool) -> None:
        for unit in fsdp_units(model):
            unit.reshard()
        state = model.state_dict()
        self.tensors = {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
        if not any(isinstance(value, DTensor) for value in self.tensors.values()):
            self.tensors = {name: value.cpu() for name, value in self.tensors.items()} if writes else {}
        self._names = list(self.tensors)
        self._device = communication_device()
        self._index = {name: index for index, name in enumerate(self._names)}

    def led_by(self, leader: int, work: Callable[[Fetch], T]) -> T | None:
        """Run ``work`` on the rank ``leader``, which may fetch whole tensors; collective.

        Args:
            leader: global rank.
            work: gets a function from a name to the whole tensor on the CPU.

        Returns:
            The result on that rank, None elsewhere.

        Raises:
            ExportError: on the other ranks, if ``work`` raised; with its message.
        """
        if dist.get_rank() != leader:
            self.follow(leader)
            return None
        with self.leading() as fetch:
            return work(fetch)

    @contextmanager
    def leading(self) -> Iterator[Fetch]:
        """On the rank that writes: fetch whole tensors by name while the others are in :meth:`follow`."""
        try:
            yield self._fetch
        except BaseException as error:
            self._tell(_FAILED)
            dist.broadcast_object_list([f"{type(error).__name__}: {error}"], src=dist.get_rank(), device=self._device)
            raise
        self._tell(_DONE)

    def follow(self, leader: int) -> None:
        """On all other ranks: take part in each gather until ``leader`` is done.

        Raises:
            ExportError: it failed.
        """
        command = torch.zeros(1, dtype=torch.int64, device=self._device)
        while True:
            dist.broadcast(command, src=leader)
            index = int(command.item())
            if index == _DONE:
                return
            if index == _FAILED:
                message: list[str] = [""]
                dist.broadcast_object_list(message, src=leader, device=self._device)
                raise ExportError(f"saving failed on rank {leader}: {message[0]}")
            self._whole(self._names[index])

    def _tell(self, index: int) -> None:
        dist.broadcast(torch.tensor([index], dtype=torch.int64, device=self._device), src=dist.get_rank())

    def _fetch(self, name: str) -> torch.Tensor:
        if isinstance(self.tensors[name], DTensor):
            self._tell(self._index[name])
        return self._whole(name).cpu()

    @torch.no_grad()
    def _whole(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        if not isinstance(tensor, DTensor):
            return tensor
        mesh = tensor.device_mesh
        if tensor.device.type != mesh.device_type:  # FSDP2's CPU offload: the collectives need the device
            tensor = DTensor.from_local(
                tensor.to_local().to(mesh.device_type),
                mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        compat.mark_packed_placements([tensor])
        return tensor.full_tensor()
