"""Activation checkpointing x compile x {full, LoRA} x mesh: gradients of one process in every cell."""

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from parity.jobs import batches_for, build, first_gradients
from parity.test_gradients import LORA, MESHES, label

MODES = ["full", "submodule", "selective"]

CELLS = [
    ("llama", "tp2_fsdp2", LORA, "full", False),
    ("llama", "tp2_fsdp2", LORA, "submodule", False),
    ("llama", "tp2_fsdp2", LORA, "selective", False),
    ("qwen3_moe", "tp2_fsdp2", None, "full", False),
    ("qwen3_moe", "tp2_fsdp2", LORA, "submodule", False),
    ("mixtral", "tp2", LORA, "selective", False),
    ("llama_tied", "fsdp2", None, "submodule", False),
    ("gemma3", "fsdp2", LORA, "selective", False),
    ("phi3", "tp2", None, "full", False),
    ("llama", "tp2_fsdp2", LORA, "full", "aot_eager"),
    ("llama", "tp2_fsdp2", LORA, "submodule", "aot_eager"),
    ("llama", "tp2_fsdp2", LORA, "selective", "aot_eager"),
    ("qwen3", "tp2", None, "selective", "aot_eager"),
    ("llama", "fsdp2", LORA, "submodule", "aot_eager"),
    ("llama", "fsdp2", None, "selective", "aot_eager"),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{label(c[:3])}-{c[3]}-{c[4] or 'eager'}")
def test_gradients_equal_one_process(cell):
    model, mesh, adapter, mode, backend = cell
    world, sizes, dp_size = MESHES[mesh]
    options = {**sizes, "activation_checkpointing": mode, "compile": backend}
    loss, gradients = run_distributed(
        world, first_gradients, model, options, adapter=adapter, dp_size=dp_size, timeout=200
    )[0]
    reference = build(model, adapter)
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
