"""Attention of the queries that a rank holds to the keys and values of the full sequence.

Keys and values are gathered over the cp axis before attention, as in Llama 3 (2024, arXiv:2407.21783, section 3.3.2):
with grouped queries they are small beside the rest of a layer, and any attention kernel can be used. Torch's ring
attention (2.13) overrides the operators of CUDA alone and has no rule for the CPU's.

transformers looks attention up by name in a registry (``AttentionInterface``). Ours is registered under a name of its
own, and only the attention modules of a prepared model ask for it. What tells it that it has a sequence shard is
the attention mask: see :func:`mark`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..errors import UnsupportedError
from .buffers import active
from .layout import Layout

#: Name of the attention in transformers' registry.
NAME = "hf_automodel_parallel_context"

_PLACE = "_context_parallel_place"

#: Arguments of an attention function that change which keys a query sees, or by how much.
_OTHER_MASKS = ("sliding_window", "softcap", "position_bias", "s_aux")


@dataclass(frozen=True)
class Place:
    """Where an attention module computes: its sequence shard, and the ranks that hold the others."""

    layout: Layout
    group: dist.ProcessGroup


@functools.cache
def register() -> None:
    """Add our attention to transformers' registry, once; nothing that is registered there changes."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def install(modules: list[nn.Module], place: Place) -> None:
    """Let the attention ``modules`` use our attention.

    Each gets a copy of its config with our name in it; the model's own config still says "sdpa", which is what it does
    outside of a context, and what Trainer asks it for.
    """
    register()
    copies: dict[int, Any] = {}
    for module in modules:
        config = module.config
        if id(config) not in copies:
            copies[id(config)] = compat.config_with_attention(config, NAME)
        module.config = copies[id(config)]
        setattr(module, _PLACE, place)


def mark(length: int, size: int, device: torch.device) -> torch.Tensor:
    """The attention mask that stands for "these queries see all keys before them, of all ranks": (1, 1, length, length
    * size).

    It takes no memory. Every decoder hands its mask down to attention and through its checkpoints, which therefore
    recompute with the same attention wherever backward is called. A mask of four dimensions keeps transformers from
    making one of its own (from the local positions it would infer packed sequences); nobody but our attention can use
    this one: its type is no mask's and its last dimension is not that of the local keys.
    """
    return torch.zeros((), dtype=torch.int8, device=device).expand(1, 1, length, length * size)


def _is_mark(mask: torch.Tensor | None, keys: int, size: int) -> bool:
    return mask is not None and mask.dtype == torch.int8 and mask.ndim == 4 and mask.shape[-1] == keys * size


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: SDPA, over the full sequence if the mask says that this is a shard of one.

    Args:
        module: the attention module.
        query: (B, heads, S / size, D), with the positions of this rank already applied.
        key: (B, key heads, S / size, D).
        value: (B, key heads, S / size, D of values).
        attention_mask: what :func:`mark` made, or an ordinary mask.
        dropout: probability to drop an attention weight.
        scaling: factor of the scores, None for ``1 / sqrt(D)``.

    Returns:
        (B, S / size, heads, D of values), contiguous; and None in place of the weights.

    Raises:
        UnsupportedError: the module asks for something else than causal attention.
    """
    place: Place = getattr(module, _PLACE)
    size = place.layout.size
    if not _is_mark(attention_mask, key.shape[-2], size):
        if active() is not None:
            raise UnsupportedError(
                f"cp_size={size}: the mask that tells {type(module).__name__} which shard of the sequence it has did "
                f"not reach it. Either the model makes a mask of its own, which context parallelism cannot split: use "
                f"cp_size=1 for it. Or it was called inside of maybe_context_parallel past the forward of the prepared "
                f"model: call the model that prepare returned."
            )
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    for name in _OTHER_MASKS:
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"cp_size={size}: {type(module).__name__} asks for attention with {name}; context parallelism computes "
                f"plain causal attention. Use cp_size=1 for this model."
            )
    if kwargs.get("is_causal") is False:
        raise UnsupportedError(f"cp_size={size}: {type(module).__name__} asks for attention that is not causal.")
    # One collective for both; their heads are the same, their features need not be.
    features = key.shape[-1]
    gathered = place.layout.gather(torch.cat([key, value.to(key.dtype)], dim=-1), place.group)
    keys, values = gathered[..., :features], gathered[..., features:].to(value.dtype)
    groups = query.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    chunk = query.shape[-2] // 2
    outputs = []
    for number, queries in zip(place.layout.chunks, query.split(chunk, dim=-2), strict=True):
        seen = (number + 1) * chunk
        outputs.append(_causal(queries, keys[:, :, :seen], values[:, :, :seen], dropout, scaling))
    return torch.cat(outputs, dim=-2).transpose(1, 2).contiguous(), None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    """SDPA of the last queries of a sequence to all of its keys: (B, heads, n, D) to (B, heads, N, D), n <= N."""
    n, total = query.shape[-2], key.shape[-2]
    if torch.is_autocast_enabled(query.device.type):  # the operator that is called below is not on autocast's list
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = compat.flash_attention_of_last_queries(query, key, value, dropout, scaling)
    if output is not None:
        return output
    mask = torch.ones(n, total, dtype=torch.bool, device=query.device).tril(total - n)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
