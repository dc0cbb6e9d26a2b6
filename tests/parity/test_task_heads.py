"""Sequence and token classification, rewards, and bidirectional encoders: gradients of one process on every mesh."""

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from parity.head_jobs import batches_of, build, head_gradients

SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
REWARD, MASKED = f"{SEQUENCE}:reward", "AutoModelForMaskedLM"

#: mesh -> (type, class, with LoRA); llama and qwen2 have a plan, bert and modernbert get a derived one.
CELLS = {
    "tp2": [
        ("llama", SEQUENCE, True),
        ("qwen2", REWARD, False),
        ("llama", TOKEN, False),
        ("bert", SEQUENCE, True),
        ("modernbert", TOKEN, False),
        ("bert", MASKED, False),
    ],
    "tp2_fsdp2": [
        ("llama", SEQUENCE, False),
        ("qwen2", TOKEN, True),
        ("bert", TOKEN, False),
        ("modernbert", SEQUENCE, True),
    ],
    "fsdp2": [("bert", SEQUENCE, False), ("modernbert", MASKED, False), ("llama", REWARD, True)],
}


@pytest.mark.parametrize("mesh", CELLS)
def test_heads_and_encoders(mesh):
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, head_gradients, CELLS[mesh], sizes, dp_size, timeout=240)[0]
    for (model_type, task, adapter), (loss, gradients) in zip(CELLS[mesh], results, strict=True):
        reference = build(model_type, task, adapter)
        parts = batches_of(task, dp_size)
        want_loss, want = loss_and_grads(reference, parts)
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)
