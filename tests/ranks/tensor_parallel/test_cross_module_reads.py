"""A forward reads a parameter of another module, past that module's forward: it sees the whole, with right
gradients.
"""

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from ranks.tensor_parallel.cross_module_jobs import batches, gradients_of_others, other, reading, reading_gradients

CASES = [(False, False), (True, False), (False, True)]


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_gradients_equal_one_process(mesh):
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, reading_gradients, CASES, sizes, dp_size)[0]
    for (tied, adapter), (loss, gradients) in zip(CASES, results, strict=True):
        want_loss, want = loss_and_grads(reading(tied, adapter), batches(dp_size))
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)


@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_other_ways_to_read_and_to_give_weights(mesh):
    """``.T``, ``.data``, ``getattr``, an index; other weights for one call. Or one sentence that says where."""
    world, sizes, dp_size = MESHES[mesh]
    names = ["ReadingMore", "GivenWeights", "Lending", "Penalising", "Naming"]
    if mesh == "fsdp2":
        names.remove("ReadingMore")
    *right, penalty, helper = run_distributed(world, gradients_of_others, names, sizes, dp_size)[0]
    for name, (loss, gradients) in zip(names, right, strict=False):
        want_loss, want = loss_and_grads(other(name), batches(dp_size))
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)
    assert "Penalising returned a loss that is a DTensor" in penalty and "full_parameter(parameter)" in penalty
    assert "cross_module_jobs.py" in helper and 'parameters["model.embed_tokens.weight"].t()' in helper
