"""Weights and optimizer state by parameter name: collected from local shards, and loaded into them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.ranks import gather_objects
from ..errors import CheckpointError, UnsupportedError
from ..optim.handoff import parameter_names
from .reader import check_keys, some
from .shards import LocalShard
from .sources import Entry, Source
from .steps import checkpoint_step
from .writer import Path_

logger = logging.getLogger(__name__)

#: A state to save: path -> tensor or plain value.
State = dict[Path_, Any]


# ---- weights -------------------------------------------------------------------------------------------------------


def model_state(model: nn.Module, adapter_only: bool) -> dict[str, Any]:
    """The state that a checkpoint of ``model`` holds: name -> view of the sharded parameter or buffer.

    Args:
        model: any module, sharded or not.
        adapter_only: leave out frozen base weights of a PEFT model. All adapters and all trainable parameters stay. No
            effect on other models.
    """
    state = {
        name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in model.state_dict().items()
    }
    if not (adapter_only and compat.is_peft_model(model)):
        return state
    adapters = set(model.peft_config)  # type: ignore[arg-type]
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {
        name: value
        for name, value in state.items()
        if name in trainable or name not in frozen or adapters & set(name.split("."))
    }


def load_model(model: nn.Module, source: Source, adapter_only: bool) -> None:
    """Fill the parameters and buffers of ``model`` in place; collective.

    Args:
        model: any module, sharded or not.
        source: the saved state.
        adapter_only: see :func:`model_state`. Frozen base weights of a checkpoint of the entire model are ignored.

    Raises:
        CheckpointError: on all ranks: missing names, other shapes, or names that the model does not have.
    """
    with checkpoint_step(f"loading {source.name}", source.group):
        wanted = model_state(model, adapter_only)
        known = {str(path[-1]): entry for path, entry in source.entries.items()}
        wanted = _with_what_was_trained(model, wanted, known)
        wanted = _names_of_peft(model, wanted, known, adapter_only)
        check_keys({n: v.shape if isinstance(v, torch.Tensor) else None for n, v in wanted.items()}, known, source.name)
        everything = wanted if not adapter_only else _all_names(model, wanted)
        unknown = [name for name in known if name not in everything]
        if unknown:
            raise CheckpointError(
                f"{source.name} holds {some(unknown)}, which this model does not have. It was saved from another model "
                f"or with another adapter."
            )
        warn_of_dtypes({n: v for n, v in wanted.items() if isinstance(v, torch.Tensor)}, known, source.name)
        shards: dict[Path_, LocalShard | None] = {
            (name,): LocalShard.of(value) if isinstance(value, torch.Tensor) else None for name, value in wanted.items()
        }
    with torch.no_grad():
        values = source.read(shards)
    if values:  # extra state of modules (set_extra_state), which only their own code can load
        model.load_state_dict({str(path[-1]): value for path, value in values.items()}, strict=False)


def _all_names(model: nn.Module, wanted: Mapping[str, Any]) -> set[str]:
    return set(wanted) | set(model.state_dict())


def _with_what_was_trained(model: nn.Module, wanted: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """``wanted`` and all base weights in a checkpoint that lacks some of them.

    A checkpoint that lacks base weights left the frozen ones out. The ones that it has were trained, so they have to be
    loaded even if they are frozen in this model.
    """
    everything = model_state(model, adapter_only=False)
    if all(name in known for name in everything):
        return wanted
    return {name: value for name, value in everything.items() if name in wanted or name in known}


def _names_of_peft(
    model: nn.Module, wanted: dict[str, Any], known: Mapping[str, Any], adapter_only: bool
) -> dict[str, Any]:
    """``wanted`` under the names of PEFT's files if the checkpoint has these; they omit the adapter's name.

    Stock Accelerate saves sharded adapters under such names.
    """
    if not (adapter_only and compat.is_peft_model(model)) or any(name in known for name in wanted):
        return wanted
    from peft import get_peft_model_state_dict

    named = get_peft_model_state_dict(model, state_dict=wanted, adapter_name=model.active_adapter)
    return named if set(known) == set(named) else wanted


def warn_of_dtypes(tensors: Mapping[str, torch.Tensor], known: Mapping[str, Entry], name: str) -> None:
    """Log a warning if tensors are converted to another dtype while they are loaded."""
    other = [key for key, tensor in tensors.items() if known[key].dtype not in (None, tensor.dtype)]
    if other:
        logger.warning(
            "%s: %s in the checkpoint are converted to the dtypes of this run (%s is %s there and %s here)",
            name,
            some(other),
            other[0],
            known[other[0]].dtype,
            tensors[other[0]].dtype,
        )


# ---- optimizer -----------------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> State:
    """State and groups of ``optimizer`` by the names of its parameters, in the form of torch's
    ``get_optimizer_state_dict``.

    Parameters without state are left out: the optimizer is not stepped to create it.

    Raises:
        UnsupportedError: state that a mesh-independent checkpoint cannot hold: it belongs to no parameter, or has
            several tensors under one key.
    """
    names = names_by_group(optimizer, model)
    flat = [name for group in names for name in group]
    content = optimizer.state_dict()
    state: State = {}
    for index, values in content["state"].items():
        if not isinstance(index, int) or not isinstance(values, Mapping):
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps the state {index!r}, which belongs to no parameter; no checkpoint "
                f"that fits other meshes can hold it."
            )
        for key, value in values.items():
            if isinstance(value, (list, tuple, dict)) and any(
                isinstance(v, torch.Tensor) for v in compat.tree_leaves(value)
            ):
                raise UnsupportedError(
                    f"{type(optimizer).__name__} keeps several tensors in its state {key!r} of {flat[index]}; no "
                    f"checkpoint that fits other meshes can hold them."
                )
            state["state", flat[index], key] = value
    for number, (group, group_names) in enumerate(zip(content["param_groups"], names, strict=True)):
        for key, value in group.items():
            state["param_groups", number, key] = list(group_names) if key == "params" else value
    return state


def names_by_group(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Names of the parameters in each group of ``optimizer``.

    Raises:
        CheckpointError: the optimizer holds a parameter that ``model`` does not have.
    """
    names = parameter_names(model)
    try:
        return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    except KeyError:
        raise CheckpointError(
            f"{type(optimizer).__name__} holds parameters that the model {type(model).__name__} does not have."
        ) from None


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, source: Source) -> None:
    """Load state and hyper-parameters of ``optimizer`` from ``source``; collective.

    Existing state is dropped; a parameter without state in the checkpoint has none afterwards. The form of the state
    comes from the checkpoint, so the optimizer is not stepped to create it.

    Raises:
        CheckpointError: on all ranks: other parameters, or other parameter groups.
        UnsupportedError: a sharded state tensor has another shape than its parameter.
    """
    with checkpoint_step(f"loading {source.name}", source.group):
        names = names_by_group(optimizer, model)
        parameters = {
            name: p
            for group, own in zip(optimizer.param_groups, names, strict=True)
            for name, p in zip(own, group["params"])
        }
        # State of unknown parameters would be dropped silently.
        foreign = [str(path[1]) for path in source.entries if path[0] == "state" and path[1] not in parameters]
        if foreign:
            raise CheckpointError(
                f"{source.name} holds optimizer state of {some(list(dict.fromkeys(foreign)))}, which this optimizer "
                f"does not train. It was saved with other trainable parameters."
            )
        plain = {path: None for path, entry in source.entries.items() if entry.size is None}
        tensors = {
            path: _template(parameters.get(str(path[1])), path, entry, source.name)
            for path, entry in source.entries.items()
            if entry.size is not None
        }
        shards = {path: LocalShard.of(tensor) for path, tensor in tensors.items()}
    with torch.no_grad():
        values = source.read({**plain, **shards})
    with checkpoint_step(f"loading {source.name}", source.group):
        saved_groups = _nested_groups({**tensors, **values})
        order = _match_groups(names, saved_groups, source.name)
        flat = [name for group in names for name in group]
        state: dict[int, dict[str, Any]] = {}
        for path, value in {**values, **tensors}.items():
            if path[0] == "state":
                state.setdefault(flat.index(str(path[1])), {})[str(path[2])] = value
        groups, first = [], 0
        for own, number in zip(names, order, strict=True):
            saved = {key: value for key, value in saved_groups[number].items() if key != "params"}
            groups.append({**saved, "params": list(range(first, first + len(own)))})
            first += len(own)
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _template(parameter: torch.Tensor | None, path: Path_, entry: Entry, name: str) -> torch.Tensor:
    """An empty tensor for one entry: sharded like the parameter if it has the same shape, else replicated."""
    size = entry.size or torch.Size(())
    if parameter is not None and size == parameter.shape and size:
        return torch.empty_like(parameter.detach(), dtype=entry.dtype)
    if not entry.one_chunk and isinstance(parameter, DTensor):
        raise UnsupportedError(
            f"{name}: the state {path[-1]!r} of {path[1]} has the shape {tuple(size)}, the parameter "
            f"{tuple(parameter.shape)}, and its sharding is not known."
        )
    return torch.empty(size, dtype=entry.dtype)


