"""What a forward keeps for its backward under sequence parallelism, counted by MemTracker on four ranks that do not
exist.
"""

from __future__ import annotations

import pytest
from harness.fake_ranks import fake_world, kept_per_layer, leave_blocks_out

ROWS, LENGTH, WIDTH = 4, 64, 64  # of harness.fake_ranks and harness.models
WHOLE = ROWS * LENGTH * WIDTH * 4  # bytes of hidden states in float32


@pytest.mark.parametrize(
    "model, values, tensors", [("llama", {}, 4), ("phi3", {"resid_pdrop": 0.1}, 6)], ids=["llama", "phi3-dropout"]
)
def test_norm_inputs_residuals_and_dropout_masks_on_shares(model, values, tensors):
    """A quarter at tp4. Two tensors of each norm, and what each residual dropout keeps."""
    with fake_world(4):
        plain, shares = (
            kept_per_layer(model, 4, LENGTH, leave_blocks_out, values=values, sequence_parallel=sequence_parallel)
            for sequence_parallel in (False, True)
        )
    assert tensors * WHOLE <= plain <= 1.1 * tensors * WHOLE  # the comparison is with something
    assert shares <= 0.35 * plain, f"{shares} of {plain} bytes: {shares / plain:.3f}"


def test_gathering_again_keeps_shares_of_the_blocks_inputs():
    """Of the inputs of attention and MLP three quarters at tp4."""
    with fake_world(4):
        plain = kept_per_layer("llama", 4, LENGTH)
        kept = kept_per_layer("llama", 4, LENGTH, sequence_parallel=True)
        again = kept_per_layer("llama", 4, LENGTH, sequence_parallel=True, sequence_parallel_regather=True)
    assert kept <= 0.7 * plain and again <= 0.55 * plain, (plain, kept, again)
    assert kept - again == 2 * WHOLE * 3 // 4
