"""Does a plan compute what one process computes? Outputs and every gradient of a small model are compared.

The ranks are threads (:mod:`..tensor_parallel.thread_group`) that run the package's own TP hooks and local-parameter
scopes. So a plan can be verified without a process group, in a fraction of a second. Two things differ from real ranks:
the collectives, and a parameter is a local shard between forwards, too, not a DTensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from .. import compat
from ..core.model_structure import find_layers, find_structure
from ..core.shard_layout import local_slice
from ..core.sharding_spec import REPLICATED, Plan, ShardingSpec
from ..errors import AutoParallelError, PlanError, first_line
from ..plan.analysis.varying_check import complete
from ..plan.resolve import resolve
from ..plan.validate import validate
from ..tensor_parallel.apply import (
    TensorParallelState,
    install_head_arguments,
    install_hooks,
    install_local_parameters,
)
from ..tensor_parallel.grad_sync import PartialGradients
from ..tensor_parallel.head_counts import set_local_counts
from ..tensor_parallel.thread_group import ThreadGroup, run_ranks
from .carried_modules import copy_model
from .proxy_inputs import Inputs, labelled, possible_inputs
from .proxy_model import LENGTH

#: Tolerances for float32 rounding: relative to the norm of a gradient, and to the norm of all gradients together.
RELATIVE, OF_TOTAL = 1e-4, 1e-7

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Result:
    """Results of one forward and backward.

    Attributes:
        outputs: where it stands -> tensor, for every floating-point tensor of the model's output, however nested, and
            for those with a gradient that the forward left on its modules (auxiliary losses take them from there).
        gradients: parameter name -> gradient, or None for a parameter without a gradient.
        buffers: name -> buffer after the forward.
    """

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]

    def equal(self, other: Result) -> bool:
        """True if outputs and gradients are the same bits."""
        pairs = [(x, other.outputs.get(name)) for name, x in self.outputs.items()]
        pairs += [(g, other.gradients[name]) for name, g in self.gradients.items() if g is not None]
        return all(y is not None and torch.equal(x, y) for x, y in pairs)


def run_once(model: nn.Module, inputs: dict[str, Any]) -> Result:
    """One forward, and the backward of a fixed random combination of its outputs, so that every entry has a weight."""
    model.zero_grad(set_to_none=True)
    before = {id(x): x for _, x in _left_on_modules(model)}
    outputs = dict(_floating("output", model(**inputs)))
    outputs |= {where: x for where, x in _left_on_modules(model) if id(x) not in before}
    generator = torch.Generator().manual_seed(2)
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs.values() if x.requires_grad)
    total.backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    return Result({where: x.detach() for where, x in outputs.items()}, gradients, buffers)


def _left_on_modules(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors with a gradient in plain attributes of modules."""
    for name, module in model.named_modules():
        left = {key: value for key, value in vars(module).items() if key not in _REGISTERED}
        yield from ((where, x) for where, x in _floating(name or "model", left) if x.grad_fn is not None)


#: Where a module keeps what others see of it in other ways.
_REGISTERED = ("_parameters", "_buffers", "_modules")


def _floating(where: str, value: Any, depth: int = 4) -> Iterator[tuple[str, torch.Tensor]]:
    """The floating-point tensors in nested containers and dataclasses, each with its place."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield where, value
        return
    if is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = {field.name: getattr(value, field.name, None) for field in fields(value)}  # also one with slots
    if depth and isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in list(items):
            yield from _floating(f"{where}.{key}", item, depth - 1)


class _NoCollectives(compat.TorchDispatchMode):
    """Raises at a collective of the model's own code (in-batch negatives of all ranks, balanced experts).

    The run of one process comes first, so all ranks raise alike there. In the runs of the simulated ranks, in threads
    and in an order of their own, the collective would mix up values or hang.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise PlanError(f"its forward runs a collective of its own ({func})")
        return func(*args, **(kwargs or {}))


