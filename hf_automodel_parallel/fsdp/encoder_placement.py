"""Where FSDP2 keeps the parameters of modality encoders (vision, audio), and how the ranks stay in step there.

A batch without images does not run the vision encoder, so some data-parallel ranks may run it while others do not. The
collectives of all ranks have to match all the same:

* ``towers="root"``: the encoders belong to the root unit, whose all-gather every forward runs. Only the root's
  reduce-scatter could differ between ranks; :class:`RootGradients` makes it equal.
* ``"layers"``: each encoder layer is a unit, so every rank has to run it, or none. :class:`ModalityEncoderGuard`
  compares the ranks and raises on all of them, instead of a hang.
* ``"replicated"``: frozen parameters are left out of FSDP2, the trained ones are kept as with ``"root"``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from .. import compat
from ..core.modality_encoders import PLACEMENTS, layers_of_modality_encoders
from ..core.model_structure import ModelStructure
from ..errors import ConfigError, UnsupportedError
from .dtype_groups import ParamGroupModule, extra_groups
from .options import ShardingOptions


def placement(
    model: nn.Module, structure: ModelStructure, options: ShardingOptions, layer_classes: list[str] | None
) -> str | None:
    """The entry of :data:`~..core.modality_encoders.PLACEMENTS` for the modality encoders of ``model``.

    Args:
        model: the model, before sharding.
        structure: its layers and modality encoders.
        options: ``towers`` is the user's choice, None for the default.
        layer_classes: names of layer classes if the user gave them; those of encoders among them mean "layers".

    Raises:
        ConfigError: there is no modality encoder, or none that can be placed like this.
    """
    asked = options.towers
    if asked is None:
        return "layers" if layer_classes and structure.tower_layers else PLACEMENTS[0]
    if not structure.towers:
        raise ConfigError(
            f"towers={asked!r}: {type(model).__name__} has no modality encoder, that is, no layers outside of its "
            f"language model that take images or sound. Leave towers out."
        )
    if asked != "replicated":
        return asked
    frozen = frozen_parameters(structure.towers)
    if not frozen:
        raise ConfigError(
            "towers='replicated': no parameter of the modality encoders is frozen, and the gradients of trained "
            "replicas would not be averaged. Freeze the encoders before prepare, or use towers='root'."
        )
    dtype = options.mp_policy.param_dtype
    others = {p.dtype for p in frozen if p.is_floating_point()} - {dtype}
    if dtype is not None and others:
        raise ConfigError(
            f"towers='replicated': the frozen parameters are stored in {others.pop()}, but mixed precision computes in "
            f"{dtype}, and FSDP2 does not cast parameters that it does not manage. Store the modality encoders in "
            f"{dtype} before prepare, or use towers='root'."
        )
    return asked


def replicated_parameters(structure: ModelStructure, options: ShardingOptions) -> set[nn.Parameter]:
    """The parameters that FSDP2 does not manage under ``options``, because each data-parallel rank has a replica."""
    return frozen_parameters(structure.towers) if options.towers == "replicated" else set()


def frozen_parameters(encoders: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters of ``encoders`` that are not trained."""
    return {p for encoder in encoders for p in encoder.parameters() if not p.requires_grad}


def keep_ranks_in_step(model: nn.Module, structure: ModelStructure, mesh: DeviceMesh, where: str | None) -> None:
    """Install the hooks that the placement ``where`` needs; ``model`` is sharded and has modality encoders."""
    if where != "layers":
        RootGradients(model, mesh)
        return
    names = {module: name for name, module in model.named_modules()}
    first_layers = {
        names[encoder]: layers_of_modality_encoders(structure.tower_layers, [encoder])[0]
        for encoder in structure.towers
    }
    embedding = structure.embedding if isinstance(structure.embedding, FSDPModule) else None
    ModalityEncoderGuard(model, first_layers, structure.main_layers[0], mesh, embedding)


