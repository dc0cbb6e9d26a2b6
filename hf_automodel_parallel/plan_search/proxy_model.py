"""A tiny proxy model: the model's class, its config with the same switches and with few layers of small sizes.

Only the name of a config field shows which size it is (:data:`SIZES`). If the small sizes contradict each other, the
class cannot be built, and there is no proxy model. Heads, width of a head, batch and length have different sizes, so
that a size identifies its dimension.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from typing import Any

import torch
from torch import nn

from ..core.model_view import ModelView, layer_pattern, without_wrappers
from ..errors import PlanError, first_line

HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, POSITIONS = 4, 8, 48, 96, 64
HIDDEN = HEADS * HEAD_DIM
PIXELS = 64
LAYERS = 2
BATCH, LENGTH, LONGER = 3, 7, 40

_MIXER_HEAD_DIM = r"mamba_(d_head|head_?dim)"

#: Pattern of the full name of an integer field of a config -> its small value; the first match wins.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(type|task_type)_vocab_size", 2),
    (r".*vocab_size.*", VOCABULARY),
    (r"num_experts_per_tok(en)?|moe_(topk|k|top_k)|router_topk|top_k_experts", 2),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts|n_experts", 4),
    (r"num_hidden_layers|n_layers?|num_layers|num_(decoder|encoder)_layers|(decoder|encoder)_layers", LAYERS),
    (r"num_(decoder_|encoder_)?attention_heads|n_heads?|(decoder_|encoder_)?attention_heads|num_heads", HEADS),
    (r"rotary_dim|qk_rope_head_dim|qk_nope_head_dim", HEAD_DIM // 2),
    (r"head_dim|d_kv|d_head|v_head_dim|dim_head|attention_head_size|kv_channels|qk_head_dim", HEAD_DIM),
    (
        r".*intermediate_size|(decoder_|encoder_)?ffn_dim|ffn_hidden_size|n_inner|d_inner|d_ff|dff|feed_forward_size",
        INTERMEDIATE,
    ),
    (
        r"hidden_size|d_model|n_embd|.*embedding_(size|dim)|embedding_dim|word_embed_proj_dim|emb_dim|dim|lru_width",
        HIDDEN,
    ),
    (r"coordinate_size", HIDDEN // 8),  # of four coordinates and two extents of a box
    (r"shape_size", HIDDEN // 4),
    (_MIXER_HEAD_DIM, HEAD_DIM),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 8),
    (r"mamba_n_?groups|n_groups", 1),
    (r"(mamba_)?dt_rank|time_step_rank", 4),
    (r"(mamba_)?chunk_size|block_size", 4),
    (r"(original_)?max_position_embeddings|max_(source_|target_)?positions|n_positions|n_ctx|max_seq_len", POSITIONS),
    (r".*window(_size)?|attention_window|local_attention", 4),
)
#: Highest power of two that divides a number of features -> its small value, which has the same: code that goes by
#: blocks of features meets a divided block there, too. 16 and more: :data:`INTERMEDIATE`.
_FEATURES = {2: 50, 4: 44, 8: 56}
_KEY_VALUE = re.compile(r"num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|multi_query_group_num|num_query_groups")
_MIXER_HEADS = re.compile(r"mamba_(n_heads|num_heads)|n_mamba_heads")
_INDICES = re.compile(r".*(indices|idxs?|layer_ids|_layers)")
#: Widths of convolutions in front of the layers, one for each.
_CONVOLUTIONS = r"conv_dim|tdnn_dim"
_RANDOM = re.compile(r".*(dropout|pdrop|drop_rate|drop_prob|jitter|layerdrop).*")
_HEADS = re.compile(SIZES[5][0])


def proxy_config(config: Any, each: int = 1, first: int = 0) -> Any:
    """A copy of ``config``, a transformers config, with small sizes and ``each`` layers of every kind, and its first
    ``first`` ones.
    """
    small = copy.deepcopy(config)
    fields = small.to_dict()
    heads = next((v for k, v in fields.items() if _HEADS.fullmatch(k) and isinstance(v, int)), 0)
    layers = next((v for k, v in fields.items() if re.fullmatch(SIZES[4][0], k) and isinstance(v, int)), 0)
    kept = _kept_layers(fields, layers, each, first)
    for name, value in fields.items():
        if _are_indices(name, value, layers):
            _set(small, name, [kept.index(i) for i in value if i in kept])
        elif _are_widths(name, value):  # of each layer its own (Gemma3n)
            of_kept = [value[i] for i in kept] if len(value) == layers else value
            _set(small, name, [_small(name, width, heads, len(kept), fields) for width in of_kept])
        elif isinstance(value, list) and layers > 2 and len(value) == layers:
            _set(small, name, [value[i] for i in kept])
        elif isinstance(value, dict) and hasattr(getattr(small, name, None), "to_dict"):
            _set(small, name, proxy_config(getattr(small, name), each, first))
        elif isinstance(value, (list, tuple)) and re.fullmatch(_CONVOLUTIONS, name):
            _set(small, name, type(value)(HIDDEN for _ in value))
        elif isinstance(value, float) and _RANDOM.fullmatch(name):
            _set(small, name, 0.0)
        elif isinstance(value, int) and not isinstance(value, bool) and name.endswith("token_id") and value >= 3:
            _set(small, name, 3)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            _set(small, name, _small(name, value, heads, len(kept), fields))
    return small


def _small(name: str, value: int, heads: int, layers: int, fields: dict[str, Any]) -> int:
    if _KEY_VALUE.fullmatch(name):
        return HEADS if value == heads else min(value, 2)
    if (related := _related(name, value, fields)) is not None:
        return related
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            if size == INTERMEDIATE:
                return _FEATURES.get(value & -value, size)
            return layers if size == LAYERS and "layers" in pattern else size
    # Further widths of the same kind (of a pooler, of a projection) follow the one that they are equal to.
    for other, size in (("hidden_size", HIDDEN), ("intermediate_size", INTERMEDIATE)):
        if value == fields.get(other) and re.fullmatch(r".*(size|dim|width)", name):
            return size
    return value


def _related(name: str, value: int, fields: dict[str, Any]) -> int | None:
    """The size of a field that follows from other sizes; ``fields`` are those of the original."""
    hidden = fields.get("hidden_size")
    if name == "head_dim" and value == fields.get("qk_rope_head_dim"):  # latent attention: the rotary features
        return HEAD_DIM // 2
    if name in ("image_size", "img_size"):
        return _image_size(value, fields.get("patch_size"))
    expansion = next((fields[k] for k in ("mamba_expand", "expand") if isinstance(fields.get(k), int)), 1)
    # Attention over more than the hidden states: Zamba concatenates the embeddings to them.
    if name == "attention_hidden_size":
        return HIDDEN * _times(value, hidden)
    if name == "attention_head_dim":
        return HEAD_DIM * _times(fields.get("attention_hidden_size"), hidden)
    # State-space mixers: their heads together have the width of the expanded hidden states.
    if name == "mamba_d_ssm":
        return HIDDEN * expansion
    alone = name == "num_heads" and "expand" in fields and "num_attention_heads" not in fields
    if alone or (_MIXER_HEADS.fullmatch(name) and any(re.fullmatch(_MIXER_HEAD_DIM, k) for k in fields)):
        return HEADS * expansion
    return None


def _image_size(value: int, patch: Any) -> int:
    """A small size of images that holds whole patches, and is enough for five times half the size."""
    if type(patch) is not int or patch <= 0:
        return min(value, PIXELS)
    return min(value, patch * max(6, -(-PIXELS // patch))) if value % patch == 0 else value


def _times(value: Any, of: Any) -> int:
    """``value // of``; 1 if ``of`` does not divide ``value``, or if one of them is not an integer."""
    return value // of if isinstance(value, int) and isinstance(of, int) and of and not value % of else 1


