"""Models without a plan of their own get a derived one, with the gradients of one process."""

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from parity.derived_jobs import batches, built, derived_gradients

#: (type, mesh, with LoRA, fields of its config)
CELLS = [
    ("gpt2", "tp2_fsdp2", False, {}),  # Conv1D, q, k and v packed
    ("gpt2", "tp2", True, {"vocab_size": 131}),
    ("opt", "tp2", False, {}),
    ("bloom", "tp2_fsdp2", True, {}),  # ALiBi, q, k and v packed for each head
    ("mpt", "tp2", False, {}),
    ("mamba", "tp2_fsdp2", False, {}),  # no pairs: each projection on its own
]


@pytest.mark.parametrize(("model_type", "mesh", "adapter", "overrides"), CELLS)
def test_derived_plan(model_type, mesh, adapter, overrides):
    world, sizes, dp_size = MESHES[mesh]
    loss, gradients, shares = run_distributed(
        world, derived_gradients, model_type, sizes, adapter=adapter, dp_size=dp_size, overrides=overrides
    )[0]
    reference = built(model_type, adapter, **overrides)
    want_loss, want = loss_and_grads(reference, batches(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    whole = sum(p.numel() for p in reference.parameters())
    mine = sum(p.numel() * shares[name] for name, p in reference.named_parameters())
    assert mine < (0.85 if model_type == "mamba" else 0.65) * whole * (1 / dp_size), "the plan shards most of the model"
