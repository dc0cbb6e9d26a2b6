"""Which modules draw random numbers in their forward."""

import pytest
from harness.training import build

from hf_automodel_parallel.tensor_parallel.dropout_rng import draws_random_numbers


@pytest.mark.parametrize("name, draws", [("router_jitter_noise", True), ("drop_path", True), ("width", False)])
def test_what_counts_as_drawing(name, draws):
    """Only models that draw are synchronised once more at their first training forward."""
    model = build("llama")
    assert not draws_random_numbers(model)
    setattr(model.model.layers[0].mlp, name, 0.1)
    assert draws_random_numbers(model) == draws
