"""Training checkpoints on real process groups: exact, on any mesh, whole or refused, never run."""

import pytest
import torch
from harness.models import build_model
from harness.pool import DistributedFailure, run_distributed
from harness.training import batches_for

from hf_automodel_parallel import load_training_state
from ranks.checkpoint.jobs import (
    FULL,
    LORA,
    SHARDED,
    build,
    exactly,
    faults,
    go_on,
    quantised,
    shuffled,
    start,
    trainer,
    trainer_goes_on,
    trainer_run,
    two_groups,
    with_stock,
)

TP2_FSDP2 = {"tp_size": 2, "dp_shard_size": 2}
REPLICATED = {"adapters_over_dp": "replicated"}


def assert_close(got: list[float], want: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0, atol=1e-5)


def assert_alike(by_rank: list[list[float]]) -> list[float]:
    for other in by_rank[1:]:
        assert other == by_rank[0]
    return by_rank[0]


#: The meshes that the run moves over, with the form of the checkpoints that each writes.
WALKS = {
    "mixtral": ("mixtral", None, [(TP2_FSDP2, SHARDED), ({"dp_shard_size": 4}, SHARDED), ({"tp_size": 4}, SHARDED)]),
    "qwen3_moe-lora": (
        "qwen3_moe",
        LORA,
        [(TP2_FSDP2, FULL), ({"dp_replicate_size": 2, "dp_shard_size": 2}, SHARDED), ({"tp_size": 4}, FULL)],
    ),
    # adapters replicated over the data-parallel ranks, sharded, and replicated again
    "llama-lora": (
        "llama",
        LORA,
        [(TP2_FSDP2 | REPLICATED, SHARDED), (TP2_FSDP2, SHARDED), ({"dp_shard_size": 4} | REPLICATED, FULL)],
    ),
}


@pytest.mark.core_cases("qwen3_moe-lora")
@pytest.mark.parametrize("walk", WALKS)
def test_any_mesh_continues_the_run(walk, tmp_path):
    """tp2 x fsdp2 -> fsdp4 (or HSDP) -> tp4 -> one process; packed experts, two groups, a schedule counted per data
    rank.
    """
    name, adapter, meshes = WALKS[walk]
    first, second, third = (str(tmp_path / letter) for letter in "abc")
    want = assert_alike(run_distributed(4, start, meshes[0][0], name, adapter, meshes[0][1], first))
    for (sizes, kind), load, save in zip(meshes[1:], (first, second), (second, third)):
        assert_close(assert_alike(run_distributed(4, go_on, sizes, name, adapter, kind, load, save)), want)
    model = build(name, adapter, seed=5)
    optimizer = two_groups(model)
    load_training_state(third, model, optimizer)
    got = []
    for step in range(2, 7):
        for group, rate in zip(optimizer.param_groups, (1e-2, 3e-3)):
            group["lr"] = rate / (1 + step)
        loss = model(**batches_for(model, 1, rows=8, seed=30 + step)[0], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        got.append(loss.item())
    assert_close(got, want[:5])


@pytest.mark.core_cases("SHARDED_STATE_DICT")
@pytest.mark.parametrize("kind", [SHARDED, FULL])
def test_same_mesh_continues_to_the_last_bit(kind, tmp_path):
    """Dropout, LoRA with modules_to_save, saved in the background while training goes on."""
    for want, got in run_distributed(
        2, exactly, {"tp_size": 2} if kind == FULL else {"dp_shard_size": 2}, kind, str(tmp_path)
    ):
        assert got == want


@pytest.mark.core
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"dp_shard_size": 2}], ids=["tp2", "fsdp2"])
def test_shuffled_loader_continues_within_an_epoch(sizes, tmp_path):
    for want, got in run_distributed(2, shuffled, sizes, str(tmp_path)):
        assert got == want and len(got) > 4


@pytest.mark.both_ends
def test_stock_functions_read_ours_and_ours_read_theirs(tmp_path, caplog):
    for ours, stock, theirs in run_distributed(2, with_stock, {"dp_shard_size": 2}, str(tmp_path)):
        assert stock == ours and theirs == ours


