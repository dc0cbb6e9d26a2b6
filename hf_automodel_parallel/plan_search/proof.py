"""Does a plan compute what one process computes? Outputs and every gradient of a small model, on threads for ranks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.model_structure import find_layers, find_structure
from ..core.shard_layout import local_slice
from ..core.sharding_spec import REPLICATED, Plan, ShardingSpec
from ..errors import AutoParallelError, PlanError, first_line
from ..plan.analysis.replication_check import complete
from ..plan.resolve import resolve
from ..plan.validate import validate
from ..tensor_parallel.thread_group import ThreadGroup
from .proxy_model import LENGTH, inputs_for
from .simulated_ranks import parallel_copy, run_ranks

#: A difference of a gradient, relative to its norm and to that of all gradients, that rounding in float32 explains.
RELATIVE, OF_TOTAL = 1e-4, 1e-7


@dataclass(frozen=True)
class Result:
    """What one forward and backward gave.

    Attributes:
        outputs: every floating-point tensor of the model's output.
        gradients: parameter name -> gradient, None where there is none.
    """

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


def run_once(model: nn.Module, inputs: dict[str, Any]) -> Result:
    """One forward, and the backward of a fixed random combination of all its outputs: each entry of each counts."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else (output,)
    outputs = [x for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs if x.requires_grad)
    total.backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Result([x.detach() for x in outputs], gradients)


class Prover:
    """Compares plans with one model.

    Args:
        model: a small model in evaluation mode on the CPU, which has not run yet. It is only copied.
        size: number of ranks.
        length: tokens in each row of the batch.

    Raises:
        AutoParallelError: the model cannot be tried, or it replaces its own modules when it runs (BigBird does so for
            short sequences), so that the trial would say nothing of others.
    """

    def __init__(self, model: nn.Module, size: int, length: int = LENGTH) -> None:
        self.model, self.size = model, size
        self.inputs = inputs_for(model, length)
        used = copy.deepcopy(model)  # some modules keep states of a forward, which cannot be copied
        before = [(name, id(module)) for name, module in used.named_modules()]
        self.want = run_once(used, self.inputs)
        if before != [(name, id(module)) for name, module in used.named_modules()]:
            raise PlanError(
                f"{type(model).__name__} replaces modules of its own in its forward, so a trial proves nothing."
            )
        names = {module: name for name, module in model.named_modules()}
        try:
            self.layers = [names[layer] for layer in find_layers(model)]
        except AutoParallelError:
            self.layers = []
        self.norm = sum(float(g.norm()) ** 2 for g in self.want.gradients.values() if g is not None) ** 0.5

    def failure(self, plan: Plan, completed: bool = False) -> str | None:
        """None if ``plan`` computes on :attr:`size` ranks what the model does, else what differs first.

        Args:
            plan: any plan.
            completed: look at it as ``prepare`` takes it, with what its run without values adds.
        """
        try:
            spec = resolve(self.model, plan, self.size)
            validate(self.model, spec, self.size)
            if completed:
                complete(self.model, spec, find_structure(self.model).layers, self.size, plan.strict)
            results = run_ranks(self.size, lambda mesh: self._rank(spec, mesh))
        except Exception as error:  # of the model's own code too, where shapes no longer fit
            return f"{type(error).__name__}: {first_line(error)}"
        for rank, result in enumerate(results):
            for got, expected in zip(result.outputs, self.want.outputs, strict=True):
                if got.shape != expected.shape or not _close(got, expected, float(expected.norm())):
                    return f"the output of rank {rank} differs"
        for name, want in self.want.gradients.items():
            reason = self._gradient(name, want, [r.gradients.get(name) for r in results], spec)
            if reason is not None:
                return reason
        return None

    def _rank(self, spec: ShardingSpec, mesh: ThreadGroup) -> Result:
        return run_once(parallel_copy(self.model, spec, self.layers, mesh), self.inputs)

    def _gradient(
        self, name: str, want: torch.Tensor | None, got: list[torch.Tensor | None], spec: ShardingSpec
    ) -> str | None:
        if want is None:
            return None if all(g is None for g in got) else f"{name} gets a gradient that it should not have"
        present = [g for g in got if g is not None]
        if len(present) < len(got):
            return f"{name} gets no gradient"
        place = spec.parameters.get(name, REPLICATED)
        if place.partial_gradient:
            present = [torch.stack(present).mean(0)]  # see tensor_parallel.partial_gradients
        for rank, gradient in enumerate(present):
            part = local_slice(want, place, rank, self.size)
            if gradient.shape != part.shape or not _close(gradient, part, float(want.norm()), self.norm):
                return f"the gradient of {name} differs"
        return None


def _close(got: torch.Tensor, want: torch.Tensor, norm: float, total: float = 0.0) -> bool:
    return float((got - want).norm()) <= RELATIVE * norm + OF_TOTAL * total  # False for what is not a number