class ParityCheck:
    """Compares plans with one process.

    Args:
        model: a small model in evaluation mode on the CPU, which has not run yet. It is only copied.
        size: number of ranks.
        length: number of tokens in each row of the batch.
        training: run in training mode, with every dropout at 0.
        labels: give labels as well, if the forward takes them and runs with them.

    Raises:
        AutoParallelError: the model cannot be run, or its forward replaces its own modules (BigBird does so for short
            sequences), so that other runs would compute different results.
    """

    def __init__(
        self, model: nn.Module, size: int, length: int = LENGTH, training: bool = False, labels: bool = False
    ) -> None:
        if training:
            model = copy_model(model).train()
            for module in model.modules():
                if isinstance(module, _DROPOUTS):
                    module.p = 0.0
        self.model, self.size, self.length = model, size, length
        self.inputs, self.steps, self.buffers = first_that_runs(model, length, labels)
        self.want = self.steps[0]
        names = {module: name for name, module in model.named_modules()}
        try:
            self.layers = [names[layer] for layer in find_layers(model)]
        except AutoParallelError:
            self.layers = []
        self.norm = sum(float(g.norm()) ** 2 for g in self.want.gradients.values() if g is not None) ** 0.5

    def failure(self, plan: Plan, completed: bool = False) -> str | None:
        """None if ``plan`` computes on :attr:`size` ranks what one process does, else the first difference.

        Args:
            plan: any plan.
            completed: complete the plan first, as ``prepare`` does after its run on fake tensors.
        """
        try:
            spec = self.resolved(plan, completed)
        except Exception as error:  # of the model's own code, too
            return f"{type(error).__name__}: {first_line(error)}"
        return self.difference(spec)

    def resolved(self, plan: Plan, completed: bool = False) -> ShardingSpec:
        """The spec of ``plan`` on the model, see :meth:`failure`; raises what the steps of ``prepare`` would."""
        spec = resolve(self.model, plan, self.size)
        validate(self.model, spec, self.size)
        if completed:
            complete(self.model, spec, find_structure(self.model).layers, self.size, plan.strict)
        return spec

    def difference(self, spec: ShardingSpec) -> str | None:
        """None if ``spec`` computes on :attr:`size` ranks what one process does, else the first difference."""
        try:
            results = run_ranks(self.size, lambda mesh: self._rank(spec, mesh))
        except Exception as error:  # of the model's own code, too, if its shapes do not fit the shards
            return f"{type(error).__name__}: {first_line(error)}"
        for step, want in enumerate(self.steps):
            failure = self._difference(want, [result[step] for result in results], spec)
            if failure is not None:
                return f"{failure} in a second forward" if step else failure
        return None

    def _difference(self, want: Result, results: list[Result], spec: ShardingSpec) -> str | None:
        changed = {
            n: b for n, b in want.buffers.items() if n not in self.buffers or not torch.equal(b, self.buffers[n])
        }
        for rank, result in enumerate(results):
            for where, expected in (*want.outputs.items(), *changed.items()):
                got = result.outputs.get(where, result.buffers.get(where))
                if got is None or got.shape != expected.shape or not _close(got, expected, _norm(expected)):
                    return f"{where} of rank {rank} differs"
        for name, gradient in want.gradients.items():
            reason = self._gradient(name, gradient, [r.gradients.get(name) for r in results], spec)
            if reason is not None:
                return reason
        return None

    def _rank(self, spec: ShardingSpec, mesh: ThreadGroup) -> list[Result]:
        model = parallel_copy(self.model, spec, self.layers, mesh)
        return [run_once(model, self.inputs) for _ in self.steps]

    def _gradient(
        self, name: str, want: torch.Tensor | None, got: list[torch.Tensor | None], spec: ShardingSpec
    ) -> str | None:
        if want is None:
            return None if all(g is None for g in got) else f"{name} gets a gradient that it should not have"
        present = [g for g in got if g is not None]
        if len(present) < len(got):
            return f"{name} gets no gradient"
        place = spec.parameters.get(name, REPLICATED)
        # In training, tensor_parallel.grad_sync all-reduces these before the optimizer step.
        if place.partial_gradient:
            # The mean, because each contribution is scaled by tp_size; see tensor_parallel.grad_sync.
            present = [torch.stack(present).mean(0)]
        for rank, gradient in enumerate(present):
            part = local_slice(want, place, rank, self.size)
            if gradient.shape != part.shape or not _close(gradient, part, float(want.norm()), self.norm):
                return f"the gradient of {name} differs"
        return None


