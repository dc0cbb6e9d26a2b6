"""Linear layers with a forward of their own, tried on a small copy: do the shares of the ranks add up to the whole?

A subclass of ``nn.Linear`` may do anything in its forward. What it does to each output feature (column-wise) or to a
sum over input features (row-wise) alone may be sharded; a scale over the whole weight (BitNet), a norm of the input of
a row-wise layer or an activation at its end may not, although the shapes fit. So its forward is run, whole and on the
shares of each rank.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ... import compat
from ...core.shard_layout import local_slice
from ...core.sharding_spec import REPLICATED, ShardingSpec
from ...errors import PlanError, first_line
from ..layer_kinds import Matrix, as_matrix
from .numerical_checks import CannotRun, is_close

_FEATURES, _TOKENS = 4, 5  # features per rank


def faulty_linears(model: nn.Module, spec: ShardingSpec, tp_size: int, inside: set[str]) -> dict[str, str]:
    """Sharded linear layers with a forward of their own that does not compute the same on shares: name -> what is
    wrong.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta; only read.
        spec: its resolved plan.
        tp_size: number of ranks on the tp axis.
        inside: names of the repeated layers. Elsewhere nobody looks at further parameters of a linear layer.
    """
    known: dict[Any, str] = {}
    faults: dict[str, str] = {}
    for name, module in model.named_modules():
        place = spec.parameters.get(f"{name}.weight", REPLICATED)
        if place.dim is None or not _has_own_forward(module):
            continue
        matrix = as_matrix(module, name)
        if matrix is None:
            continue
        kind = (type(module), vars(module).get("forward"), place, tuple(matrix.weight.shape), _plain_state(module))
        if kind not in known:
            try:
                known[kind] = (
                    "" if _adds_up(matrix, spec, name, tp_size) else "does not compute the same on the shares of ranks"
                )
            except CannotRun as error:
                known[kind] = f"cannot be tried on a small copy ({error})"
        trouble = known[kind]
        further = module._parameters.keys() - {"weight", "bias"}
        if not trouble and further and not any(name.startswith(f"{layer}.") for layer in inside):
            trouble = f"uses {', '.join(sorted(further))} outside of the repeated layers"
        if trouble:
            faults[name] = f"the forward of {type(module).__name__} {trouble}"
    return faults


def leave_ends_whole(
    model: nn.Module, spec: ShardingSpec, faults: dict[str, str], inside: set[str], strict: bool
) -> None:
    """Take faulty layers that stand outside of the repeated layers, and what is tied to them, out of the plan, in
    place.

    Args:
        model: the model.
        spec: its resolved plan.
        faults: what :func:`faulty_linears` returned.
        inside: names of the repeated layers, whose parts are left whole by the run without values.
        strict: the plan is the user's own, so a fault in it is an error.

    Raises:
        PlanError: a fault in a plan of the user's own.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for fault, reason in faults.items():
        if any(fault.startswith(f"{layer}.") for layer in inside):
            continue
        if strict:
            raise PlanError(
                f"the tensor-parallel plan is wrong for {fault}: {reason}. Leave its entry out of the tp_plan, or use "
                "tp_size=1."
            )
        weight = model.get_submodule(fault).weight
        for owner in {name.rpartition(".")[0] for name in names[id(weight)]}:
            for name in [n for n in spec.parameters if n.rpartition(".")[0] == owner]:
                del spec.parameters[name]
            spec.modules.pop(owner, None)
            spec.rows.append((owner, "left whole", 1, "Replicate", "derived: tried on a small copy"))
        spec.notes.append(f"{fault} is left whole on every rank: {reason}.")


def refuse_what_is_left(spec: ShardingSpec, faults: dict[str, str]) -> None:
    """Raise :class:`PlanError` for faulty layers that are still sharded, because nobody could look into the layer
    around them.
    """
    for name, reason in faults.items():
        if f"{name}.weight" in spec.parameters:
            raise PlanError(
                f"the tensor-parallel plan is wrong for {name}: {reason}. Give a tp_plan without it and its pair, or "
                f"use tp_size=1."
            )


