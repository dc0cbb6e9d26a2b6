"""Attention modules that count their own heads, and what they have to count when each rank has only some of them."""

from __future__ import annotations

import re

from torch import nn

from ..core.sharding_spec import InputHook, OutputHook, ShardingSpec
from .layer_kinds import as_matrix


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
            if "head" in attribute and type(value) is int and _counts(attribute, value, head_dim, features):
                counts.setdefault(parent_name, {})[attribute] = value // tp_size
    return counts


def _counts(attribute: str, value: int, head_dim: int, features: int) -> bool:
    """True if the attribute says how many heads ``features`` are, or how wide all of them; not how wide one is."""
    if re.search("dim|size", attribute):
        return value == features > head_dim
    return value * head_dim == features