def first_that_runs(
    model: nn.Module, length: int, labels: bool = False
) -> tuple[Inputs, list[Result], dict[str, torch.Tensor]]:
    """The first batch of :func:`possible_inputs` that ``model`` runs; else the first one's error.

    Returns:
        The batch, with labels if these are wanted and the model takes any; the results of one forward, and of a second
        one where they differ, because the forward keeps something for the next one; the buffers before.
    """
    first: Exception | None = None
    for inputs in possible_inputs(model, length):
        # Copies, because after a forward some modules keep state that deepcopy cannot copy.
        used = copy_model(model)
        buffers = {name: buffer.clone() for name, buffer in used.named_buffers()}
        before = [(name, id(module)) for name, module in used.named_modules()]
        try:
            with _NoCollectives():
                given = labelled(copy_model(model), inputs) if labels else inputs
                steps = [run_once(used, given), run_once(used, given)]
        except AutoParallelError:
            raise
        except Exception as error:  # code of the model, which may raise any error for a batch that it does not take
            first = first or error
            continue
        if before != [(name, id(module)) for name, module in used.named_modules()]:
            raise PlanError(
                f"{type(model).__name__} replaces modules of its own in its forward, so no plan can be verified."
            )
        return given, steps[:1] if steps[1].equal(steps[0]) else steps, buffers
    raise first if first is not None else PlanError(f"no batch for {type(model).__name__} is known.")


def _norm(x: torch.Tensor) -> float:
    return float(x.double().nan_to_num(0.0, 0.0, 0.0).norm())


def _close(got: torch.Tensor, want: torch.Tensor, norm: float, total: float = 0.0) -> bool:
    got, want = got.double(), want.double()  # buffers may count
    difference = torch.where(got == want, 0.0, got - want)  # masks have equal infinities
    return float(difference.norm()) <= RELATIVE * norm + OF_TOTAL * total  # False for NaN


def parallel_copy(model: nn.Module, spec: ShardingSpec, layers: list[str], mesh: ThreadGroup) -> nn.Module:
    """A copy of ``model`` that is one rank of ``mesh``: local shards, TP hooks and local-parameter scopes.

    Args:
        model: the unsharded model on the CPU; only read.
        spec: its resolved plan, without native torch styles and without sequence parallelism.
        layers: names of the layers; each is a local-parameter scope.
        mesh: this rank's view of the group.

    Raises:
        PlanError: the plan has a native torch style.
    """
    native = [name for name, module in spec.modules.items() if module.native_style is not None]
    if native:
        raise PlanError(
            f"{native[0]} has a native torch ParallelStyle, which runs in real processes only and is not verified."
        )
    result = copy_model(model)
    axis: Any = mesh
    state = TensorParallelState(axis, PartialGradients(axis), local=True)
    for name, module in spec.modules.items():
        install_hooks(result, name, module, state)
    install_head_arguments(result, spec, state)
    # With the original parameter: if it were freed, a new object could get its id.
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for owner_name, owner in result.named_modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            name = f"{owner_name}.{key}" if owner_name else key
            place = spec.parameters.get(name, REPLICATED)
            if id(parameter) not in made:
                local = local_slice(parameter.detach(), place, mesh.rank, mesh.size())
                made[id(parameter)] = (parameter, nn.Parameter(local, parameter.requires_grad))
            owner._parameters[key] = made[id(parameter)][1]
            state.place(owner, name, place)
    for name, attributes in spec.head_counts.items():
        set_local_counts(result.get_submodule(name), attributes, mesh.size())
    install_local_parameters(result, [result.get_submodule(name) for name in layers], state, {})
    return result
