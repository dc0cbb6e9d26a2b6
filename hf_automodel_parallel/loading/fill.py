"""What ``prepare`` does with a model whose values are still in files: shard it without them, then read each rank's
part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.ranks import raise_on_all_ranks
from ..core.shard_layout import chunks_of
from ..errors import PrepareError
from ..optim.handoff import replace_parameters
from .deferred import DeferredTensor
from .files import TensorFile
from .values import Given, Value

if TYPE_CHECKING:
    from ..strategies.context import ParallelizeContext


class PendingValues:
    """The values of a model's deferred parameters, while plain parameters on the meta device stand in for them.

    As a context: if the body raises before :meth:`fill` or :meth:`keep`, the deferred parameters come back.

    Attributes:
        values: of each parameter by its first name; empty for a model that is in memory.
    """

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer] | None = None) -> None:
        self.values: dict[str, Value] = {}
        self._model, self._optimizers = model, optimizers or []
        self._replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._kept = False

    def __enter__(self) -> PendingValues:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._kept:
            self._exchange({id(new): old for old, new in self._replaced.values()})

    def begin(self) -> None:
        """Check that the files are still those that the model was loaded from, and put stand-ins in the model's place.

        Raises:
            CheckpointError: a file has changed or disappeared.
        """
        new: dict[int, nn.Parameter] = {}
        for name, parameter in self._model.named_parameters():
            if not isinstance(parameter, DeferredTensor):
                continue
            value = parameter.value
            if isinstance(value, Given):  # written by the user, the same on each rank or not
                replacement = nn.Parameter(value.read().to(parameter.device, parameter.dtype), parameter.requires_grad)
            else:
                self.values[name] = value
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                replacement = nn.Parameter(empty, parameter.requires_grad)
            replacement.__dict__.update({key: held for key, held in vars(parameter).items() if key != "value"})
            new[id(parameter)] = replacement
            self._replaced[id(parameter)] = (parameter, replacement)
        for file in self.files:
            file.check_unchanged()
        self._exchange(new)

    def _exchange(self, new: dict[int, nn.Parameter]) -> None:
        if not new:
            return
        for module in self._model.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in new:
                    module._parameters[name] = new[id(parameter)]
        for optimizer in self._optimizers:
            held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
            replace_parameters(optimizer, held | new)

    def keep(self) -> None:
        """From here on the model changes; there is no way back."""
        self._kept = True

    @property
    def files(self) -> list[TensorFile]:
        """The files that values come from."""
        found = {id(leaf.file): leaf.file for value in self.values.values() for leaf in value.files()}
        return list(found.values())

    def compare_ranks(self, group: dist.ProcessGroup | None) -> None:
        """Raise :class:`PrepareError` on all ranks unless their files have equal headers."""
        if not self.values:
            return
        mine = [(file.path, file.digest) for file in self.files]
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        for rank, theirs in enumerate(everyone):
            digests, reference = [digest for _, digest in theirs], [digest for _, digest in everyone[0]]
            if digests != reference:
                index = next(
                    (i for i, pair in enumerate(zip(digests, reference, strict=False)) if pair[0] != pair[1]), 0
                )
                shown = " and ".join(
                    held[index][0] if index < len(held) else "no file" for held in (everyone[0], theirs)
                )
                raise PrepareError(
                    f"ranks 0 and {rank} were loaded from different files ({shown}: other tensors, shapes or dtypes). "
                    f"Give all nodes the same checkpoint."
                )

    def fill(self, context: ParallelizeContext) -> None:
        """Give each sharded parameter its rank's part of the values. Every rank reads for itself.

        Args:
            context: its model is sharded; what is set aside is still on the meta device.

        Raises:
            CheckpointError: a file cannot be read; on the other ranks PrepareError, so that none waits for it.
        """
        if not self.values:
            return
        names = {id(p): name for name, p in context.model.named_parameters() if name in self.values}
        device = torch.device("cpu") if type(context.fsdp.offload_policy) is CPUOffloadPolicy else context.device
        with raise_on_all_ranks("reading the model's files", context.group), _progress(len(names)) as step:

            def filled(tensor: torch.Tensor) -> torch.Tensor:
                name = names.get(id(tensor))
                if name is None:
                    return tensor
                step()
                return _local_part(tensor, self.values[name], device)

            with torch.no_grad():
                compat.apply_to_tensors(context.model, filled)
        self.values = {}

    def fill_whole(self, context: ParallelizeContext, names: list[str]) -> None:
        """Give parameters that nobody shards all of their values."""
        for name in names:
            owner, _, key = name.rpartition(".")
            module = context.model.get_submodule(owner)
            old: nn.Parameter = module._parameters[key]  # type: ignore[assignment]
            value = self.values.pop(name).read().to(context.device, old.dtype, copy=True)
            new = nn.Parameter(value, old.requires_grad)
            for other in context.model.modules():
                for slot, parameter in other._parameters.items():
                    if parameter is old:
                        other._parameters[slot] = new
            context.fsdp.ignored_parameters.discard(old)
            context.fsdp.ignored_parameters.add(new)


def _local_part(parameter: torch.Tensor, value: Value, device: torch.device) -> torch.Tensor:
    """A DTensor like ``parameter`` that holds this rank's shard of ``value``."""
    if not isinstance(parameter, DTensor):
        return value.read().to(device, parameter.dtype, copy=True, memory_format=torch.contiguous_format)
    local = torch.empty(parameter.to_local().shape, dtype=parameter.dtype, device=device)
    for chunk in chunks_of(parameter):
        chunk.of_local(local).copy_(value.read(chunk.region))
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on rank 0, if transformers' bars are enabled."""
    from transformers.utils import logging

    if dist.get_rank() != 0:
        yield lambda: None
        return
    with logging.tqdm(total=total, desc="Reading weights") as bar:
        yield lambda: bar.update(1)
