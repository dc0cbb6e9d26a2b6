"""Adapter methods at parity: DoRA, biases of row-wise layers, rank patterns, layers_to_transform, several adapters."""

import pytest
from harness.training import LORA

from parity.test_gradients import check

DORA = {**LORA, "use_dora": True}
BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("model", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("mesh", ["tp2_fsdp2", "tp2", "fsdp2"])
def test_dora(model, mesh):
    """PEFT's norm runs over whole rows; row-wise layers hold slices of the columns, so it is summed over the ranks."""
    check(model, mesh, DORA)


@pytest.mark.parametrize(
    "adapter", [None, LORA, DORA, {**LORA, "bias": "all"}], ids=["full", "lora", "dora", "bias_all"]
)
def test_row_wise_biases_count_once(adapter):
    check("llama", "tp2_fsdp2", adapter, overrides=BIASES)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"q_proj": 3}},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
        {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj", "o_proj"]},
        {"use_dora": True, "bias": "lora_only"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_lora_options(options):
    check("llama", "tp2_fsdp2", {**LORA, **options})