def _are_indices(name: str, value: Any, layers: int) -> bool:
    """True for a list of layer indices."""
    if not (isinstance(value, list) and value and _INDICES.fullmatch(name)):
        return False
    return all(type(i) is int and 0 <= i < layers for i in value) and len(set(value)) == len(value)


def _are_widths(name: str, value: Any) -> bool:
    """True for a list with the width of the MLP in each layer."""
    widths = isinstance(value, list) and value and all(type(width) is int and width > 0 for width in value)
    return bool(widths) and any(size == INTERMEDIATE and re.fullmatch(pattern, name) for pattern, size in SIZES)


def _is_period(name: str, value: Any, layers: int) -> bool:
    """True for a short list of layer kinds that the model repeats over all layers (RecurrentGemma)."""
    kinds = isinstance(value, list) and 1 < len(value) < layers and all(isinstance(kind, str) for kind in value)
    return kinds and re.fullmatch(r".*(types|pattern)", name) is not None


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError, ValueError, TypeError):
        return  # a read-only property, computed from other fields


def layers_of_proxy(config: Any, first: int = 0) -> list[int]:
    """Indices of the layers that :func:`proxy_config` keeps of a config, or of the text config in it."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    fields = config.to_dict()
    layers = next((v for k, v in fields.items() if re.fullmatch(SIZES[4][0], k) and isinstance(v, int)), 0)
    return _kept_layers(fields, layers, 1, first)


def _kept_layers(fields: dict[str, Any], layers: int, each: int, first: int = 0) -> list[int]:
    """Indices of layers that cover every kind of layer, and the first ``first``, at least :data:`LAYERS` of them."""
    full = {k: v for k, v in fields.items() if isinstance(v, list) and layers > 2}
    indices = [v for k, v in full.items() if _are_indices(k, v, layers)]
    lists = [v for k, v in full.items() if len(v) == layers and not _are_indices(k, v, layers)]
    kinds = [repr([*(v[i] for v in lists), *(i in v for v in indices)]) for i in range(layers)]
    kept = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < each] if lists or indices else []
    rest = [i for i in range(layers) if i not in kept]
    wanted = max([LAYERS, min(first, layers), *(len(v) for k, v in fields.items() if _is_period(k, v, layers))])
    return sorted(kept + rest[: max(0, wanted - len(kept))]) or list(range(LAYERS))


def fingerprint(model: nn.Module) -> str:
    """The config of ``model`` as text; "" without one. Equal classes and fingerprints give equal proxy models."""
    config: Any = getattr(model, "config", None)
    return json.dumps(config.to_dict(), sort_keys=True, default=str) if hasattr(config, "to_dict") else ""


def build_proxy_model(model: nn.Module, first: int = 0) -> nn.Module:
    """A tiny proxy model of ``model`` (unwrapped, on any device), in float32 on the CPU and in evaluation mode.

    Parameters are random and not zero, so that each has an effect on the output. The global random state is not
    changed; equal classes and configs give equal proxy models on all ranks.

    Args:
        model: the model.
        first: keep its first layers up to this number too; else only some of each kind that the config shows.

    Raises:
        PlanError: the model has no config, or its class cannot be built with the small config.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise PlanError(f"{type(model).__name__} has no config to make a tiny proxy model of.")
    # Two layers of each kind, for models in which layers of one kind have modules in common (Zamba); all layers, for
    # models whose last layers take keys and values of earlier ones (Gemma3n).
    problem: Exception | None = None
    for kept in ({"first": first}, {"each": 2}, {"first": sys.maxsize}):
        try:
            return _build(type(model), proxy_config(config, **kept)).eval()
        except Exception as error:  # code of the model, which may raise any error
            problem = problem or error
    raise PlanError(
        f"no tiny proxy model of {type(model).__name__} can be built from its config: {type(problem).__name__}: "
        f"{first_line(problem)}."  # type: ignore[arg-type]
    ) from problem


def _build(cls: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        small = cls(config).float()
        with torch.no_grad():
            for parameter in small.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                else:
                    parameter.normal_(std=HIDDEN**-0.5)
    return small


def replaced_modules(model: nn.Module | ModelView) -> list[str]:
    """Names of modules of ``model`` that were replaced by another class after the model was built.

    A module in PEFT's wrapper counts as the module inside. Empty if no proxy model can be built.
    """
    inner = ModelView.of(model).inner
    try:
        small = build_proxy_model(inner)
    except PlanError:
        return []
    built: dict[str, set[type]] = {}
    for name, module in small.named_modules():
        built.setdefault(layer_pattern(name), set()).add(type(module))
    found: dict[str, tuple[str, type]] = {}
    for name, module in inner.named_modules():
        if not type(module).__module__.startswith("peft."):
            found[without_wrappers(name)] = name, type(module)
    return [name for key, (name, kind) in found.items() if kind not in built.get(layer_pattern(key), {kind})]
