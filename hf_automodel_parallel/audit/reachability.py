"""Reachability hooks: which modules ran in the audited step, and whether a gradient reached their outputs.

A parameter without a gradient is often right: an expert without tokens, a vision encoder without images, a head whose
output is not used. Its gradient is lost if its module ran and a gradient reached the module's output all the same, or
if the module ran in training and its output does not require a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.consistency import checksum
from ..core.forward_stack import is_compiled


@dataclass
class Seen:
    """Facts about one module since the hooks were registered.

    Attributes:
        ran: its forward ran with gradients enabled and returned floating-point numbers.
        severed: no output required a gradient.
        reached: a backward arrived at its output.
    """

    ran: bool = False
    severed: bool = False
    reached: bool = False


class ReachabilityHooks:
    """Forward hooks on every module with trainable parameters, until they are removed.

    Args:
        model: the prepared model.
        compiled: modules whose entire forward is compiled. The modules inside get no hooks, which would become part of
            the graph.
        on_inputs: called with the shapes of the input tensors of each forward with gradients, before it runs.
    """

    def __init__(
        self, model: nn.Module, compiled: list[nn.Module], on_inputs: Callable[[list[list[int]]], None]
    ) -> None:
        self.on_inputs = on_inputs
        self.seen: dict[nn.Module, Seen] = {}
        self.written: set[tuple[nn.Module, str]] = set()  # parameters that a forward changed in place
        self._before: dict[nn.Module, list[tuple[str, torch.Tensor, int, torch.Tensor]]] = {}
        self._checksums: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}  # of the current forward
        self.compiled = {id(module) for module in compiled}
        self.inputs = torch.zeros(2, dtype=torch.float64)  # fingerprint of the inputs of all forwards of the step
        self._handles: list[Any] = [model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True)]
        hidden = {id(inner) for module in compiled for inner in module.modules() if inner is not module}
        for module in model.modules():
            if id(module) not in hidden and module is not model and any(p.requires_grad for p in module.parameters()):
                self.seen[module] = Seen()
                self._handles.append(module.register_forward_hook(self._hook))
                self._handles.append(module.register_forward_pre_hook(self._note_values))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._checksums.clear()

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Add to the fingerprint of the inputs. While no parameter has a gradient, forget earlier forwards: no step has
        followed them (a warm-up, a step that a scaler skipped).
        """
        if not torch.is_grad_enabled():
            return
        self._checksums.clear()
        if all(p.grad is None for p in model.parameters()):
            for module in self.seen:
                self.seen[module] = Seen()
        tensors = list(_tensors_in([args, kwargs]))
        self.on_inputs([list(tensor.shape) for tensor in tensors])
        for tensor in tensors:
            flat = tensor.detach().double().reshape(-1)
            weights = torch.linspace(1.0, 2.0, flat.numel(), dtype=torch.float64, device=flat.device)
            prints = torch.stack([flat.sum(), (flat * weights).sum()])
            self.inputs = prints + self.inputs.to(prints.device) * 1.5

    def _note_values(self, module: nn.Module, args: Any) -> None:
        # Without gradients nothing is trained: a rollout has hundreds of forwards before the first step.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        with torch.no_grad():
            self._before[module] = [
                (name, x, compat.version_of(x), self._checksum(p, x))
                for name, p in module.named_parameters()
                if _has_values(x := _local(p))
            ]

    def _checksum(self, parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Of each parameter once in a forward, and not once for each module that it is in."""
        version = compat.version_of(local)
        found = self._checksums.get(id(parameter))
        if found is None or found[1] != version:
            # With the parameter, so that no other one gets its id.
            found = self._checksums[id(parameter)] = parameter, version, checksum(local)
        return found[2]

    def _hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for name, tensor, version, before in self._before.pop(module, ()):
            # PEFT's parametrizations set a tensor to itself, which counts as a change.
            changed = compat.version_of(tensor) != version and _has_values(tensor)
            if changed and not torch.equal(checksum(tensor), before):
                self.written.add((module, name))
        if not torch.is_grad_enabled():
            return
        given = {
            id(tensor) for tensor in _tensors_in(args)
        }  # an input that is returned unchanged says nothing about the module
        tensors = [t for t in _tensors_in(output) if t.is_floating_point() and id(t) not in given]
        if not tensors:
            return
        seen = self.seen[module]
        seen.ran = True
        differentiable = [tensor for tensor in tensors if tensor.requires_grad]
        if not differentiable:
            seen.severed = True

        def arrived(_: torch.Tensor) -> None:
            seen.reached = True

        for tensor in differentiable:
            tensor.register_hook(arrived)

    def lost(self, model: nn.Module, missing: set[str]) -> list[str]:
        """Those of the ``missing`` parameters (trainable, without a gradient) that should have one."""
        modules = dict(model.named_modules())
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        return sorted(name for name in missing if self._is_lost(name, modules, trainable, missing))

    def _is_lost(self, name: str, modules: dict[str, nn.Module], trainable: set[str], missing: set[str]) -> bool:
        def all_missing(path: str) -> bool:
            return all(other in missing for other in trainable if other.startswith(f"{path}.") or not path)

        owner = name.rpartition(".")[0]
        tuner = _adapted_layer(name, modules)
        if tuner is not None:
            seen = self.seen.get(modules[tuner])
            if seen is not None and seen.ran:
                # An adapter adds to the output of its layer, so a gradient of that output is one of the adapter.
                return seen.reached or seen.severed
        opaque: str | None = None  # the outermost compiled module up to the first that ran: no hooks inside
        path = owner
        while not ((seen := self.seen.get(modules[path])) is not None and seen.ran):
            if is_compiled(modules[path]):
                opaque = path
            if not path:
                return False
            path = path.rpartition(".")[0]
        if id(modules[path]) in self.compiled or is_compiled(modules[path]):
            opaque = path
        if seen.severed and all_missing(path):
            return True
        if not seen.reached:
            return False
        # A leaf uses its parameters together; if others of them have a gradient, this one was not used.
        is_leaf = path == owner and not any(True for _ in modules[path].children())
        return (is_leaf and all_missing(path)) or (opaque is not None and all_missing(opaque))


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's tensor; it has the version counter of the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _has_values(tensor: torch.Tensor) -> bool:
    """False for what FSDP2 has unsharded and freed, and for quantised tensors, which hold others."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.untyped_storage().size() > 0


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))


def _adapted_layer(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Path of the PEFT layer that the parameter ``name`` adapts; None if it belongs to no adapter."""
    tuner = compat.peft_tuner_layer_type()
    path, _, leaf = name.rpartition(".")
    inside = leaf
    while tuner is not None and path:
        if isinstance(modules[path], tuner):
            return None if inside.split(".")[0] == "base_layer" else path
        path, _, leaf = path.rpartition(".")
        inside = f"{leaf}.{inside}"
    return None
