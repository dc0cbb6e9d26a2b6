"""Dropout under parallelism: equal masks where activations are replicated, different ones where they are sharded."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import (
    assert_bitwise_equal,
    assert_gradients_equal,
    assert_losses_equal,
    full_grads,
    full_parameters,
)
from harness.dropout_jobs import gradients_and_masks, replayed_masks
from harness.meshes import MESHES
from harness.models import LORA_7
from harness.oracle import loss_and_grads
from harness.pool import expect_error, run_distributed
from harness.training import batches_for, build, data_rank, first_gradients, trainable

from hf_automodel_parallel import AutoParallelismConfig

LORA = {"target_modules": "all-linear", "lora_dropout": 0.25}
ATTENTION = {"attn_implementation": "eager", "attention_dropout": 0.25}
RESIDUAL = {**ATTENTION, "resid_pdrop": 0.25}


def assembled(ranks: list[list[torch.Tensor]], whole: list[tuple[int, ...]]) -> tuple[list[torch.Tensor], int, int]:
    """The masks of one tp group as one process would draw them, and how many were replicated and sharded."""
    masks, replicated, sharded = [], 0, 0
    assert len({len(masks) for masks in ranks}) == 1
    for parts, shape in zip(zip(*ranks, strict=True), whole, strict=True):
        if tuple(parts[0].shape) == shape:
            assert all(torch.equal(parts[0], part) for part in parts), f"{shape}: replicated, but different masks"
            masks.append(parts[0])
            replicated += 1
        else:
            assert not any(torch.equal(parts[0], part) for part in parts[1:]), f"{shape}: sharded, but equal masks"
            dim = next(d for d in range(len(shape)) if parts[0].shape[d] != shape[d])
            masks.append(torch.cat(parts, dim))
            assert tuple(masks[-1].shape) == shape
            sharded += 1
    return masks, replicated, sharded


def shapes_of(model, batch) -> list[tuple[int, ...]]:
    """Shapes of what the dropouts of one process see, in the order of the calls."""
    from harness.dropout_jobs import recorded_masks

    with recorded_masks() as masks, torch.no_grad():
        model(**batch)
    return [tuple(mask.shape) for mask in masks]


CELLS = {
    "attention": ("llama", "tp2", None, ATTENTION, {}, {}),
    "attention-tp4": ("llama", "tp4", None, {**ATTENTION, "num_key_value_heads": 4}, {}, {}),
    "lora": ("llama", "tp2", LORA, {}, {}, {}),
    "both": ("llama", "tp2_fsdp2", LORA, ATTENTION, {}, {}),
    "both-moe": ("qwen3_moe", "tp2", {**LORA, "target_modules": ["q_proj", "o_proj"]}, ATTENTION, {}, {}),
    "both-full": ("llama", "tp2_fsdp2", LORA, ATTENTION, {"activation_checkpointing": "full"}, {}),
    "both-submodule": ("llama", "tp2", LORA, ATTENTION, {"activation_checkpointing": "submodule"}, {}),
    "both-selective": ("llama", "tp2", LORA, ATTENTION, {"activation_checkpointing": "selective"}, {}),
    "both-own-checkpoints": ("llama", "tp2", LORA, ATTENTION, {}, {"hf_checkpointing": {"use_reentrant": False}}),
    "both-own-reentrant": ("llama", "tp2", LORA, ATTENTION, {}, {"hf_checkpointing": {"use_reentrant": True}}),
    "seeded-after-prepare": ("llama", "tp2", LORA, ATTENTION, {}, {"seed_after": True}),
    "dora": ("llama", "tp2", {**LORA, "use_dora": True}, {}, {}, {}),
    "residual": ("phi3", "tp2", LORA, RESIDUAL, {}, {}),
    "residual-selective": ("phi3", "tp2", LORA, RESIDUAL, {"activation_checkpointing": "selective"}, {}),
}


@pytest.mark.core_cases("attention", "lora")
@pytest.mark.parametrize(
    "cell",
    [
        # transformers 5.17 checkpoints at another place
        pytest.param(cell, marks=pytest.mark.both_ends if name in ("both", "both-own-reentrant") else ())
        for name, cell in CELLS.items()
    ],
    ids=CELLS.keys(),
)
def test_masks_and_gradients(cell):
    """Per-rank seeds; the gradients are those of one process with the very masks that the ranks drew."""
    model, mesh, adapter, overrides, options, more = cell
    world, sizes, dp_size = MESHES[mesh]
    loss, gradients, masks = run_distributed(
        world, gradients_and_masks, model, {**sizes, **options}, adapter, overrides, dp_size, **more
    )[0]
    reference = build(model, adapter, **overrides).train()
    batches = batches_for(reference, dp_size)
    whole = shapes_of(reference, batches[0])
    tp = sizes.get("tp_size", 1)
    in_order: list[torch.Tensor] = []
    for group in range(dp_size):
        drawn, replicated, sharded = assembled(masks[group * tp : (group + 1) * tp], whole)
        assert sharded and (replicated or (model == "llama" and adapter is None)), (replicated, sharded)
        in_order += drawn
    with replayed_masks(in_order):
        want_loss, want = loss_and_grads(reference, batches)
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


def test_compile_refuses_dropout_on_sharded_activations():
    """Inside of a graph the random state cannot be switched; attention dropout would draw equal masks on all tp
    ranks.
    """
    expect_error(
        2,
        first_gradients,
        "llama",
        {"tp_size": 2, "compile": "aot_eager"},
        overrides=ATTENTION,
        match="self_attn .* has attention_dropout=0.25",
    )


DROPOUT_CELLS = {
    "lora_dropout": ("llama", {"target_modules": LORA_7, "lora_dropout": 0.1}, {}),
    "residual_dropout": ("phi3", None, {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
}


def five_steps_with_dropout(cell: str, sizes: dict[str, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Trains with another seed on each rank. Returns this rank's view of the parameters and its random state."""
    name, adapter, overrides = DROPOUT_CELLS[cell]
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build(name, adapter, **overrides)
    torch.manual_seed(1000 + dist.get_rank())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    model.train()
    for step in range(5):
        batch = batches_for(model, 2, seed=10 + step)[data_rank(accelerator)]
        accelerator.backward(model(**batch, use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()
    return full_parameters(model), torch.get_rng_state()


@pytest.mark.core_cases("lora_dropout-tp2", "residual_dropout-tp2_fsdp2")
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
@pytest.mark.parametrize("cell", DROPOUT_CELLS)
def test_dropout_does_not_let_replicas_drift(cell, mesh):
    """Stock: with a seed per rank, the replicated `lora_A` is 0.32 apart after five steps.

    `full_parameters` gathers only what is sharded, so what is replicated over tp is this rank's own copy.
    """
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, five_steps_with_dropout, cell, sizes)
    assert_bitwise_equal([parameters for parameters, _ in results])
    states = [state for _, state in results]
    for rank in range(0, world, 2):
        assert torch.equal(states[rank], states[rank + 1]), "the ranks of a tp group draw different masks"
    if dp_size == 2:
        assert not torch.equal(states[0], states[2]), "data-parallel ranks draw the same masks"


def gradients_with_dropout() -> dict[str, torch.Tensor | None]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama", COLUMN_WISE_DROPOUT)
    torch.manual_seed(1000 + dist.get_rank())
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    model.train()
    accelerator.backward(model(**batches_for(model, 1)[0], use_cache=False).loss)
    return full_grads(model)


COLUMN_WISE_DROPOUT = {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "lora_dropout": 0.1}


@pytest.mark.core
def test_masks_are_those_of_one_process():
    """The input of a column-wise adapter is replicated: with rank 0's seed, one process draws the very same masks."""
    gradients = run_distributed(2, gradients_with_dropout)[0]
    reference = build("llama", COLUMN_WISE_DROPOUT).train()
    torch.manual_seed(1000)
    _, want = loss_and_grads(reference, batches_for(reference, 1))
    assert_gradients_equal(gradients, want)
