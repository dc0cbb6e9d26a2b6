"""KV-head replication: multi-query or grouped-query attention with fewer key and value heads than tp ranks.

Key and value projections are replicated over tp. In forward each rank computes with the rows of the one head that its
queries read. Several ranks compute with the same head, so the gradient of the full parameter is ``Partial``, with zeros
in the rows of other heads, and is all-reduced like every other partial gradient. Between forwards it is an ordinary
replicated parameter, so optimizer, gradient norm, files and checkpoints on other meshes need no special case. The cost
is memory: these projections are not divided by tp. Each has 1 / (queries per key-value head) of the size of the query
projection. (Megatron-LM replicates key-value heads in the same way.)
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from ..core.sharding_spec import InputHook, OutputHook, ShardingSpec
from ..errors import PlanError
from .layer_kinds import as_matrix

_COPIES = re.compile(r"\.(?:original_module|modules_to_save\.[^.]+)$")


def replicate_key_value_heads(model: nn.Module, spec: ShardingSpec, tp_size: int) -> list[str]:
    """Replicate key and value projections that have fewer heads than there are tp ranks; changes ``spec``.

    A projection is one of keys or values if its attention has the number of query heads per key-value head (an integer
    attribute such as ``num_key_value_groups``), and at most two projections of the attention have so few heads.

    Args:
        model: the model, plain or PEFT-wrapped; only read.
        spec: the resolved plan.
        tp_size: number of ranks on the tp axis.

    Returns:
        Names of the projections that are replicated.

    Raises:
        PlanError: heads are fewer than the ranks, but neither divides the other.
    """
    attentions: dict[str, dict[str, int]] = {}  # attention -> column-wise projection -> heads
    for name, boundary in spec.modules.items():
        if boundary.native_style is not None or (boundary.input, boundary.output) != (
            InputHook.COPY_TO_TP,
            OutputHook.NONE,
        ):
            continue
        owner = _COPIES.sub("", name).rpartition(".")[0]
        head_dim = getattr(model.get_submodule(owner), "head_dim", None)
        base = f"{name}.base_layer" if f"{name}.base_layer.weight" in spec.parameters else name
        matrix = as_matrix(model.get_submodule(base), base)
        if matrix is not None and isinstance(head_dim, int) and head_dim and matrix.out_features % head_dim == 0:
            attentions.setdefault(owner, {})[name] = matrix.out_features // head_dim
    shared: list[str] = []
    for owner, projections in attentions.items():
        attention, queries = model.get_submodule(owner), max(projections.values())
        few = {name: heads for name, heads in projections.items() if heads < tp_size and heads < queries}
        groups = {
            attribute: value
            for attribute, value in vars(attention).items()
            if type(value) is int
            and re.search("group|rep", attribute)
            and value in {queries // h for h in few.values()}
        }
        if not few or not groups or len({_COPIES.sub("", name) for name in few}) > 2 or len(set(few.values())) > 1:
            continue  # not recognised as keys and values; validate() then reports the heads that do not divide
        heads = next(iter(few.values()))
        if tp_size % heads or queries % tp_size:
            raise PlanError(
                f"{owner} has {heads} key-value heads (num_key_value_heads={heads}) and {queries} heads for "
                f"tp_size={tp_size} ranks. Choose a tp_size that divides {queries} and is a multiple of {heads}, or "
                "divides both."
            )
        for name in few:
            _share(spec, name, heads)
        shared += few
        # local_head_counts divided by tp_size, but a rank has one key-value head and all its query heads read it.
        counts = spec.head_counts.setdefault(owner, {})
        for attribute in list(counts):
            if counts[attribute] != (value := getattr(attention, attribute)) // tp_size or value % heads:
                continue
            if value in (heads, heads * vars(attention)["head_dim"]):  # counts key-value heads: each rank has one
                counts[attribute] = value // heads
        counts |= dict.fromkeys(groups, queries // tp_size)
    if shared:
        spec.notes.append(
            f"{len(shared)} projections of keys and values, {shared[0]} for example, have fewer heads than "
            f"tp_size={tp_size}; each rank computes with the head that its queries read, and the weights are "
            "replicated on the tp axis."
        )
    return shared


def _share(spec: ShardingSpec, name: str, heads: int) -> None:
    """Replicate the sharded parameters below ``name``, with one head as the slice that each rank computes with."""
    for parameter, place in spec.parameters.items():
        if parameter.startswith(f"{name}.") and place.dim is not None:
            spec.parameters[parameter] = replace(
                place, dim=None, partial_gradient=True, forward_shard_dim=place.dim, forward_shards=heads
            )