def _nested_groups(values: State) -> list[dict[str, Any]]:
    groups: dict[int, dict[str, Any]] = {}
    for path, value in values.items():
        if path[0] == "param_groups":
            groups.setdefault(int(path[1]), {})[str(path[2])] = value
    return [groups[number] for number in sorted(groups)]


def _match_groups(names: list[list[str]], saved: list[dict[str, Any]], name: str) -> list[int]:
    """For each group of the optimizer, the index of the saved group with the same parameters."""
    described = [set(group.get("params", ())) for group in saved]
    order: list[int] = []
    for number, own in enumerate(names):
        candidates = [i for i, group in enumerate(described) if group == set(own) and i not in order]
        if not candidates or len(names) != len(saved):
            nearest = described[number] if number < len(described) else set()
            differing = sorted(nearest ^ set(own))
            raise CheckpointError(
                f"{name} was saved with {len(saved)} parameter groups of {[len(group) for group in described]} "
                f"parameters, this optimizer has {len(names)} of {[len(group) for group in names]}"
                + (f"; {some(differing)} are in one of them only" if differing else "")
                + ". Build the optimizer with the same groups."
            )
        order.append(number if number in candidates else candidates[0])
    return order


# ---- plain tensors -------------------------------------------------------------------------------------------------


def check_same_everywhere(state: Mapping[Any, Any], what: str, fatal: bool, group: Any = None) -> None:
    """Compare plain tensors (not DTensors) between the ranks, because only rank 0's are saved; collective.

    Raises:
        UnsupportedError: they differ and ``fatal`` is True; otherwise a warning names them.
    """
    digests = {
        str(key if isinstance(key, str) else ".".join(map(str, key))): hashlib.sha256(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.numel()
    }
    gathered = gather_objects(digests, group)
    differing = sorted({name for other in gathered for name in other if other.get(name) != gathered[0].get(name)})
    if not differing:
        return
    if fatal:
        raise UnsupportedError(
            f"{what}: {some(differing)} differ between the ranks, and a checkpoint could hold only one of them."
        )
    logger.warning("%s: %s differ between the ranks; the checkpoint holds those of rank 0", what, some(differing))
