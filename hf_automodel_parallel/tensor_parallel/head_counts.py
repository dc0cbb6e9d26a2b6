"""Head counts that attention modules keep as attributes: set to those of one rank when the heads are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel

from ..core.model_structure import layer_groups
from ..core.model_view import ModelView
from ..core.sharding_spec import PlanEntry
from ..errors import PlanError
from ..plan.validate import config_with_heads

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_query_groups")

#: Attribute of an attention: the number of ranks that its counts have been divided by.
_MARK = "_heads_per_rank_of"


def attention_is_head_sharded(model_parallel_plan: Mapping[str, Any]) -> bool:
    """True if a plan shards a query, key or value projection column-wise and leaves its output sharded.

    Args:
        model_parallel_plan: path -> style name, torch style or :class:`PlanEntry`. A projection is recognised by its
            path: below a module, or a list, with "attn" or "attention" in its name.
    """
    for path, style in model_parallel_plan.items():
        if not any(map(_sounds_like_attention, path.split(".")[-3:-1])):
            continue
        style = style.style if isinstance(style, PlanEntry) else style
        name = getattr(style, "style_name", style)
        if isinstance(style, ColwiseParallel):
            layouts = style.output_layouts
            layouts = layouts if isinstance(layouts, (tuple, list)) else (layouts,)
            if any(layout is None or isinstance(layout, Shard) for layout in layouts):
                return True
        elif name in ("colwise", "packed_colwise"):
            return True
    return False


def update_attention_head_counts_for_tp(model: nn.Module, tp_size: int) -> None:
    """Divide the head counts of the attentions in the layers of ``model`` by ``tp_size``; not those of the config.

    For plans that shard every attention by heads. Key/value heads are those of the attention itself, so that layers may
    differ (Nemotron-NAS); if the config has ``num_key_value_heads=None``, they follow from ``num_key_value_groups``
    (query heads for each key/value head, the same on one rank). A second call changes nothing.

    Args:
        model: any model, or a stand-in for one; attentions are the modules below the layers of its language model that
            have a head count as attribute.
        tp_size: number of ranks that the heads are sharded over.

    Raises:
        PlanError: a count does not divide.
    """
    if tp_size <= 1:
        return
    inner = ModelView.of(model).inner
    config = config_with_heads(inner)
    modules = inner.modules() if isinstance(inner, nn.Module) and config is not None else ()
    parts = [m for m in modules if type(getattr(m, "config", None)) is type(config)]
    unset = config is not None and "num_key_value_heads" in vars(config) and config.num_key_value_heads is None
    for layer in layer_groups(parts[0] if parts else inner).get("language", []):
        for name, module in layer.named_modules():
            # Not the mixer of a state-space layer, whose heads are of another kind and not sharded.
            if _sounds_like_attention(name.rpartition(".")[2]) or _sounds_like_attention(type(module).__name__):
                _count_locally(name, module, tp_size, key_value_by_groups=unset)


def set_local_counts(attention: nn.Module, counts: Mapping[str, int], tp_size: int) -> None:
    """Set ``counts``, resolved from the plan for one of ``tp_size`` ranks, as attributes of ``attention``."""
    for attribute, count in counts.items():
        setattr(attention, attribute, count)
    setattr(attention, _MARK, tp_size)


def _sounds_like_attention(name: str) -> bool:
    return "attn" in name.lower() or "attention" in name.lower()


def _count_locally(name: str, attention: nn.Module, tp_size: int, key_value_by_groups: bool) -> None:
    heads, key_value = _own_counts(attention, _HEADS), _own_counts(attention, _KEY_VALUE_HEADS)
    if not heads or getattr(attention, _MARK, 1) == tp_size:
        return
    if key_value_by_groups:
        (group,) = _own_counts(attention, ("num_key_value_groups",)).values() or (1,)
        key_value = dict.fromkeys(key_value, next(iter(heads.values())) // group)
    for field, value in (heads | key_value).items():
        if value % tp_size:
            raise PlanError(
                f"{name}.{field}={value} does not divide by tp_size={tp_size}, and every rank needs a whole number of "
                f"heads. Choose a tp_size that divides it, or leave this attention out of the plan."
            )
    head_dim = next(iter(_own_counts(attention, ("head_dim", "attention_head_size")).values()), None)
    width = _own_counts(attention, ("all_head_size",))  # of all heads together, into which BERT's kin reshape
    together = {
        field: value for field, value in width.items() if head_dim and value == head_dim * next(iter(heads.values()))
    }
    for field, value in (heads | key_value | together).items():
        setattr(attention, field, value // tp_size)
    setattr(attention, _MARK, tp_size)


def _own_counts(module: nn.Module, names: tuple[str, ...]) -> dict[str, int]:
    values = {name: module.__dict__.get(name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, int) and not isinstance(value, bool)}
