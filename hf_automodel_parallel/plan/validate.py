"""What must hold before a plan is executed: head counts that divide, and nothing that would be wrong in silence."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import PlanError
from .names import unwrapped
from .spec import Output, ShardingSpec


def validate(model: nn.Module, spec: ShardingSpec, tp_size: int) -> None:
    """Check a resolved plan against the model's attention geometry.

    A projection sharded column-wise whose output stays sharded hands each rank a slice of the features; where its parent
    module counts features in heads (it has a ``head_dim``), the slice must be a whole number of heads.

    Raises:
        PlanError: heads do not divide; the message names the config field and its value.
    """
    inner, _ = unwrapped(model)
    fields = _head_fields(getattr(inner, "config", None))
    for name, module_spec in spec.modules.items():
        if module_spec.foreign is not None or module_spec.output is not Output.NONE:
            continue
        weight_name = _weight_of(spec, name)
        if weight_name is None:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        head_dim = getattr(parent, "head_dim", None)
        module = model.get_submodule(weight_name.rpartition(".")[0])
        features = getattr(module, "out_features", None) or getattr(module, "nf", None)
        if not isinstance(head_dim, int) or not features or features % head_dim:
            continue
        heads = features // head_dim
        if heads % tp_size:
            field = next((f"{field}={value}" for field, value in fields.items() if value == heads), f"{heads} heads")
            raise PlanError(
                f"{field} does not divide by tp_size={tp_size}: {name} holds {heads} attention heads, and every rank needs "
                f"a whole number of them. Choose a tp_size that divides all head counts "
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
    names = ("num_key_value_heads", "num_attention_heads", "num_global_key_value_heads")
    values = {name: getattr(text, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, int)}
