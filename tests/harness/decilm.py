"""A stand-in for DeciLM (Llama-3.3-Nemotron-Super), whose code is not in transformers: its names, its heterogeneous
blocks.

Like the original it is written in the style of transformers 4.4x: attention reshapes to head counts that it keeps
itself.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

BLOCKS = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
    {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
    {"attention": {"n_heads_in_group": 1}, "ffn": {"no_op": True}},
]


class DeciLMConfig(PreTrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **values: Any) -> None:
        self.block_configs = block_configs or BLOCKS
        self.vocab_size, self.hidden_size, self.num_attention_heads = 128, 64, 4
        self.num_key_value_heads = None
        self.num_hidden_layers = len(self.block_configs)
        self.max_position_embeddings, self.rms_norm_eps, self.hidden_act, self.mlp_bias = 128, 1e-6, "silu", False
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__init__(**({"architectures": ["DeciLMForCausalLM"], "tie_word_embeddings": False} | values))


class DeciLMAttention(nn.Module):
    def __init__(self, config: DeciLMConfig, n_heads_in_group: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.num_key_value_groups = n_heads_in_group
        self.num_key_value_heads = self.num_heads // n_heads_in_group
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rows, length, _ = hidden.shape
        query = self.q_proj(hidden).view(rows, length, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden).view(rows, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden).view(rows, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *positions)
        key, value = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (key, value))
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(output.transpose(1, 2).reshape(rows, length, self.num_heads * self.head_dim))


class DeciLMLinearAttention(nn.Module):
    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, positions: Any) -> torch.Tensor:
        return self.linear_attn(hidden)


class DeciLMLinearMLP(nn.Module):
    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear_mlp(hidden)


class DeciLMDecoderLayer(nn.Module):
    def __init__(self, config: DeciLMConfig, layer: int) -> None:
        super().__init__()
        attention, ffn = (SimpleNamespace(**config.block_configs[layer][part]) for part in ("attention", "ffn"))
        self.has_attention = not getattr(attention, "no_op", False)
        self.has_ffn = not getattr(ffn, "no_op", False)
        if self.has_attention:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size)
            linear = getattr(attention, "replace_with_linear", False)
            self.self_attn = (
                DeciLMLinearAttention(config) if linear else DeciLMAttention(config, attention.n_heads_in_group)
            )
        if self.has_ffn:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size)
            if getattr(ffn, "replace_with_linear", False):
                self.mlp: nn.Module = DeciLMLinearMLP(config)
            else:
                size = int(ffn.ffn_mult * config.hidden_size)
                shape = {"hidden_size": config.hidden_size, "intermediate_size": size, "mlp_bias": config.mlp_bias}
                self.mlp = LlamaMLP(SimpleNamespace(**shape, hidden_act=config.hidden_act))

    def forward(self, hidden: torch.Tensor, positions: Any) -> torch.Tensor:
        if self.has_attention:
            hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions)
        if self.has_ffn:
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden


class DeciLMPreTrainedModel(PreTrainedModel):
    config_class = DeciLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["DeciLMDecoderLayer"]
    _supports_sdpa = True


class DeciLMModel(DeciLMPreTrainedModel):
    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DeciLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden, positions)
        return self.norm(hidden)


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: Any) -> CausalLMOutput:
        logits = self.lm_head(self.model(input_ids))
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
