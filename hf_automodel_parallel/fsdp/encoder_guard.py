"""Towers whose layers are FSDP2 units: in a forward all data-parallel ranks run them, or all raise an error before they
hang.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import UnsupportedError


class ModalityEncoderGuard:
    """Compares what the ranks are about to run: at each entry into a tower, at the first layer of the main part, and at
    the embedding where that is a unit, since some models run their tower before it.

    One all-reduce of two numbers each time, so one for each tower that runs and two more, for every forward of the
    model.

    Args:
        model: the root unit.
        towers: tower name -> its first layer that is a unit.
        main: the first layer of the main part.
        mesh: the data-parallel axes.
        embedding: the input embedding of the main part, if it is a unit.
    """

    def __init__(
        self,
        model: nn.Module,
        towers: dict[str, nn.Module],
        main: nn.Module,
        mesh: DeviceMesh,
        embedding: nn.Module | None = None,
    ) -> None:
        self.mesh = mesh
        self.names = ["the language layers", *towers]
        self.running = False  # a checkpoint calls layers again in backward, where all ranks have agreed already
        model.register_forward_pre_hook(self.begin, prepend=True)
        model.register_forward_hook(self.end, always_call=True)
        units = [*enumerate((main, *towers.values()))] + ([] if embedding is None else [(0, embedding)])
        for number, layer in units:
            layer.register_forward_pre_hook(lambda *_, number=number: self.compare(number), prepend=True)

    def begin(self, *_: Any) -> None:
        """Pre-hook of the model."""
        self.running = True

    def end(self, *_: Any) -> None:
        """Hook of the model."""
        self.running = False

    def compare(self, number: int) -> None:
        """Pre-hook of a first layer.

        Raises:
            UnsupportedError: on all ranks, if they are about to run different parts of the model.
        """
        if not self.running:
            return
        ends = torch.tensor([number, -number], device=self.mesh.device_type)
        for dim in range(self.mesh.ndim):
            if self.mesh.size(dim) > 1:
                dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.mesh.get_group(dim))
        last, first = ends[0].item(), -ends[1].item()
        if first != last:
            raise UnsupportedError(
                f"towers='layers': in this forward some data-parallel ranks run {self.names[last]} and others "  # type: ignore[index]
                f"{self.names[first]} (this one: {self.names[number]}), "  # type: ignore[index]
                "for example because only some batches have images. Each "
                f"layer is gathered from all ranks, so all have to run it. Use towers='root' (the default), or give "
                f"every rank images in every forward."
            )
