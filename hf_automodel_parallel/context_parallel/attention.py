"""Attention of a rank's queries to the keys and values of the full sequence.

Keys and values are all-gathered over the cp axis before attention, as in Llama 3 (2024, arXiv:2407.21783, section
3.3.2). With grouped-query attention they are small compared with the rest of a layer, and any attention kernel can be
used. Torch's ring attention (2.13) overrides CUDA's operators and has no rule for those of the CPU.

transformers looks attention functions up by name in a registry (``AttentionInterface``). Ours has a name of its own,
and only the attention modules of a prepared model use it. The attention mask marks the inputs as a sequence shard: see
:func:`mark`.
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

#: Attribute of an attention module: its :class:`Place`.
_PLACE = "_context_parallel_place"

#: Arguments of an attention function that change which keys a query sees, or by how much.
_OTHER_MASKS = ("sliding_window", "softcap", "position_bias", "s_aux")


@dataclass(frozen=True)
class Place:
    """The cp layout and process group of an attention module.

    Attributes:
        layout: the chunks that this rank holds.
        group: the ranks of the cp axis.
    """

    layout: Layout
    group: dist.ProcessGroup


@functools.cache
def register() -> None:
    """Add our attention to transformers' registry, once; existing entries do not change."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def install(modules: list[nn.Module], place: Place) -> None:
    """Let the attention ``modules`` use our attention.

    Each module gets a copy of its config with our name. The model's own config still says "sdpa": that is what it
    computes outside of ``maybe_context_parallel``, and the Trainer checks it.
    """
    register()
    # One copy per config object: modules that had a common config still have one.
    copies: dict[int, Any] = {}
    for module in modules:
        config = module.config
        if id(config) not in copies:
            copies[id(config)] = compat.config_with_attention(config, NAME)
        module.config = copies[id(config)]
        setattr(module, _PLACE, place)


def mark(length: int, size: int, device: torch.device) -> torch.Tensor:
    """The placeholder mask for causal attention over all ranks' keys: int8, (1, 1, length, length * size).

    It is an expanded scalar and takes no memory. Every decoder passes its mask to attention and through gradient
    checkpointing, so a recomputation uses the same attention wherever backward is called. A mask of four dimensions
    keeps transformers from building its own, for which it would infer packed sequences from the local positions. Other
    attention functions fail on this mask: its dtype is not that of a mask, and its last dimension does not match the
    local keys.

    Args:
        length: tokens of this rank's sequence shard, S / size.
        size: number of ranks on the cp axis.
        device: of the mask.
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
    """transformers' attention function: SDPA, over the full sequence if the mask is that of :func:`mark`.

    Args:
        module: the attention module.
        query: (B, heads, S / size, D), with the positions of this rank already applied.
        key: (B, key heads, S / size, D).
        value: (B, key heads, S / size, D of values).
        attention_mask: from :func:`mark`, or an ordinary mask.
        dropout: probability to drop an attention weight.
        scaling: factor of the scores, None for ``1 / sqrt(D)``.

    Returns:
        (B, S / size, heads, D of values), contiguous; and None in place of the attention weights.

    Raises:
        UnsupportedError: the module asks for other than plain causal attention, or the mask did not reach it.
    """
    place: Place = getattr(module, _PLACE)
    size = place.layout.size
    if not _is_mark(attention_mask, key.shape[-2], size):
        # Without the mark, SDPA would attend to the local keys only and return wrong values without an error.
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
    # One all-gather for both: they have the same number of heads, but may differ in D.
    features = key.shape[-1]
    gathered = place.layout.gather(torch.cat([key, value.to(key.dtype)], dim=-1), place.group)
    keys, values = gathered[..., :features], gathered[..., features:].to(value.dtype)
    groups = query.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    chunk = query.shape[-2] // 2
    outputs = []
    # A rank's two chunks are not adjacent, so each of them attends to a prefix of the keys of its own length.
    for number, queries in zip(place.layout.chunks, query.split(chunk, dim=-2), strict=True):
        seen = (number + 1) * chunk
        outputs.append(_causal(queries, keys[:, :, :seen], values[:, :, :seen], dropout, scaling))
    return torch.cat(outputs, dim=-2).transpose(1, 2).contiguous(), None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    """Causal SDPA of the last n queries of a sequence, (B, heads, n, D), to all N >= n keys, (B, heads, N, D)."""
    n, total = query.shape[-2], key.shape[-2]
    if torch.is_autocast_enabled(query.device.type):  # the operator called below is not on autocast's list
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = compat.flash_attention_of_last_queries(query, key, value, dropout, scaling)
    if output is not None:
        return output
    mask = torch.ones(n, total, dtype=torch.bool, device=query.device).tril(total - n)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
