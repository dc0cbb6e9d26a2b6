"""What must hold before a plan is executed: head counts that divide, and nothing that would be wrong in silence."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..core.model_view import ModelView
from ..core.sharding_spec import InputHook, OutputHook, ShardingSpec
from ..errors import PlanError, UnsupportedError
from .layer_kinds import as_matrix


def validate(model: nn.Module, spec: ShardingSpec, tp_size: int) -> None:
    """Check a resolved plan against the model's attention geometry.

    A projection sharded column-wise whose output stays sharded hands each rank a slice of the features; where its
    parent module counts features in heads (it has a ``head_dim``), the slice must be a whole number of heads.

    Raises:
        PlanError: heads do not divide; the message names the config field and its value.
    """
    inner = ModelView.of(model).inner
    fields = _head_fields(getattr(inner, "config", None))
    for name, module_spec in spec.modules.items():
        if module_spec.native_style is not None or module_spec.output is not OutputHook.NONE:
            continue
        weight_name = _weight_of(spec, name)
        if weight_name is None or spec.parameters[weight_name].forward_shard_dim is not None:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        head_dim = getattr(parent, "head_dim", None)
        module = model.get_submodule(weight_name.rpartition(".")[0])
        features = getattr(module, "out_features", None) or getattr(module, "nf", None)
        if not isinstance(head_dim, int) or not features or features % head_dim:
            continue
        heads = features // head_dim // spec.parameters[weight_name].blocks
        if heads % tp_size:
            field = next((f"{field}={value}" for field, value in fields.items() if value == heads), f"{heads} heads")
            raise PlanError(
                f"{field} does not divide by tp_size={tp_size}: {name} holds {heads} attention heads, and every rank "
                f"needs a whole number of them. Choose a tp_size that divides all head counts "
                f"({', '.join(f'{f}={v}' for f, v in fields.items())}), or tp_size=1."
            )


def _weight_of(spec: ShardingSpec, name: str) -> str | None:
    for candidate in (f"{name}.weight", f"{name}.base_layer.weight"):
        if candidate in spec.parameters:
            return candidate
    return None


def _head_fields(config: Any) -> dict[str, int]:
    if config is None:
        return {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return _counts(text)


def _counts(config: Any) -> dict[str, int]:
    """The head counts that ``config`` gives, key-value heads first (they are fewer, so they are what usually fails).

    A config whose layers differ (transformers 5.24) is asked layer by layer; it raises when it is read as a whole.
    """
    names = ("num_key_value_heads", "num_attention_heads", "num_global_key_value_heads")
    places = {"": config}
    if getattr(config, "is_heterogeneous", False) is True:
        places = {f"per_layer_config[{i}].": layer for i, layer in enumerate(config.per_layer_config)}
    values = {f"{place}{name}": getattr(part, name, None) for name in names for place, part in places.items()}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def counted_heads(config: Any) -> dict[str, int]:
    """The counts of attention and key-value heads that ``config`` gives, by name; none where others have other
    names.
    """
    return _counts(config)


def config_with_heads(model: nn.Module) -> Any | None:
    """The config that says how many attention heads the (text) model has; None if none does.

    A composite config is asked for its text config; one that does not know which of its parts that is, is asked for
    each part; then the models inside of ``model`` are. ``model`` may be any object with a ``config``.
    """
    inner = ModelView.of(model).inner if isinstance(model, nn.Module) else model
    owners = [inner, *(inner.modules() if isinstance(inner, nn.Module) else ())]
    for config in filter(None, (getattr(owner, "config", None) for owner in owners)):
        text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else None
        parts = [part for name, part in vars(config).items() if name.endswith("_config") and "text" in name]
        for candidate in (text, *parts, config):
            if any(name.endswith("num_attention_heads") for name in _counts(candidate)):
                return candidate
    return None


# ---- expert parallel -----------------------------------------------------------------------------------------------


def refuse_expert_parallel(model: nn.Module) -> None:
    """Raise :class:`UnsupportedError` if the model's ``distributed_config`` asks for experts dealt out over ranks.

    transformers carries that out while it loads a model; on a model that is already built the request would have no
    effect.
    """
    inner = ModelView.of(model).inner
    wanted = getattr(getattr(inner, "config", None), "distributed_config", None)

    def field(name: str) -> Any:
        return wanted.get(name) if isinstance(wanted, dict) else getattr(wanted, name, None)

    size = field("ep_size")
    asked = f"ep_size={size}" if isinstance(size, int) and size > 1 else ""
    asked = asked or ("enable_expert_parallel=True" if field("enable_expert_parallel") is True else "")
    if wanted is not None and asked:
        raise UnsupportedError(
            f"config.distributed_config of {type(inner).__name__} has {asked}: expert parallelism (whole experts dealt "
            f"out over ranks) is not available. Use tp_size, which gives every rank a slice of every expert, so that "
            f"it holds 1/tp_size of their bytes, and remove distributed_config from the config."
        )


# ---- heads ---------------------------------------------------------------------------------------------------------


def local_head_counts(model: nn.Module, spec: ShardingSpec, tp_size: int) -> dict[str, dict[str, int]]:
    """Attributes of modules that count heads of sharded projections, with the number of heads on one rank.

    Code from before transformers 4.48 reshapes to ``self.num_heads`` rather than to ``-1``. Such an attribute is an
    integer, has "head" in its name and equals the number of heads that a projection below the module makes or takes, or
    the width of all of them together. The width of one head, which may happen to equal the number of heads, stays what
    it is.

    Args:
        model: the model, plain or PEFT-wrapped; only read.
        spec: the resolved plan.
        tp_size: number of ranks on the tp axis.

    Returns:
        module name -> attribute -> local count.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, boundary in spec.modules.items():
        parent_name = name.rpartition(".")[0]
        parent = model.get_submodule(parent_name)
        head_dim = getattr(parent, "head_dim", getattr(parent, "attention_head_size", None))
        if boundary.native_style is not None or not isinstance(head_dim, int):
            continue
        base_name = f"{name}.base_layer" if f"{name}.base_layer.weight" in spec.parameters else name
        matrix = as_matrix(model.get_submodule(base_name), base_name)
        if matrix is None:
            continue
        if boundary.output is OutputHook.NONE:
            features = matrix.out_features
        elif boundary.input is InputHook.NONE:
            features = matrix.in_features
        else:
            continue
        for attribute, value in vars(parent).items():
            if "head" in attribute and type(value) is int and _attribute_counts(attribute, value, head_dim, features):
                counts.setdefault(parent_name, {})[attribute] = value // tp_size
    return counts


def _attribute_counts(attribute: str, value: int, head_dim: int, features: int) -> bool:
    """True if the attribute says how many heads ``features`` are, or how wide all of them; not how wide one is."""
    if re.search("dim|size", attribute):
        return value == features > head_dim
    return value * head_dim == features
