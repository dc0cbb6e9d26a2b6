"""Numerical check of ``nn.Linear`` subclasses with a custom forward: do the results of the ranks make up that of one
process?

Such a forward may do anything. What it does to each output feature (column-wise) or to a sum over input features
(row-wise) alone may be sharded. A scale over the full weight (BitNet), a norm of the input of a row-wise layer or an
activation at its end may not, although the shapes fit. So a small copy is run, unsharded and on each rank's shards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import compat
from ...core.model_view import ModelView
from ...core.shard_layout import local_slice
from ...core.sharding_spec import REPLICATED, ParameterSpec, ShardingSpec
from ...errors import PlanError, first_line
from ..layer_kinds import Matrix, as_matrix
from .numerical_checks import CannotRun, holds_layers, is_close, local_shards, own_parameters, small_copy

_FEATURES, _TOKENS = 4, 5  # features per rank


def faulty_linears(model: nn.Module, spec: ShardingSpec, tp_size: int, inside: set[str]) -> dict[str, str]:
    """Sharded linear layers with a custom forward that does not compute the same on shards: name -> the fault.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta; only read.
        spec: its resolved plan.
        tp_size: number of ranks on the tp axis.
        inside: names of the repeated layers. Elsewhere further parameters of a linear layer are not traced.
    """
    known: dict[Any, str] = {}
    faults: dict[str, str] = {}
    for name, module in model.named_modules():
        place = spec.parameters.get(f"{name}.weight", REPLICATED)
        if place.dim is None or not _has_custom_forward(module):
            continue
        matrix = as_matrix(module, name)
        if matrix is None:
            continue
        kind = (type(module), vars(module).get("forward"), place, tuple(matrix.weight.shape), _plain_state(module))
        if kind not in known:
            try:
                known[kind] = (
                    "" if _matches(matrix, spec, name, tp_size) else "does not compute the same on the shards of ranks"
                )
            except CannotRun as error:
                known[kind] = f"cannot be checked numerically ({error})"
        trouble = known[kind]
        further = module._parameters.keys() - {"weight", "bias"}
        if not trouble and further and not any(name.startswith(f"{layer}.") for layer in inside):
            trouble = f"uses {', '.join(sorted(further))} outside of the repeated layers"
        if trouble:
            faults[name] = f"the forward of {type(module).__name__} {trouble}"
    return faults


def leave_ends_replicated(
    model: nn.Module, spec: ShardingSpec, faults: dict[str, str], inside: set[str], strict: bool
) -> None:
    """Take faulty layers outside of the repeated layers, and those with tied weights, out of the plan, in place.

    Args:
        model: the model.
        spec: its resolved plan.
        faults: the result of :func:`faulty_linears`.
        inside: names of the repeated layers, whose parts the run on fake tensors takes out of the plan.
        strict: the plan is the user's own, so a fault in it is an error.

    Raises:
        PlanError: a fault in a plan of the user's own.
    """
    tied = ModelView.of(model).names_of
    for fault, reason in faults.items():
        if any(fault.startswith(f"{layer}.") for layer in inside):
            continue
        if strict:
            raise PlanError(
                f"the tensor-parallel plan is wrong for {fault}: {reason}. Leave its entry out of the tp_plan, or use "
                "tp_size=1."
            )
        weight: Any = model.get_submodule(fault).weight
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in tied[weight]):
            for name in [n for n in spec.parameters if n.rpartition(".")[0] == owner]:
                del spec.parameters[name]
            spec.modules.pop(owner, None)
            spec.rows.append((owner, "left replicated", 1, "Replicate", "derived: checked numerically"))
        spec.notes.append(f"{fault} is replicated on every rank: {reason}.")


def refuse_remaining(spec: ShardingSpec, faults: dict[str, str]) -> None:
    """Raise :class:`PlanError` for faulty layers that are still sharded, where the layer around them cannot be run."""
    for name, reason in faults.items():
        if f"{name}.weight" in spec.parameters:
            raise PlanError(
                f"the tensor-parallel plan is wrong for {name}: {reason}. Give a tp_plan without it and its pair, or "
                f"use tp_size=1."
            )


def _has_custom_forward(module: nn.Module) -> bool:
    conv1d = compat.transformers_conv1d_type()
    stock = [nn.Linear.forward, *([conv1d.forward] if conv1d is not None else [])]  # type: ignore[attr-defined]
    if not isinstance(module, (nn.Linear, *([conv1d] if conv1d is not None else []))):
        return False
    return "forward" in vars(module) or type(module).forward not in stock


def _plain_state(module: nn.Module) -> str:
    return repr(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))))


def _matches(matrix: Matrix, spec: ShardingSpec, name: str, tp_size: int) -> bool:
    """True if the ranks' outputs, and gradients of the input and of each parameter, make up those of one process."""
    module, weight = matrix.module, spec.parameters[f"{name}.weight"]
    columns = weight.dim == matrix.out_dim
    features, values = _small_values(matrix, tp_size * _FEATURES * weight.blocks)
    specs = {key: spec.parameters.get(f"{name}.{key}", REPLICATED) for key in values}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, _TOKENS, features[matrix.in_dim], generator=generator)
    factors = torch.randn(2, _TOKENS, features[matrix.out_dim], generator=generator)
    try:
        want = _run(module, matrix, values, x, factors)
    except Exception as error:
        raise CannotRun(first_line(error)) from error
    outputs_cut = replace(weight, dim=-1)
    inputs_cut = replace(outputs_cut, blocks=1)
    got: list[_Result] = []
    for rank in range(tp_size):
        shards = local_shards(values, specs, rank, tp_size)
        if not columns and "bias" in shards and rank:
            shards["bias"] = torch.zeros_like(shards["bias"])  # added on TP rank 0 only
        local_x = x if columns else local_slice(x, inputs_cut, rank, tp_size)
        local_factors = local_slice(factors, outputs_cut, rank, tp_size) if columns else factors
        try:
            got.append(_run(module, matrix, shards, local_x, local_factors))
        except Exception:
            return False

    def sharded(values: list[torch.Tensor], full: torch.Tensor, cut: ParameterSpec) -> bool:
        return all(is_close(value, local_slice(full, cut, rank, tp_size)) for rank, value in enumerate(values))

    outputs, inputs = [r.output for r in got], [r.input_gradient for r in got]
    if columns:
        same = sharded(outputs, want.output, outputs_cut) and is_close(sum(inputs), want.input_gradient)
    else:
        same = is_close(sum(outputs), want.output) and is_close(torch.cat(inputs, -1), want.input_gradient)
    for key, gradient in want.gradients.items():
        gradients = [r.gradients[key] for r in got]
        if specs[key].dim is not None:
            same = same and sharded(gradients, gradient, specs[key])
        elif columns or key != "bias":
            same = same and is_close(sum(gradients), gradient)
    return same


