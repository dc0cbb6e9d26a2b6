"""What must hold before a plan is executed: head counts that divide, and nothing that would be wrong in silence."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.model_view import ModelView
from ..core.sharding_spec import OutputHook, ShardingSpec
from ..errors import PlanError


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
