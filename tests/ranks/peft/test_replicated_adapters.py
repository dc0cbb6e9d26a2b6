"""Adapters that are replicated over the data-parallel ranks (`adapters_over_dp="replicated"`) instead of sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.collectives import count_collectives
from harness.compare import assert_bitwise_equal, assert_gradients_equal, full_grads, full_parameters, mean_over_ranks
from harness.oracle import loss_and_grads, train_steps
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from torch.distributed.tensor import DTensor

from hf_automodel_parallel import AutoParallelismConfig

CLIP = 0.05
#: Micro-batches of an optimizer step.
MICRO = 2
REPLICATED = {"adapters_over_dp": "replicated"}
FSDP2 = {"dp_shard_size": 2}
TP2_FSDP2 = {"tp_size": 2, "dp_shard_size": 2}


def steps_of(model: torch.nn.Module, dp_size: int) -> list[list[dict[str, torch.Tensor]]]:
    """For each of three steps, two micro-batches for each data-parallel rank."""
    return [batches_for(model, MICRO * dp_size, rows=4 * MICRO, seed=10 + step) for step in range(3)]


def train(options: dict[str, Any], adapter: dict[str, Any], by_hand: bool = False) -> dict[str, Any]:
    """Three steps, and the collectives of the last one.

    ``by_hand``: in a loop that calls ``loss.backward()`` itself, and so reduces after each micro-batch.
    """
    accelerator = Accelerator(
        parallelism_config=AutoParallelismConfig(**options), gradient_accumulation_steps=1 if by_hand else MICRO
    )
    dp_size, mine = accelerator.parallelism_config.data_parallel_size, data_rank(accelerator)
    model = build("llama", adapter)
    steps = steps_of(model, dp_size)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0))
    losses, norms, gradients, counts = [], [], {}, {}

    def backwards(batches: list[dict[str, torch.Tensor]]) -> None:
        for micro in range(MICRO):
            with accelerator.accumulate(model):
                loss = model(**batches[micro * dp_size + mine], use_cache=False).loss / (MICRO if by_hand else 1)
                loss.backward() if by_hand else accelerator.backward(loss)
            losses.append(loss.detach() * (MICRO if by_hand else 1))

    for number, batches in enumerate(steps):
        if number < 2 or options.get("compile"):
            backwards(batches)
        else:
            counts = dict(count_collectives(lambda batches=batches: backwards(batches)).total)
        gradients = gradients or full_grads(model)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return {
        "losses": [mean_over_ranks(loss) for loss in losses],
        "norms": norms,
        "gradients": gradients,
        "parameters": {name: p for name, p in full_parameters(model).items() if ".lora_" in name},
        "counts": counts,
        "sharded": [
            name
            for name, p in model.named_parameters()
            if ".lora_" in name and isinstance(p, DTensor) and not all(x.is_replicate() for x in p.placements[:-1])
        ],
    }


def check(results: list[dict[str, Any]], dp_size: int, adapter: dict[str, Any]) -> None:
    """Loss, every gradient, norm and steps are those of one process, and equal on all ranks."""
    reference = build("llama", adapter)
    steps = steps_of(reference, dp_size)
    _, gradients = loss_and_grads(reference, steps[0])
    want = train_steps(reference, steps, lr=1e-2, max_grad_norm=CLIP)
    got = results[0]
    assert got["sharded"] == []
    assert_gradients_equal(got["gradients"], gradients)
    of_steps = torch.tensor(got["losses"]).view(3, MICRO).mean(1).tolist()
    assert of_steps == pytest.approx([entry["loss"] for entry in want], rel=1e-5)
    assert got["norms"] == pytest.approx([entry["grad_norm"] for entry in want], rel=1e-4)
    assert_bitwise_equal([result["parameters"] for result in results])
    learned = {name: p.detach() for name, p in reference.named_parameters() if ".lora_" in name}
    assert got["parameters"].keys() == learned.keys() != set()
    for name, parameter in learned.items():
        torch.testing.assert_close(got["parameters"][name], parameter, rtol=1e-3, atol=1e-5)


BOTH_ENDS = {"target_modules": ["q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"]}
#: Options, adapter, by hand, ranks.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool, int]] = {
    "fsdp2": (FSDP2, BOTH_ENDS, False, 2),
    "tp2_fsdp2": (TP2_FSDP2, LORA, False, 4),
    "tp2_replicas": ({"tp_size": 2, "dp_replicate_size": 2, "dp_shard_size": 1}, LORA, True, 4),
    "fsdp2-compiled": ({**FSDP2, "compile": "aot_eager", "activation_checkpointing": "selective"}, LORA, False, 2),
    "tp2_fsdp2-dora": (
        {**TP2_FSDP2, "activation_checkpointing": "submodule"},
        LORA | {"use_dora": True, "lora_bias": False},
        False,
        4,
    ),
    "tp2_fsdp2-sequence": (
        {**TP2_FSDP2, "sequence_parallel": True, "activation_checkpointing": "full", "compile": "aot_eager"},
        LORA,
        False,
        4,
    ),
}


@pytest.mark.core_cases("fsdp2", "tp2_fsdp2")
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(case):
    options, adapter, by_hand, world = CASES[case]
    results = run_distributed(world, train, options | REPLICATED, adapter, by_hand)
    check(results, world // options.get("tp_size", 1), adapter)


def test_one_all_reduce_per_step_beside_those_of_activations():
    """Two micro-batches. Sharded: a reduction for each unit, and one over tp. Replicated: one in all."""
    sharded, replicated = (run_distributed(4, train, TP2_FSDP2 | w, LORA)[0]["counts"] for w in ({}, REPLICATED))
    assert sharded["reduce_scatter"] == 2 and "reduce_scatter" not in replicated
    assert replicated["all_reduce"] == sharded["all_reduce"]  # that one covers both axes
    assert replicated["all_gather"] <= sharded["all_gather"]
    sharded, replicated = (run_distributed(2, train, FSDP2 | where, LORA)[0]["counts"] for where in ({}, REPLICATED))
    assert sharded["reduce_scatter"] == 2 and "all_reduce" not in sharded
    assert "reduce_scatter" not in replicated and replicated["all_reduce"] == 1


def low_precision(options: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor | None]]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**options), mixed_precision="bf16")
    model = build("llama", LORA)
    batch = batches_for(model, 2)[data_rank(accelerator)]
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    loss = model(**batch, use_cache=False).loss
    accelerator.backward(loss)
    return loss.item(), full_grads(model)


@pytest.mark.parametrize("options", [FSDP2, TP2_FSDP2], ids=["fsdp2", "tp2_fsdp2"])
def test_bf16_computes_what_sharded_adapters_compute(options):
    """Which `tests/ranks/accelerate/test_bf16_parity.py` compares with autocast in one process."""
    world = 2 * options.get("tp_size", 1)
    results = [run_distributed(world, low_precision, options | where) for where in ({}, REPLICATED)]
    for (want_loss, want), (loss, got) in zip(*results, strict=True):
        assert loss == want_loss
        assert_gradients_equal(got, want)
        assert {g.dtype for g in got.values() if g is not None} == {torch.float32}
