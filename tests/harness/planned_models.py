"""Tiny models of the classes that have an optimised plan, and their batches."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers

from harness import decilm
from harness.models import COMMON, lora, make_batches, randomize
from harness.training import SEQUENCE

REGISTRY_FIRST = ("registry", "hf", "default")

_LLAMA = COMMON | {"intermediate_size": 128, "num_key_value_heads": 2}
_HEADS = _LLAMA | {"head_dim": 16}
_GEMMA3 = _HEADS | {
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_QWEN3_5 = _HEADS | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
# An image of 16 x 16 is 4 x 4 patches, which become 4 tokens.
IMAGE_TOKEN, IMAGE_TOKENS = 120, 4
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 16,
    "patch_size": 4,
}

#: class name -> (class of its config, values of the config)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "Qwen2ForCausalLM": ("Qwen2Config", _LLAMA | {"tie_word_embeddings": True}),
    "Qwen3ForCausalLM": ("Qwen3Config", _HEADS),
    # three labels: a head that tp does not divide
    "Qwen3ForSequenceClassification": ("Qwen3Config", _HEADS | {"pad_token_id": 0, "num_labels": 3}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _GEMMA3 | {"tie_word_embeddings": True}),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {
            "text_config": _GEMMA3,
            "vision_config": _VISION,
            "mm_tokens_per_image": IMAGE_TOKENS,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 121,
            "eoi_token_index": 122,
        },
    ),
    "Ministral3ForCausalLM": ("Ministral3Config", _HEADS),
    "Mistral3ForConditionalGeneration": (
        "Mistral3Config",
        {
            "text_config": _HEADS | {"model_type": "ministral3"},
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": IMAGE_TOKEN,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "tie_word_embeddings": False,
        },
    ),
    "PhiForCausalLM": ("PhiConfig", _LLAMA | {"qk_layernorm": True}),
    "Phi3ForCausalLM": ("Phi3Config", _LLAMA | {"original_max_position_embeddings": 128}),
    "FalconH1ForCausalLM": (
        "FalconH1Config",
        _LLAMA
        | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
        | {"attention_in_multiplier": 0.7, "attention_out_multiplier": 1.3, "ssm_out_multiplier": 0.9},
    ),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", _QWEN3_5),
    "Qwen3_5ForConditionalGeneration": (
        "Qwen3_5Config",
        {
            "text_config": _QWEN3_5,
            "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
            | {"patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2, "out_hidden_size": 64}
            | {"num_position_embeddings": 16},
            "image_token_id": IMAGE_TOKEN,
            "vision_start_token_id": 121,
            "vision_end_token_id": 122,
            "video_token_id": 123,
            "tie_word_embeddings": False,
        },
    ),
    "DeciLMForCausalLM": ("DeciLMConfig", {}),
}


def build_family(name: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A tiny model of the class ``name``, on the device of the context, with random parameters if that is no meta
    device.
    """
    config_name, values = CONFIGS[name]
    source = decilm if name == "DeciLMForCausalLM" else transformers
    config_class, model_class = getattr(source, config_name), getattr(source, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**deepcopy(values | overrides)))
        randomize(model)
    return model


def adapted(name: str) -> torch.nn.Module:
    """LoRA on all linear layers of the text model, and the head for new labels trained as a whole."""
    if name == "Qwen3ForSequenceClassification":
        return lora(build_family(name), task_type="SEQ_CLS")
    # PEFT refuses the mixer's out_proj, whose weight the kernels of Mamba read themselves.
    return lora(build_family(name), exclude_modules=["out_proj"] if name == "FalconH1ForCausalLM" else None)


def family_batches(name: str, parts: int, images: bool, rows: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches of a family: labels per row for a classifier, one image in each row if ``images``."""
    batches = make_batches(parts, rows // parts, SEQUENCE, IMAGE_TOKEN - 1, seed=3)
    generator = torch.Generator().manual_seed(4)
    for batch in batches:
        size = len(batch["input_ids"])
        if name == "Qwen3ForSequenceClassification":
            batch["input_ids"].clamp_(min=1)
            batch["labels"] = torch.randint(3, (size,), generator=generator)
        if not name.endswith("ForConditionalGeneration"):
            continue
        if images:
            batch["input_ids"][:, 2 : 2 + IMAGE_TOKENS] = IMAGE_TOKEN
            batch["labels"][:, 2 : 2 + IMAGE_TOKENS] = -100
            pixels = torch.randn(size, 3, 16, 16, generator=generator)
            if name.startswith("Qwen3_5"):
                batch["pixel_values"] = pixels.reshape(size * 16, 3 * 16)
                batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * size)
            else:
                batch["pixel_values"] = pixels
            if name.startswith("Mistral3"):
                batch["image_sizes"] = torch.tensor([[16, 16]] * size)
        types = (batch["input_ids"] == IMAGE_TOKEN).long()
        if name.startswith("Gemma3"):
            batch["token_type_ids"] = types
        elif name.startswith("Qwen3_5") and images:
            batch["mm_token_type_ids"] = types.int()
    return batches