@pytest.mark.parametrize(
    "sizes, later, kind",
    [
        ({"dp_shard_size": 2}, {"dp_shard_size": 2}, SHARDED),
        ({"dp_shard_size": 2}, {"dp_shard_size": 2}, FULL),
        ({"tp_size": 2}, {"tp_size": 2}, SHARDED),
        ({"tp_size": 2}, {"dp_shard_size": 2}, FULL),
    ],
)
def test_qlora_continues(sizes, later, kind, tmp_path):
    build_model("llama", hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "base")
    job = (str(tmp_path / "base"), str(tmp_path / "state"), kind)
    want = run_distributed(2, quantised, sizes, *job, False)[0]
    if sizes != later:  # the packed base, which this checkpoint holds, is a matrix under tp and one column without
        with pytest.raises(DistributedFailure, match="has other shapes than the model"):
            run_distributed(2, quantised, later, *job, True)
        return
    for got in run_distributed(2, quantised, later, *job, True):
        assert got == want


@pytest.mark.core
def test_faults_end_alike_on_all_ranks_and_leave_the_previous_checkpoint(tmp_path):
    by_rank = run_distributed(2, faults, {"dp_shard_size": 2}, str(tmp_path))
    expected = {
        "full_on_1": "full_on_1/pytorch_model_fsdp_0/__1_0.distcp",
        "full_on_1_over": "checkpoint_1/pytorch_model_fsdp_0/__1_0.distcp",
        "full_on_1_status": "incomplete",
        "full_on_0": "full_on_0/pytorch_model_fsdp_0/__0_0.distcp",
        "full_on_0_over": "checkpoint_1/pytorch_model_fsdp_0/__0_0.distcp",
        "full_on_0_status": "incomplete",
        "good_after_full": "no error",
        "full_file": "full_file/pytorch_model_fsdp.bin",
        "flipped": "flipped/optimizer_0/__1_0.distcp was changed",
        "cut": "cut/optimizer_0/__1_0.distcp has",
        "gone": "gone/optimizer_0/__1_0.distcp is missing",
        "other_model": "q_norm",
        "other_sizes": "lm_head.weight",
        "other_adapter": "base_model.model",
        "random_states_1.pkl": "random_states_1.pkl holds more than tensors",
        "custom_checkpoint_0.pkl": "custom_checkpoint_0.pkl holds more than tensors",
        "scheduler.bin": "scheduler.bin holds more than tensors",
        "pytorch_model_fsdp_0/.metadata": ".metadata asks for posix.mkdir",
        "run": "False",
        "kwargs": "weights_only",
        "nothing": "not_there",
        "good": "no error",
        "background": "no error; CheckpointError: the last checkpoint",
    }
    for rank, seen in enumerate(by_rank):
        assert seen.keys() == expected.keys()
        for label, text in expected.items():
            assert text in seen[label], f"rank {rank}, {label}: {seen[label]}"
            if text not in ("no error", "incomplete", "False") and label != "background":
                assert seen[label].startswith("CheckpointError"), f"rank {rank}, {label}: {seen[label]}"


@pytest.mark.both_ends
def test_trainer_resumes_from_the_last_complete_checkpoint_on_any_mesh(tmp_path):
    """True takes the last complete one; a subclass's override is called; tp2 -> fsdp2 -> one process."""
    output = str(tmp_path / "out")
    by_rank = run_distributed(2, trainer_run, {"tp_size": 2}, SHARDED, output, LORA, 1)
    for seen in by_rank:
        assert seen["left"] == ["checkpoint-4", "checkpoint-6"] and seen["saves"] == 3
        assert_close(seen["resumed"], seen["want"])
        assert seen["resumed"][:4] == seen["want"][:4]
        assert "checkpoint-7 is incomplete" in seen["error"] and "checkpoint-4" in seen["error"]
    want = by_rank[0]["want"]
    checkpoint = f"{output}/checkpoint-4"
    for got in run_distributed(2, trainer_goes_on, {"dp_shard_size": 2}, FULL, checkpoint, LORA, 2):
        assert_close(got, want)
    alone = trainer({}, SHARDED, output + "_unused", LORA, 6, 1, seed=4, save_strategy="no")
    alone.train(resume_from_checkpoint=checkpoint)
    assert_close([entry["loss"] for entry in alone.state.log_history if "loss" in entry], want)
