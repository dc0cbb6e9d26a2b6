"""Bytes and collectives of ``explain``, which runs a few of the layers on simulated ranks, are those of real ranks that
run all of them.
"""

import pytest
from harness.pool import run_distributed

from hf_automodel_parallel import explain

from .jobs import LENGTH, ROWS, real_step, tiny

CASES = {
    "llama-tp2_fsdp2-sequence_parallel-full": (
        "llama",
        {"tp_size": 2, "dp_shard_size": 2},
        {"sequence_parallel": True, "activation_checkpointing": "full"},
        None,
    ),
    "llama-tp2-lora": ("llama", {"tp_size": 2, "dp_shard_size": 1}, {}, {"r": 4, "target_modules": "all-linear"}),
}


@pytest.mark.core
@pytest.mark.parametrize("family, sizes, options, lora", CASES.values(), ids=CASES)
def test_equal_to_a_real_step(family, sizes, options, lora):
    world = sizes["tp_size"] * sizes["dp_shard_size"]
    real = run_distributed(world, real_step, family, sizes, options, lora)[0]
    found = explain(tiny(family), {**sizes, **options}, batch=ROWS, sequence=LENGTH, lora=lora)
    assert {name: found.memory[name] for name in ("parameters", "gradients", "optimizer")} == {
        name: real[name] for name in ("parameters", "gradients", "optimizer")
    }
    planned = [
        tuple(row[key] for key in ("kind", "axis", "count", "tensor_bytes", "sent_bytes")) for row in found.collectives
    ]
    assert sorted(planned) == [tuple(row) for row in real["collectives"]]