class RootGradients:
    """The parameters of the root that have a gradient are the same ones on every data-parallel rank.

    FSDP2 reduces the gradients of a unit in one collective, over those parameters that have one. If all images are on
    one rank, only that rank has gradients of the vision encoder; the collectives differ in size, and hang or mix up
    parameters. So before the root is reduced, an all-reduce of one byte per trained parameter finds which of them have
    a gradient on any rank; the other ranks fill in zeros. A parameter without a gradient on every rank has none
    afterwards, as in one process, where an optimizer then skips it.

    (:mod:`.unused_gradients` does this for the other units without a collective. The root is different: it would fill
    in zeros for an entire encoder that no rank has run.)

    FSDP2 reduces the root last, so its gradients are complete then. Without trained parameters in the root there is no
    collective.

    Args:
        root: the root unit.
        mesh: the data-parallel axes.
        units: the param groups of the root without such an exchange; None for the root and all its extra param groups.
    """

    def __init__(self, root: nn.Module, mesh: DeviceMesh, units: list[ParamGroupModule] | None = None) -> None:
        self.slots = _own_parameters(root)
        self.mesh = mesh
        self.root = root
        for unit in (root, *extra_groups(root)) if units is None else units:
            compat.before_reduction(unit, self.agree)

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters of the root as its modules hold them now: unsharded, while a backward runs."""
        return [p for p in (m._parameters.get(name) for m, name in self.slots) if p is not None and p.requires_grad]

    @torch.no_grad()
    def agree(self) -> None:
        """Fill in zeros where another rank has a gradient. Collective over the data-parallel ranks."""
        parameters = self.trained()
        if not parameters:
            return
        # Where image features are added to frozen embeddings, only ranks with images have a gradient at the input of
        # the first layer. On the others FSDP2 would reduce that layer after the root.
        compat.reduce_all_but((self.root, *extra_groups(self.root)))
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        present = _max_over_ranks(present.to(self.mesh.device_type), self.mesh)
        for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class ModalityEncoderGuard:
    """Raises on all data-parallel ranks if they are about to run different modules of the model.

    They are compared at the entry of each modality encoder, at the first layer of the language model, and at the
    embedding where that is a unit, because some models run their encoder before it. Each comparison is an all-reduce
    of two integers; a forward has one for each encoder that it runs, and at most two more.

    Args:
        model: the root unit.
        encoders: encoder name -> its first layer that is a unit.
        main: the first layer of the language model.
        mesh: the data-parallel axes.
        embedding: the input embedding of the language model, if it is a unit.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: dict[str, nn.Module],
        main: nn.Module,
        mesh: DeviceMesh,
        embedding: nn.Module | None = None,
    ) -> None:
        self.mesh = mesh
        self.names = ["the language layers", *encoders]
        # An activation checkpoint calls layers again in backward. The ranks were compared in the forward.
        self.in_forward = False
        model.register_forward_pre_hook(self.begin, prepend=True)
        model.register_forward_hook(self.end, always_call=True)
        units = [*enumerate((main, *encoders.values()))] + ([] if embedding is None else [(0, embedding)])
        for number, layer in units:
            layer.register_forward_pre_hook(lambda *_, number=number: self.compare(number), prepend=True)

    def begin(self, *_: Any) -> None:
        """Pre-hook of the model."""
        self.in_forward = True

    def end(self, *_: Any) -> None:
        """Hook of the model."""
        self.in_forward = False

    def compare(self, number: int) -> None:
        """Pre-hook of a first layer.

        Raises:
            UnsupportedError: on all ranks, if they are about to run different modules of the model.
        """
        if not self.in_forward:
            return
        ends = _max_over_ranks(torch.tensor([number, -number], device=self.mesh.device_type), self.mesh)
        last, first = int(ends[0]), -int(ends[1])
        if first != last:
            raise UnsupportedError(
                f"towers='layers': in this forward some data-parallel ranks run {self.names[last]} and others "
                f"{self.names[first]} (this one: {self.names[number]}), for example because only some batches have "
                f"images. All ranks take part in the all-gather of each layer, so all have to run it. Use "
                f"towers='root' (the default), or give every rank images in every forward."
            )


def _max_over_ranks(values: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The element-wise maximum of ``values`` over all ranks of ``mesh``, in place."""
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return values


def _own_parameters(root: nn.Module) -> list[tuple[nn.Module, str]]:
    """Module and name of each parameter that the root unit manages, each once, in the order of the module tree."""
    found: dict[int, tuple[nn.Module, str]] = {}
    waiting, seen = [root], {id(root)}
    while waiting:
        module = waiting.pop()
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (module, name))
        for child in reversed(list(module.children())):
            if id(child) not in seen and (not isinstance(child, FSDPModule) or isinstance(child, ParamGroupModule)):
                seen.add(id(child))
                waiting.append(child)
    return list(found.values())
