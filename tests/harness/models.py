"""Tiny causal language models, adapters and batches, all determined by seeds."""

from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LORA_7 = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

MATRIX_STD = 0.1
"""About 1 / sqrt(hidden size), so that every block changes its input by as much as that is large."""

VECTOR_STD = 0.1

IGNORED_LABEL = -100

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    # The defaults of some families lie outside this vocabulary, and the row of a padding token would get no gradient.
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DENSE = COMMON | {"intermediate_size": 128, "num_key_value_heads": 2}
_MIXTRAL = _DENSE | {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN3_MOE = _DENSE | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
_GEMMA3 = _DENSE | {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_AUXILIARY_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.1}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _DENSE),
    "llama_tied": ("llama", _DENSE | {"tie_word_embeddings": True}),
    "llama_odd_vocab": ("llama", _DENSE | {"vocab_size": 131}),
    "llama_mqa": ("llama", _DENSE | {"num_key_value_heads": 1}),
    "llama_odd_heads": ("llama", _DENSE | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "mistral": ("mistral", _DENSE | {"sliding_window": None, "head_dim": 16}),
    "qwen3": ("qwen3", _DENSE | {"head_dim": 16}),
    "gemma3": ("gemma3_text", _GEMMA3),
    # logits are soft-capped, at a cap that they feel
    "gemma3_softcap": ("gemma3_text", _GEMMA3 | {"final_logit_softcapping": 2.0}),
    # its last two layers read keys and values that layers 2 and 3 write
    "gemma3n": (
        "gemma3n_text",
        _DENSE
        | {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "sliding_window": 4,
            "head_dim": 16,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 6,
            "pad_token_id": 0,
        },
    ),
    "phi3": ("phi3", _DENSE | {"original_max_position_embeddings": 128}),
    "olmo2": ("olmo2", _DENSE),
    "cohere": ("cohere", _DENSE),
    "gpt2": ("gpt2", COMMON | {"n_inner": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    # its attention counts heads itself
    "gptj": (
        "gptj",
        COMMON | {"n_inner": 128, "rotary_dim": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "mixtral": ("mixtral", _MIXTRAL),
    "mixtral_aux": ("mixtral", _MIXTRAL | _AUXILIARY_LOSS),
    "qwen3_moe": ("qwen3_moe", _QWEN3_MOE),
    "qwen3_moe_aux": ("qwen3_moe", _QWEN3_MOE | _AUXILIARY_LOSS),
}
"""Name -> (model type of transformers, values of its configuration)."""


def build_model(name: str, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A model of `MODELS` in float32 on the CPU, with SDPA attention where its class supports that.

    Every parameter is random and has no zeros, biases and norm weights too: a parameter at its usual initial value
    (a bias of zero, a scale of one) would hide a shard that is lost or applied twice. Seeds and overrides that are
    equal give equal models; the global random state is left alone.
    """
    model_type, values = MODELS[name]
    config = AutoConfig.for_model(model_type, **deepcopy(values | config_overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # On top of what the constructor chose: 0 for biases and for norms that scale by 1 + weight, else 1.
            parameter.add_(torch.randn_like(parameter), alpha=VECTOR_STD)
        else:
            parameter.normal_(std=MATRIX_STD)


def lora(model: PreTrainedModel, seed: int = 1, **overrides: Any) -> PeftModel:
    """`model` with adapters on all its linear layers, random on both sides so that they contribute from the start."""
    values: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "init_lora_weights": False}
    values |= {"r": 4, "lora_alpha": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(**(values | overrides)))


def make_batches(
    n_batches: int, batch_size: int, seq_len: int, vocab: int, seed: int, ragged: bool | str = False
) -> list[dict[str, torch.Tensor]]:
    """Random `input_ids` with `labels`.

    `ragged=True` takes the labels off a prefix of each row, as of a prompt; `ragged="padded"` pads each row at its end
    and adds the `attention_mask`. Either way the lengths within a batch differ while there are enough of them, so
    that averaging over rows or ranks is not the same as averaging over tokens.
    """
    if ragged not in (False, True, "padded"):
        raise ValueError(f"ragged must be False, True or 'padded', not {ragged!r}")
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n_batches):
        input_ids = torch.randint(vocab, (batch_size, seq_len), generator=generator)
        batch = {"input_ids": input_ids, "labels": input_ids.clone()}
        if ragged:
            # At least two tokens stay, the fewest that make a loss: the first label is shifted out.
            lengths = torch.randperm(seq_len - 2, generator=generator)
            ignored = lengths[torch.arange(batch_size) % len(lengths)].unsqueeze(1)
            position = torch.arange(seq_len)
            if ragged == "padded":
                padding = position >= seq_len - ignored
                batch["input_ids"] = input_ids.masked_fill(padding, 0)
                batch["attention_mask"] = (~padding).long()
                batch["labels"].masked_fill_(padding, IGNORED_LABEL)
            else:
                batch["labels"].masked_fill_(position < ignored, IGNORED_LABEL)
        batches.append(batch)
    return batches