def _small_values(matrix: Matrix, features: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The shape of the weight of a small copy, and values for all parameters of the layer itself."""
    if holds_layers(matrix.module):
        raise CannotRun("it holds other layers with parameters")
    small = [features, features]
    if matrix.out_features != matrix.in_features:
        small[matrix.in_dim] = 2 * features
    sizes = {matrix.out_features: small[matrix.out_dim], matrix.in_features: small[matrix.in_dim]}
    generator = torch.Generator().manual_seed(0)
    values = {
        key: torch.randn([sizes.get(size, size) for size in parameter.shape], generator=generator)
        for key, parameter in own_parameters(matrix.module).items()
    }
    return small, values


class _Result(NamedTuple):
    output: torch.Tensor
    input_gradient: torch.Tensor
    gradients: dict[str, torch.Tensor]


def _run(
    module: nn.Module, matrix: Matrix, values: dict[str, torch.Tensor], x: torch.Tensor, factors: torch.Tensor
) -> _Result:
    """Forward, and the backward of the sum of the outputs times ``factors``."""
    copied = small_copy(module, values, requires_grad=True)
    compat.without_hooks(copied)
    out, wide = values["weight"].shape[matrix.out_dim], values["weight"].shape[matrix.in_dim]
    for key, value in (("out_features", out), ("in_features", wide), ("nf", out), ("nx", wide)):
        if hasattr(copied, key):
            setattr(copied, key, value)
    x = x.clone().requires_grad_()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = copied(x)
        if not isinstance(output, torch.Tensor):
            raise CannotRun("it returns no tensor")
        (output * factors).sum().backward()
    return _Result(output.detach(), _gradient(x), {k: _gradient(p) for k, p in own_parameters(copied).items()})


def _gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad
