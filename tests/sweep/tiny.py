"""A tiny, consistent configuration and a random model for every causal-LM type of the installed transformers.

The configuration is the type's own default with its sizes shrunk: a table of patterns says what a field of that name
counts (:data:`SIZES`). Lists with one entry per layer are cut to as few layers as show every kind of layer. What a type
demands beyond that is in a short table of exceptions (:data:`EXCEPTIONS`), each with its reason.
"""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import torch
from harness.models import COMMON, randomize
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 128, 64, 128, 4, 2, 16
LAYERS = 2

#: First pattern that matches the whole name of a positive integer field -> its value. A function gets the default
#: value.
SIZES: list[tuple[str, Any]] = [
    (r"(pad|unk)_token_id|pad_id", 0),
    (r"bos_token_id|decoder_start_token_id|boi_token_id|cls_token_id", 1),
    (r"(eos|sep|eoi|eod)_token_id", 2),
    (r".*(token_id|token_index)", 3),
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r"unpadded_vocab_size|.*vocab_size|vocab_size_per_layer_input", VOCABULARY),
    # experts before widths: "num_experts_per_tok" is no count of experts
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|router_topk|top_k_experts", 2),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts|n_experts", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", lambda n: min(n, 1)),
    (r"n_group|num_expert_group", lambda n: min(n, 2)),
    (r"topk_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers", lambda n: min(n, 1)),
    (r"decoder_sparse_step|moe_layer_interval|interleave_moe_layer_step", 1),
    (r"(attn|expert)_layer_(offset)", 1),
    (r"(attn|expert)_layer_period|_?sliding_window_pattern|global_attn_every_n_layers|layer_group_size", 2),
    (r"no_rope_layer_interval", 2),
    # layers
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers", 0),
    (
        r"num_hidden_layers|n_layers?|num_(decoder_|encoder_)?layers|(decoder|encoder)_layers|num_layers_per_stack",
        LAYERS,
    ),
    # heads
    (r"(swa_|global_)?num_key_value_heads|num_(global_)?key_value_heads|num_kv_heads|num_query_groups", KV_HEADS),
    (r"(swa_)?num_(decoder_|encoder_)?attention_heads|n_heads?|(decoder_|encoder_)?attention_heads|num_heads", HEADS),
    (r"index_n_heads|linear_num_(key_|value_)?heads", HEADS),
    # widths of one head
    (r"qk_rope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"qk_nope_head_dim", HEAD_DIM // 2),
    (r"kv_channels|(global_|swa_)?head_dim|dim_head|d_head|v_head_dim|qk_head_dim|index_head_dim", HEAD_DIM),
    (r"linear_((key|value)_)?head_dim|attention_head_size|query_pre_attn_scalar", HEAD_DIM),
    (r".*lora_rank|laurel_rank|gated_norm_rank|adapter_rank|hc_lowrank|loop_gate_rank|.*_lowrank", HEAD_DIM),
    # widths
    (
        r"(shared_|moe_|dense_)*.*intermediate_size(_mlp)?|.*ffn_dim|(expert_)?ffn_hidden_size|n_inner|dim_ff|dff",
        INTERMEDIATE,
    ),
    (r"hidden_size_per_layer_input|router_hidden_size|ple_embed_dim", HEAD_DIM),
    (r"feed_forward_size", INTERMEDIATE),
    (
        r"hidden_size|d_model|n_embd|.*embedding_(size|dim)|word_embed_proj_dim|emb_dim|lru_width|backbone_hidden_size",
        HIDDEN,
    ),
    (r"attention_hidden_size", 2 * HIDDEN),
    (r"attention_head_dim", 2 * HIDDEN // HEADS),
    # states
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 16),
    (r"mamba_(n_heads|num_heads)|n_mamba_heads", 8),
    (r"mamba_(d_head|head_?dim)", 16),
    (r"mamba_n_?groups|n_groups", 2),
    (r"mamba_d_ssm", 128),
    (r"(mamba_)?dt_rank|time_step_rank", 8),
    (r"conv_kernel|conv_kernel_size|linear_conv_kernel_dim|short_conv_kernel_size|conv_L_cache|mamba_d_conv", 4),
    (r"(mamba_)?chunk_size", 8),
    (r"sliding_window(_size)?|window_size|attention_window_size|attention_chunk_size|local_attention", 4),
    (r"block_size", 8),
    (r"index_topk|rel_extent", 8),
    (r"(original_)?max_position_embeddings|n_positions|n_ctx|max_(source_|target_)?(positions|seq_len)", 128),
    (r"context_length|model_max_length|max_seq_len", 128),
]

