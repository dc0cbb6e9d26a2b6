"""A forward reads a parameter of another module, past that module's forward: it sees the whole, with right
gradients.
"""

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from ranks.tensor_parallel.cross_module_jobs import batches, reading, reading_gradients

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
