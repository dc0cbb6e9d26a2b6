"""Checks of a resolved plan before it is applied, and the head counts that they and other modules read.

* :func:`validate`: tp_size divides the attention heads of every sharded projection.
* :func:`counted_heads` and :func:`config_with_heads`: the head counts in a config.
* :func:`refuse_expert_parallel`: expert parallelism, asked for in transformers' own configuration, is refused by name
  and never dropped.
* :func:`local_head_counts`: attributes of attention modules that count heads, with their value on one rank.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..core.model_view import ModelView
from ..core.sharding_spec import InputHook, OutputHook, ShardingSpec
from ..errors import PlanError, UnsupportedError
from .layer_kinds import as_matrix


def validate(model: nn.Module | ModelView, spec: ShardingSpec, tp_size: int) -> None:
    """Check a resolved plan against the model's attention geometry.

    A column-wise projection without an output hook gives each rank a slice of the features. If its parent module has a
    ``head_dim``, the slice must consist of entire heads.

    Raises:
        PlanError: tp_size does not divide the heads; the message names the config field and its value.
    """
    view = ModelView.of(model)
    model, inner = view.model, view.inner
    fields = _head_fields(getattr(inner, "config", None))
    for name, module_spec in spec.modules.items():
        if module_spec.native_style is not None or module_spec.output is not OutputHook.NONE:
            continue
        weight_name = _weight_of(spec, name)
        # A forward shard means KV-head replication, where heads need not divide.
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

    A config whose layers differ (transformers 5.24) raises when a count is read from it, so its layers are read.
    """
    names = ("num_key_value_heads", "num_attention_heads", "num_global_key_value_heads")
    owners = {"": config}
    if getattr(config, "is_heterogeneous", False) is True:
        owners = {f"per_layer_config[{i}].": layer for i, layer in enumerate(config.per_layer_config)}
    values = {f"{owner}{name}": getattr(part, name, None) for name in names for owner, part in owners.items()}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def counted_heads(config: Any) -> dict[str, int]:
    """Field of ``config`` -> number of attention or key-value heads; empty if the config uses other field names."""
    return _counts(config)


def config_with_heads(model: nn.Module) -> Any | None:
    """The config that has the number of attention heads of the (text) model; None if no config has it.

    Looked up in this order: ``get_text_config()`` of the model's config, its sub-configs with "text" in their name, the
    config itself, then the configs of modules inside of ``model``.

    Args:
        model: a model, plain or PEFT-wrapped, or any object with a ``config``.
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


# ---- expert parallelism --------------------------------------------------------------------------------------------


def refuse_expert_parallel(model: nn.Module | ModelView) -> None:
    """Raise :class:`UnsupportedError` if the model's ``distributed_config`` asks for expert parallelism.

    transformers applies it while it loads a model. On a model that is already built the request would be dropped
    silently.
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
            f"config.distributed_config of {type(inner).__name__} has {asked}: expert parallelism (experts distributed "
            f"over ranks) is not available. Use tp_size, which gives every rank a slice of every expert, so that "
            f"it holds 1/tp_size of their bytes, and remove distributed_config from the config."
        )


# ---- attention modules that count their own heads ------------------------------------------------------------------


def local_head_counts(model: nn.Module, spec: ShardingSpec, tp_size: int) -> dict[str, dict[str, int]]:
    """Attributes of attention modules that count heads of sharded projections, with their value on one rank.

    Code from before transformers 4.48 reshapes to ``self.num_heads`` rather than to ``-1``, so a rank with a part of
    the heads needs the local number. Such an attribute is an integer, has "head" in its name, and equals the number of
    heads of a projection below the module, or the width of all heads together. The width of one head, which may happen
    to equal the number of heads, is not changed.

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
    """True if the attribute is the number of heads in ``features``, or their total width; not the width of one head."""
    if re.search("dim|size", attribute):
        return value == features > head_dim
    return value * head_dim == features
