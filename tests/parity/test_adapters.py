"""Adapter methods at parity: DoRA, biases of row-wise layers, rank patterns, layers_to_transform, several adapters."""

import pytest
import torch
from accelerate import Accelerator
from harness.compare import assert_losses_equal
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from hf_automodel_parallel import AutoParallelismConfig, UnsupportedError
from parity.jobs import batches_for, build, trainable
from parity.test_gradients import LORA, check

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


def structural_changes():
    """Messages of the methods that would rebuild a sharded layer, and whether switching adapters off still works."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama", LORA)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model)))
    batch = batches_for(model, 1)[0]
    messages = []
    for call in (model.merge_and_unload, model.base_model.merge_and_unload, model.merge_adapter, model.unload):
        try:
            call()
        except UnsupportedError as error:
            messages.append(str(error))
    with torch.no_grad(), model.disable_adapter():
        plain = model(**batch).loss.item()
    return messages, plain


def test_methods_that_rebuild_layers_are_refused_by_name():
    messages, plain = run_distributed(2, structural_changes)[0]
    assert len(messages) == 4 and all("not available yet" in m and "()" in m for m in messages)
    reference = build("llama")
    assert_losses_equal(plain, loss_and_grads(reference, batches_for(reference, 1))[0])
