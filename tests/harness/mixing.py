"""A decoder of our own with Llama-like names, which combines heads or features without any parameter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .models import COMMON

#: On scores (batch, heads, queries, keys), behind the softmax of the keys, on heads (batch, heads, tokens, width).
HEADS = [
    "alibi",
    "talking heads",
    "softmax over heads",
    "decay by head index",
    "norm over all heads",
    "rolled heads",
    "in training only",
    "in one layer only",
    "in long sequences only",
    "in a nested output",
    "with labels only",
    "by the last forward",
]
#: On the features between the two projections of the MLP.
FEATURES = ["fake quantisation", "top-k", "rolled features", "swapped chunks", "blocks"]


class Config(LlamaConfig):
    model_type = "own_mixing"

    def __init__(self, mixing: str = "", **kwargs: Any) -> None:
        self.mixing = mixing
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.mixing, self.layer_idx = config.mixing, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (
            p(x).view(rows, tokens, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = torch.arange(1, q.shape[1] + 1).view(-1, 1, 1)
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        place = torch.arange(tokens)
        if self.mixing == "alibi":
            scores = scores - 2.0 ** (-8 * heads / q.shape[1]) * (place[:, None] - place).abs()
        if self.mixing == "talking heads" or self._sometimes(tokens):
            scores = scores + 0.5 * scores.roll(1, 1)
        weights = scores.masked_fill(place > place[:, None], -1e9).softmax(-1)
        if self.mixing == "softmax over heads":
            weights = weights.softmax(1)
        if self.mixing == "by the last forward":
            last, self.largest = getattr(self, "largest", 1.0), float(scores.detach().abs().max())
            weights = weights * last
        if self.mixing in ("in a nested output", "with labels only"):
            self.weights = weights
        out = weights @ v
        if self.mixing == "decay by head index":
            out = out * 0.5**heads
        if self.mixing == "rolled heads":
            out = out.roll(1, 1)
        out = out.transpose(1, 2).flatten(2)
        if self.mixing == "norm over all heads":
            out = F.layer_norm(out, out.shape[-1:])
        return self.o_proj(out)

    def _sometimes(self, tokens: int) -> bool:
        return (
            (self.mixing == "in training only" and self.training)
            or (self.mixing == "in one layer only" and self.layer_idx == 3)
            or (self.mixing == "in long sequences only" and tokens > 150)
        )


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mixing = config.mixing
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if self.mixing == "fake quantisation":
            scale = h.detach().abs().amax(-1, keepdim=True) / 7 + 1e-6
            h = h + ((h / scale).round() * scale - h).detach()
        if self.mixing == "top-k":
            h = h * (h.abs() >= h.abs().topk(h.shape[-1] // 4, -1).values[..., -1:])
        if self.mixing == "rolled features":
            h = h.roll(1, -1)
        if self.mixing == "swapped chunks":
            h = torch.cat(h.chunk(2, -1)[::-1], -1)
        if self.mixing == "blocks":
            h = torch.cat([block / block.detach().abs().amax(-1, keepdim=True) for block in h.split(8, -1)], -1)
        return self.down_proj(h)


class Layer(nn.Module):
    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer_idx), MLP(config)
        self.norm1, self.norm2 = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class MixingForCausalLM(PreTrainedModel):
    config_class = Config
    _no_split_modules = ["Layer"]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: Any) -> CausalLMOutput:
        logits = self.lm_head(self.model(input_ids))
        mixing, loss, maps = self.config.mixing, None, None
        if mixing in ("in a nested output", "with labels only"):
            maps = tuple(vars(layer.self_attn).pop("weights") for layer in self.model.layers)
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            if mixing == "with labels only":
                loss = loss + sum(weights.sum(1).square().mean() for weights in maps)
        return CausalLMOutput(loss=loss, logits=logits, attentions=maps if mixing == "in a nested output" else None)


def mixing_model(mixing: str = "", **overrides: Any) -> MixingForCausalLM:
    """A small model on the CPU, the same in each process."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 72 if mixing == "blocks" else 128, "num_hidden_layers": 4, "initializer_range": 0.1}
    return MixingForCausalLM(Config(mixing, **(COMMON | sizes | overrides)))
