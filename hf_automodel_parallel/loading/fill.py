"""Values of a model that is sharded while they are still in files; afterwards each rank reads its own shards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.lazy_graph import Given, Node, read
from ..core.ranks import gather_objects, raise_on_all_ranks
from ..core.shard_layout import chunks_of
from ..core.swap import exchange, stand_ins
from ..errors import PrepareError
from ..optim.handoff import replace_parameters
from .deferred import DeferredTensor
from .files import TensorFile, file_tensors


class PendingValues:
    """Replaces a model's deferred parameters by meta parameters during ``prepare``, and remembers their values.

    A context manager: if the body raises before :meth:`keep`, the deferred parameters are restored in model and
    optimizers.

    Attributes:
        values: first name of each parameter -> its node of the lazy graph; empty for a model in memory.
    """

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer] | None = None) -> None:
        self.values: dict[str, Node] = {}
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
        """Check that the files have not changed since the model was loaded, and replace the deferred parameters.

        Raises:
            CheckpointError: a file has changed or disappeared.
        """
        new: dict[int, nn.Parameter] = {}
        for name, parameter in self._model.named_parameters():
            if not isinstance(parameter, DeferredTensor):
                continue
            node = parameter.node
            if isinstance(node, Given):  # written by the user: the values are in memory
                replacement = nn.Parameter(read(node).to(parameter.device, parameter.dtype), parameter.requires_grad)
            else:
                self.values[name] = node
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                replacement = nn.Parameter(empty, parameter.requires_grad)
            replacement.__dict__.update({key: held for key, held in vars(parameter).items() if key != "node"})
            new[id(parameter)] = replacement
            self._replaced[id(parameter)] = (parameter, replacement)
        for file in self.files:
            file.check_unchanged()
        self._exchange(new)

    def _exchange(self, new: dict[int, nn.Parameter]) -> None:
        if not new:
            return
        exchange(stand_ins(self._model, lambda _, parameter: new.get(id(parameter))))
        # Optimizers hold parameters by identity.
        for optimizer in self._optimizers:
            held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
            replace_parameters(optimizer, held | new)

    def keep(self) -> None:
        """From here on the model changes, so do not restore the deferred parameters on an error."""
        self._kept = True

    @property
    def files(self) -> list[TensorFile]:
        """The files that hold the pending values."""
        found = {id(leaf.file): leaf.file for node in self.values.values() for leaf in file_tensors(node)}
        return list(found.values())

    def compare_ranks(self, group: dist.ProcessGroup | None) -> None:
        """Raise :class:`PrepareError` on all ranks unless their files have equal headers."""
        if not self.values:
            return
        mine = [(file.path, file.digest) for file in self.files]
        gathered = gather_objects(mine, group)
        for rank, theirs in enumerate(gathered):
            digests, reference = [digest for _, digest in theirs], [digest for _, digest in gathered[0]]
            if digests != reference:
                index = next(
                    (i for i, pair in enumerate(zip(digests, reference, strict=False)) if pair[0] != pair[1]), 0
                )
                shown = " and ".join(
                    held[index][0] if index < len(held) else "no file" for held in (gathered[0], theirs)
                )
                raise PrepareError(
                    f"ranks 0 and {rank} were loaded from different files ({shown}: other tensors, shapes or dtypes). "
                    f"Give all nodes the same checkpoint."
                )

    def fill(self, model: nn.Module, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """Read the pending values into the sharded parameters; each rank reads its own shards. Collective.

        Args:
            model: sharded; the parameters with pending values are on the meta device.
            device: of the shards.
            group: the ranks that shard the model.

        Raises:
            CheckpointError: a file cannot be read. The other ranks raise PrepareError.
        """
        if not self.values:
            return
        names = {id(p): name for name, p in model.named_parameters() if name in self.values}
        with raise_on_all_ranks("reading the model's files", group), _progress(len(names)) as step:

            def filled(tensor: torch.Tensor) -> torch.Tensor:
                name = names.get(id(tensor))
                if name is None:
                    return tensor
                step()
                return _local_shard(tensor, self.values[name], device)

            with torch.no_grad():
                # Through Module._apply, which FSDP2 overrides so that its units refer to the new shards.
                compat.apply_to_tensors(model, filled)
        self.values = {}

    def fill_ignored(
        self, model: nn.Module, names: list[str], device: torch.device, ignored: set[nn.Parameter]
    ) -> None:
        """Read the full values of the parameters ``names``, which FSDP2 ignores, before the model is sharded.

        Args:
            model: holds these parameters on the meta device.
            names: first names of parameters.
            device: of the new parameters.
            ignored: FSDP2's ignored parameters, updated.
        """
        for name in names:
            old = model.get_parameter(name)
            new = nn.Parameter(read(self.values.pop(name)).to(device, old.dtype, copy=True), old.requires_grad)
            exchange(stand_ins(model, functools.partial(_only, old, new)))
            ignored.discard(old)
            ignored.add(new)


def _local_shard(parameter: torch.Tensor, node: Node, device: torch.device) -> torch.Tensor:
    """This rank's shard of ``node``, cast and on ``device``: a DTensor like ``parameter``, or a plain tensor if it is.

    Read chunk by chunk, because a shard of a packed projection is not contiguous in the full tensor.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local = torch.empty(local.shape, dtype=parameter.dtype, device=device)
    for chunk in chunks_of(parameter):
        chunk.of_local(local).copy_(read(node, chunk.region))
    if not isinstance(parameter, DTensor):
        return local
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
    """A progress bar on rank 0, if transformers' bars are enabled; yields the function that advances it."""
    from transformers.utils import logging

    if dist.get_rank() != 0:
        yield lambda: None
        return
    with logging.tqdm(total=total, desc="Reading weights") as bar:
        yield lambda: bar.update(1)


def _only(old: nn.Parameter, new: torch.Tensor, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    """The stand-in for ``parameter``: ``new`` for ``old``, None (no change) for any other."""
    return new if parameter is old else None
