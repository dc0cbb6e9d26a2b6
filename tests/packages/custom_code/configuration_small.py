"""The configuration of a model whose code lies beside its weights."""

from transformers import PretrainedConfig


class SmallConfig(PretrainedConfig):
    model_type = "small_custom_code"

    def __init__(
        self,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=128,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = vocab_size
        super().__init__(**kwargs)
