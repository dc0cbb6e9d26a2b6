"""Code that comes with a model (``trust_remote_code=True``): its plan is used, else a proven one, else it is
refused.
"""

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import DistributedFailure, run_distributed

from ranks.plan.custom_code_jobs import batches, custom, custom_gradients, prepare_untriable


@pytest.mark.core_cases("UnplannedForCausalLM-tp2")
@pytest.mark.parametrize(("name", "mesh"), [("PlannedForCausalLM", "tp2_fsdp2"), ("UnplannedForCausalLM", "tp2")])
def test_custom_code(name, mesh):
    world, sizes, dp_size = MESHES[mesh]
    reference = custom(name)  # before the ranks: transformers copies the code into its cache
    loss, gradients, sharded = run_distributed(world, custom_gradients, name, sizes, dp_size)[0]
    want_loss, want = loss_and_grads(reference, batches(dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    derived = name.startswith("Unplanned")
    assert ("layers.0.attention.query_key_value.weight" in sharded) is derived
    assert "layers.0.mlp.down.weight" in sharded and "head.weight" in sharded


def test_custom_code_that_cannot_be_tried_is_refused():
    custom("UntriableForCausalLM")
    with pytest.raises(DistributedFailure) as caught:
        run_distributed(2, prepare_untriable, {"tp_size": 2})
    message = str(caught.value)
    assert set(caught.value.errors) == {0, 1} and caught.value.seconds < 60
    assert "no tensor-parallel plan for the custom-code class UntriableForCausalLM" in message
    assert "needs pixels" in message and "tp_size=1" in message
