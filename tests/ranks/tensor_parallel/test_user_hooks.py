"""Hooks of the user inside of sharded blocks: they see full activations with the gradients of one process, or are
refused by name.
"""

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.pool import run_distributed

from ranks.tensor_parallel.hook_jobs import (
    COMPUTED_WEIGHTS,
    REFUSED,
    hooked_gradients,
    in_one_process,
    messages,
    on_rank_0_alone,
)

CASES = [("llama", "before"), ("llama", "after"), ("gpt2", "after"), ("llama_mqa", "after")]


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize("mesh", ["tp2", "tp4"])
def test_gradients_equal_one_process(mesh):
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, hooked_gradients, CASES, sizes, dp_size)[0]
    for (name, _), (loss, gradients) in zip(CASES, results, strict=True):
        want_loss, want = in_one_process(name, dp_size)
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)


def test_hooks_on_what_differs_across_ranks_are_refused_by_name():
    cases = [(when, number) for when in ("before", "after") for number in range(len(REFUSED))]
    cases += [("before", len(REFUSED) + number) for number in range(len(COMPUTED_WEIGHTS))]
    for said in run_distributed(2, messages, cases, {"tp_size": 2}):
        for (_, number), message in zip(cases, said, strict=True):
            path = (REFUSED + COMPUTED_WEIGHTS)[number][2]
            hook = "hook_jobs.nothing on" if number < len(REFUSED) else "computed by a hook"
            assert path in message and hook in message and "tp_size=1" in message, (path, message)


def test_a_hook_on_one_rank_alone_ends_in_an_error():
    said, other = run_distributed(2, on_rank_0_alone)
    assert other == "nothing"
    assert "calls the hook" in said and "hook_jobs.nothing" in said and "rank 1 did not within 2 s" in said, said