def _has_own_forward(module: nn.Module) -> bool:
    conv1d = compat.transformers_conv1d_type()
    stock = [nn.Linear.forward, *([conv1d.forward] if conv1d is not None else [])]  # type: ignore[attr-defined]
    if not isinstance(module, (nn.Linear, *([conv1d] if conv1d is not None else []))):
        return False
    return "forward" in vars(module) or type(module).forward not in stock


def _plain_state(module: nn.Module) -> str:
    return repr(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))))


def _adds_up(matrix: Matrix, spec: ShardingSpec, name: str, tp_size: int) -> bool:
    """True if outputs, and gradients of the input and of each parameter, of the ranks make up those of the whole."""
    module, place = matrix.module, spec.parameters[f"{name}.weight"]
    columns = place.dim == matrix.out_dim
    small, values = _small(matrix, tp_size * _FEATURES * place.blocks)
    places = {key: spec.parameters.get(f"{name}.{key}", REPLICATED) for key in values}
    generator = torch.Generator().manual_seed(1)
    wide = small[matrix.in_dim]
    x = torch.randn(2, _TOKENS, wide, generator=generator)
    weights = torch.randn(2, _TOKENS, small[matrix.out_dim], generator=generator)
    try:
        whole = _run(module, matrix, values, x, weights)
    except Exception as error:
        raise CannotRun(first_line(error)) from error
    results = []
    for rank in range(tp_size):
        shares = {key: local_slice(value, places[key], rank, tp_size) for key, value in values.items()}
        cut = replace(place, dim=-1)
        own = local_slice(weights, cut, rank, tp_size) if columns else weights
        if not columns and "bias" in shares and rank:
            shares["bias"] = torch.zeros_like(shares["bias"])  # added once
        given = x if columns else local_slice(x, replace(cut, blocks=1), rank, tp_size)
        try:
            results.append(_run(module, matrix, shares, given, own))
        except Exception:
            return False
    outputs, inputs = [r[0] for r in results], [r[1] for r in results]
    if columns:
        same = all(map(is_close, outputs, (local_slice(whole[0], cut, rank, tp_size) for rank in range(tp_size))))
        same = same and is_close(sum(inputs), whole[1])
    else:
        same = is_close(sum(outputs), whole[0]) and is_close(torch.cat(inputs, -1), whole[1])
    for key, gradient in whole[2].items():
        own_gradients = [r[2][key] for r in results]
        if places[key].dim is None and not (key == "bias" and not columns):
            same = same and is_close(sum(own_gradients), gradient)
        elif places[key].dim is not None:
            expected = (local_slice(gradient, places[key], rank, tp_size) for rank in range(tp_size))
            same = same and all(map(is_close, own_gradients, expected))
    return same


def _small(matrix: Matrix, features: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The shape of the weight of a small copy, and values for all parameters of the layer itself."""
    if any(True for child in matrix.module.children() for _ in child.parameters()):
        raise CannotRun("it holds other layers with parameters")
    small = [features, features]
    if matrix.out_features != matrix.in_features:
        small[matrix.in_dim] = 2 * features
    sizes = {matrix.out_features: small[matrix.out_dim], matrix.in_features: small[matrix.in_dim]}
    generator = torch.Generator().manual_seed(0)
    values = {
        key: torch.randn([sizes.get(size, size) for size in parameter.shape], generator=generator)
        for key, parameter in matrix.module._parameters.items()
        if parameter is not None
    }
    return small, values


def _run(
    module: nn.Module, matrix: Matrix, values: dict[str, torch.Tensor], x: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    memo: dict[int, Any] = {}
    parameters: dict[str, nn.Parameter] = {}
    for key, parameter in module._parameters.items():
        if parameter is not None:
            parameters[key] = memo[id(parameter)] = nn.Parameter(values[key].clone())
    copied = copy.deepcopy(module, memo)
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
        (output * weights).sum().backward()
    zeros = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in parameters.items()}
    return output.detach(), torch.zeros_like(x) if x.grad is None else x.grad, zeros
