"""Loss and gradients of parallel ranks, compared with one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..core.ranks import gather_objects
from ..export.gathering import full_tensor

#: Relative error of the loss; of a gradient to its own norm, or to a hundredth of the norm of all.
LOSS, GRADIENT = 1e-5, 1e-4
#: How much further from float32 than one process in bf16 a parallel run in bf16 may be.
_BF16 = 2.0


@dataclass(frozen=True)
class Compared:
    """How far parallel ranks are from one process.

    Attributes:
        loss, reference_loss: of the ranks (their mean), and of one process.
        errors: name of a parameter -> relative error of its gradient, of all ranks the largest.
        one_side: names of parameters with a gradient on one side only, or on some ranks only.
        norms: name of a parameter -> norm of its gradient in one process.
        loss_bound, bound: how large the relative error of the loss and of a gradient may be.
    """

    loss: float
    reference_loss: float
    errors: dict[str, float]
    one_side: list[str]
    norms: dict[str, float]
    loss_bound: float
    bound: float

    @property
    def loss_error(self) -> float:
        """Relative error of the loss."""
        return _finite(abs(self.loss - self.reference_loss) / abs(self.reference_loss))

    @property
    def worst(self) -> float:
        """Relative error of the worst gradient."""
        return max(self.errors.values(), default=0.0)

    @property
    def where(self) -> str:
        """What is worst: a gradient on one side only, else the name of the parameter."""
        if self.one_side:
            return f"{self.one_side[0]}: a gradient on one side only"
        return max(self.errors, key=lambda name: self.errors[name])

    @property
    def ok(self) -> bool:
        """True if nothing is further off than its bound."""
        return not self.one_side and self.loss_error < self.loss_bound and self.worst < self.bound


def one_process(build: Callable[[], nn.Module], batch: dict[str, torch.Tensor], bf16: bool) -> dict[str, Any]:
    """Loss and gradients of one process with the global batch, in float32 and, if asked for, in bf16 too.

    Args:
        build: returns the model, with equal values at each call.
        batch: arguments of its forward.
        bf16: run under autocast to bf16, too.
    """
    result: dict[str, Any] = {}
    for precision in ("float32", *(("bf16",) if bf16 else ())):
        model = build()
        device = batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        result[precision] = {"loss": loss.item(), "gradients": gradients}
    return result


def mean_over_ranks(loss: torch.Tensor) -> float:
    """The loss, of all ranks the mean. Collective where there is a process group."""
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def compare(loss: float, model: nn.Module, expected: dict[str, Any]) -> Compared:
    """Compare the gradients of a parallel model with those of one process. Collective.

    Args:
        loss: of all ranks.
        model: prepared, after its backward.
        expected: what :func:`one_process` returned.
    """
    right = expected["float32"]["gradients"]
    given = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = gather_objects(list(given))
    # A gradient that some ranks lack is not gathered: the others would wait for these.
    everywhere = [name for name in given if all(name in others for others in names)]
    mine = _errors({name: full_tensor(given[name]).cpu() for name in everywhere}, right)
    return _compared(loss, expected, gather_objects(mine), names)


def compare_saved(found: list[dict[str, Any]], expected: dict[str, Any]) -> Compared:
    """The same for what ranks saved: of each its ``loss`` and ``gradients``, name -> full tensor on the CPU."""
    right = expected["float32"]["gradients"]
    names = [list(rank["gradients"]) for rank in found]
    loss = sum(rank["loss"] for rank in found) / len(found)
    return _compared(loss, expected, [_errors(rank["gradients"], right) for rank in found], names)


def _compared(
    loss: float, expected: dict[str, Any], of_ranks: list[dict[str, float]], names: list[list[str]]
) -> Compared:
    """From the errors of each rank, and the names of its gradients."""
    exact = expected["float32"]
    right = exact["gradients"]
    everywhere = set.intersection(*(set(errors) for errors in of_ranks))
    errors = {name: max(rank[name] for rank in of_ranks) for name in right if name in everywhere}
    one_side = sorted({*right, *(name for others in names for name in others)} - errors.keys())
    bound, loss_bound = GRADIENT, LOSS
    if "bf16" in expected:
        plain = expected["bf16"]
        bound = _BF16 * max(_errors(plain["gradients"], right).values())
        loss_bound = _BF16 * abs(plain["loss"] - exact["loss"]) / exact["loss"] + 2**-8
    return Compared(loss, exact["loss"], errors, one_side, _norms(right), loss_bound, bound)


def _norms(gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(gradient.double().norm()) for name, gradient in gradients.items()}


def _errors(got: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors by name, of those that are in both; infinity for another shape."""
    norms = _norms(right)
    everything = math.sqrt(sum(norm**2 for norm in norms.values()))
    found = {}
    for name, want in right.items():
        if name in got and got[name].shape != want.shape:
            found[name] = math.inf
        elif name in got:
            difference = float((got[name].double() - want.double()).norm())
            found[name] = _finite(difference / max(norms[name], everything / 100))
    return found


def _finite(error: float) -> float:
    """``error``; infinity where it is not a number, which is in no order."""
    return math.inf if math.isnan(error) else error
