"""The class of custom_model.py. It needs a config, so that a tiny copy can be built, and layers in a ModuleList."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MyConfig(PreTrainedConfig):
    model_type = "mine"

    def __init__(self, vocab_size=32, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, config: MyConfig):
        super().__init__()
        width = config.hidden_size
        self.head_width = width // config.num_attention_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.temp = nn.Parameter(torch.ones(self.head_width))  # scales the features of each head
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        batch, length, _ = x.shape
        y = self.norm1(x)
        # -1, not the number of heads: under tensor parallelism each rank has some of them
        q, k, v = (w(y).view(batch, length, -1, self.head_width).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = F.scaled_dot_product_attention(q * self.temp, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class MyForCausalLM(PreTrainedModel):
    config_class = MyConfig
    _no_split_modules = ["Block"]

    def __init__(self, config: MyConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm, self.head = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