#: Model type -> fields that the patterns cannot know.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # its default lists types of rotary embeddings that it gives no parameters
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        "layer_types": ["full_attention", "full_attention"],
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},  # rows for each of six hashes
    "blt_local_encoder": {"hidden_size_global": HIDDEN},
    "blt_local_decoder": {"hidden_size_global": HIDDEN},
    # its attention reads a base of the rotary embedding from a part of the configuration whose class does not have it
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0}}
    | {"ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": INTERMEDIATE, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "mamba2": {"num_heads": 8},  # elsewhere a field of that name counts attention heads
    "laguna": {"num_attention_heads_per_layer": [HEADS, HEADS], "layer_types": ["full_attention", "sliding_attention"]},
    "dots1": {"n_shared_experts": 1},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2}
    | {"layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "moe_intermediate_size": 32},
    # rows of positions times columns is the length of the batches; its other attention draws random hashes
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [HIDDEN // 2, HIDDEN // 2], "axial_pos_shape": [4, 4]}
    | {"attn_layers": ["local", "local"], "local_attn_chunk_length": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    # unset by default, although its full attention does not work without
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM, "indexer_budget": 8}
    | {"indexer_compress_ratio": 4, "ple_layer_ids": [1], "ngram_vocab_size_base": 64, "split_ngram_parts": 1}
    | {"heads_per_ngram": 2, "eos_token_id": 2},
}

#: Further cases: fields that change which parameters lie between sharded projections.
VARIANTS = (
    "glm4_moe:use_qk_norm=True",
    "phi:qk_layernorm=True",
    "stablelm:qk_layernorm=True",
    "mixtral:output_router_logits=True",
    "qwen3_moe:output_router_logits=True",
    "llama:attention_bias=True,mlp_bias=True",
)

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def causal_lm_types() -> list[str]:
    """Every type that ``AutoModelForCausalLM`` knows, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The tiny configuration of ``model_type``; ``overrides`` are fields of the (text) configuration."""
    return _shrink(CONFIG_MAPPING[model_type], model_type, overrides)


def _shrink(config_class: type, model_type: str, overrides: dict[str, Any]) -> Any:
    exceptions = EXCEPTIONS.get(model_type, {}) | overrides
    try:
        default = config_class()
    except Exception:  # its default contradicts itself; what the exceptions say may mend that
        default = config_class(**exceptions)
    fields = {k: v for k, v in default.to_dict().items() if not k.startswith("_")}
    values = {name: small for name, value in fields.items() if (small := _small(name, value, fields)) is not _KEEP}
    layers = next((fields[name] for name in _LAYER_COUNTS if isinstance(fields.get(name), int)), None)
    if layers is not None:
        values |= _fewer_layers(fields, values, layers)
    for name in getattr(config_class, "sub_configs", None) or ():
        part_class = type(getattr(default, name, None))
        if hasattr(part_class, "model_type"):
            values[name] = _shrink(part_class, part_class.model_type, {})
    values |= {k: v for k, v in (("tie_word_embeddings", False), ("use_cache", False)) if k in fields}
    values |= {name: 0.0 for name in fields if _is_dropout(name, fields[name])}
    return config_class(**deepcopy(values | exceptions))


_KEEP = object()

#: Fields that are a number although their default is None, where the type is given no number.
_UNSET = {"num_experts_per_tok": 2, "n_routed_experts": 4, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM}


def _small(name: str, value: Any, fields: dict[str, Any]) -> Any:
    if value is None:
        return _UNSET.get(name, _KEEP)
    if isinstance(value, bool) or not isinstance(value, int) or (value <= 0 and "token" not in name):
        return _KEEP
    if name.endswith("num_key_value_heads") and value == fields.get(name.replace("key_value", "attention")):
        return HEADS
    if name == "head_dim" and value == fields.get("qk_rope_head_dim"):
        return HEAD_DIM // 2
    for pattern, small in SIZES:
        if re.fullmatch(pattern, name):
            return small(value) if callable(small) else small
    return _KEEP


def _is_dropout(name: str, value: Any) -> bool:
    wanted = re.fullmatch(r".*(dropout|pdrop|drop_rate|drop_prob|jitter_noise|layerdrop|drop).*", name)
    return wanted is not None and isinstance(value, float)


def _fewer_layers(fields: dict[str, Any], values: dict[str, Any], layers: int) -> dict[str, Any]:
    """Lists with an entry per layer, cut to layers that together show each of their entries."""
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == layers and layers > 2}
    kinds = list(zip(*(v for v in lists.values() if all(isinstance(x, str | bool) for x in v)), strict=True)) or None
    if not lists:
        return {}
    if kinds is None:
        kept = list(range(LAYERS))
    else:
        kept = sorted({kinds.index(kind) for kind in kinds})
        rest = [i for i in range(layers) if i not in kept]
        kept = sorted(kept + rest[: max(0, LAYERS - len(kept))])
    cut: dict[str, Any] = {k: [v[i] for i in kept] for k, v in lists.items()}
    cut |= {name: len(kept) for name in _LAYER_COUNTS if name in values}
    return cut


def build(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of ``model_type`` in float32 on the CPU, with random parameters without zeros; equal for equal
    arguments.
    """
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        randomize(model)
        _randomize_buffers(model)
    return model.train()


@torch.no_grad()
def _randomize_buffers(model: PreTrainedModel) -> None:
    """Zeros in saved buffers (the correction of a router's scores) would hide a mistake like those of parameters."""
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        saved = name.rpartition(".")[2] not in owner._non_persistent_buffers_set
        if saved and buffer.is_floating_point() and buffer.numel() and not buffer.any():
            buffer.normal_(std=0.02)


def vocabulary(model: PreTrainedModel) -> int:
    """Number of token ids that a batch may hold."""
    embedding = model.get_input_embeddings()
    rows = COMMON["vocab_size"] if embedding is None else int(embedding.weight.shape[0])
    known = getattr(
        model.config.get_text_config(), "vocab_size", None
    )  # the table may have rows that are no tokens (prompts)
    return min(rows, known) if isinstance(known, int) else rows
