"""Replace the parameters of an optimizer by the sharded parameters of the model, with their state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import PrepareError


def raw_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside of Accelerate's wrappers."""
    while hasattr(optimizer, "optimizer") and isinstance(optimizer.optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """The name of its class, with the library in front where ``torch.optim`` has another class of that name."""
    cls = type(optimizer)
    if getattr(torch.optim, cls.__name__, cls) is cls:
        return cls.__name__
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return ``id(parameter)`` -> name for all parameters; a tied parameter has its first name."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), name)
    return names


def check_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[list[list[str]]]:
    """Return the names of the parameters in each group of each optimizer.

    Args:
        model: the model before sharding.
        optimizers: torch optimizers, without Accelerate's wrappers.

    Returns:
        ``names[optimizer][group][i]``.

    Raises:
        PrepareError: an optimizer holds a parameter that the model does not have, holds one outside of
            ``param_groups``, or has state of a shape that cannot be sharded; or a trainable parameter is in no
            optimizer.
    """
    names = parameter_names(model)
    shapes = dict(model.named_parameters())
    result: list[list[list[str]]] = []
    covered: set[str] = set()
    for optimizer in optimizers:
        foreign = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
        if foreign:
            raise PrepareError(
                f"{optimizer_name(optimizer)} holds {len(foreign)} parameters that the model in this prepare call does "
                f"not have (shapes {_some(foreign)}). Create the optimizer from model.parameters() of the very model "
                f"you pass, after wrapping it with PEFT and before prepare."
            )
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor) and value.ndim and value.shape != p.shape:
                    raise PrepareError(
                        f"{optimizer_name(optimizer)} has stepped already, and its state {key!r} of {names[id(p)]} has "
                        f"the shape {tuple(value.shape)}, not the parameter's {tuple(p.shape)}: it cannot be sharded "
                        f"along. Call prepare before the first step."
                    )
        elsewhere = _held_elsewhere(optimizer, names)
        if elsewhere:
            raise PrepareError(
                f"{optimizer_name(optimizer)} keeps parameters outside of its param_groups ({_some(elsewhere)}): there "
                f"it would go on using the unsharded ones, which no longer belong to the model. Let it find them in "
                f"param_groups in each step, or create it after prepare from the parameters of the prepared model."
            )
        result.append([[names[id(p)] for p in group["params"]] for group in optimizer.param_groups])
        covered.update(name for group in result[-1] for name in group)
    missing = [name for name, p in shapes.items() if p.requires_grad and name not in covered]
    if missing:
        raise PrepareError(
            f"{len(missing)} trainable parameters are in no optimizer given to this prepare call ({_some(missing)}). "
            "They would collect gradients and never change. Add them to the optimizer, or freeze them with "
            "requires_grad_(False)."
        )
    return result


def _held_elsewhere(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> list[str]:
    """Return ``attribute: parameter`` for each parameter that ``optimizer`` holds outside of its groups and state.

    The list objects of the groups do not count: :func:`switch_parameters` changes them in place (LBFGS keeps one).
    """
    lists = {id(group["params"]) for group in optimizer.param_groups}
    found: list[str] = []

    def walk(attribute: str, value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            if id(value) in names:
                found.append(f"{attribute}: {names[id(value)]}")
        elif isinstance(value, dict) and depth:
            for item in (*value.keys(), *value.values()):
                walk(attribute, item, depth - 1)
        elif isinstance(value, (list, tuple, set, frozenset)) and depth and id(value) not in lists:
            for item in value:
                walk(attribute, item, depth - 1)

    for attribute, value in vars(optimizer).items():
        if attribute not in ("param_groups", "state"):
            walk(attribute, value, 4)
    return list(dict.fromkeys(found))


def switch_parameters(
    optimizer: torch.optim.Optimizer, names: list[list[str]], model: nn.Module, old: dict[str, nn.Parameter]
) -> None:
    """Replace the parameters of ``optimizer`` by those of the sharded ``model``, by name, in place.

    Groups and their hyperparameters stay. Existing state gets the placements of its parameter: of an optimizer that has
    stepped, or that creates its state in the constructor (Adagrad).

    Args:
        optimizer: the torch optimizer.
        names: ``names[group][i]``, from :func:`check_optimizers`.
        model: the model after sharding.
        old: name -> parameter before sharding, the key of existing state.
    """
    new = dict(model.named_parameters())
    state = dict(optimizer.state)
    optimizer.state.clear()
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        group["params"][:] = [new[name] for name in group_names]  # in place: LBFGS keeps the list
        for name in group_names:
            values = state.get(old[name])
            if values is not None:
                optimizer.state[new[name]] = _shard_state(values, new[name], tuple(old[name].shape))


def replace_parameters(optimizer: torch.optim.Optimizer, replacements: dict[int, nn.Parameter]) -> None:
    """Replace each parameter of ``optimizer`` by ``replacements[id(parameter)]``, in place, and shard its state.

    A parameter may be mapped to itself; then its state stays as it is.
    """
    for group in optimizer.param_groups:
        for old in group["params"]:
            new = replacements[id(old)]
            if new is not old and old in optimizer.state:
                optimizer.state[new] = _shard_state(optimizer.state.pop(old), new, tuple(old.shape))
        group["params"][:] = [replacements[id(p)] for p in group["params"]]


def _shard_state(values: Any, parameter: nn.Parameter, full_shape: tuple[int, ...]) -> Any:
    if not isinstance(values, dict) or not isinstance(parameter, DTensor):
        return values
    sharded = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor) and value.ndim and tuple(value.shape) == full_shape:
            value = value.full_tensor() if isinstance(value, DTensor) else value
            # src_data_rank=None: each rank slices its own full value; the default would scatter the one of rank 0.
            value = distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        sharded[key] = value
    return sharded


def _some(items: list[Any], count: int = 4) -> str:
    shown = ", ".join(map(str, items[:count]))
    return shown if len(items) <= count else f"{shown}, ..."
