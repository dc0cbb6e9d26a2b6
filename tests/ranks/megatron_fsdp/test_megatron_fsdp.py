"""megatron-fsdp under our tensor parallelism: its real code on gloo, with stand-ins for CUDA's streams in the jobs
alone.
"""

from typing import Any

import pytest
import torch
from end_to_end.test_import import in_fresh_interpreter
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.oracle import loss_and_grads, train_steps
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build

import ranks.megatron_fsdp.jobs as jobs

DP2, TP2 = (2, 1), (1, 2)


def assert_like_one_process(
    result: dict[str, Any],
    name: str,
    data: int,
    adapter: dict[str, Any] | None = None,
    count: int = 2,
    accumulation: int = 1,
    groups: bool = False,
) -> None:
    """Gradients of the first step, then losses, norms and values of `count` steps of AdamW, against the same model
    alone.
    """
    first = [batches_for(build(name, adapter), data * accumulation, rows=8, seed=10)]
    _, gradients = loss_and_grads(build(name, adapter), first[0])
    wanted = {n: g for n, g in gradients.items() if g is not None}
    # loss_and_grads averages over micro-batches
    assert_gradients_equal(result["gradients"], wanted)
    model = build(name, adapter)
    batches = [batches_for(model, data * accumulation, rows=8, seed=10 + step) for step in range(count)]
    history = train(model, batches, groups)
    assert_losses_equal(result["losses"], [entry["loss"] for entry in history])
    assert_losses_equal(result["norms"], [entry["grad_norm"] for entry in history], rtol=1e-5)
    for key, value in model.named_parameters():
        torch.testing.assert_close(result["values"][key], value, rtol=1e-4, atol=2e-5, msg=key)


def train(model: torch.nn.Module, batches: list[list[dict]], groups: bool) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(jobs.parameter_groups(model, groups), lr=1e-3, weight_decay=0.1, eps=1e-3)
    history = []
    for step in batches:
        total = 0.0
        for batch in step:
            loss = model(**batch).loss / len(step)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": total, "grad_norm": norm.item()})
    return history


@pytest.mark.core_cases("3")
@pytest.mark.parametrize("strategy", [3, 2, 1, 0])
def test_data_parallel(strategy):
    """Two parameter groups: their learning rates and weight decays survive."""
    for result in run_distributed(2, jobs.steps, "llama", DP2, groups=True, zero_dp_strategy=strategy):
        assert_like_one_process(result, "llama", 2, groups=True)


def test_tensor_parallel_alone_is_returned_unwrapped():
    for result in run_distributed(2, jobs.unwrapped_steps, "qwen3"):
        assert_gradients_equal(result["gradients"], result["wanted"])
        assert result["class"] == "Qwen3ForCausalLM"


@pytest.mark.core_cases("qwen3-None-options0")
@pytest.mark.parametrize(
    ("name", "adapter", "options"),
    [
        ("qwen3", None, {}),
        ("llama_tied", LORA, {"zero_dp_strategy": 1}),
        ("phi3", None, {"zero_dp_strategy": 2}),
    ],
)
def test_tensor_and_data_parallel(name, adapter, options):
    """q_norm and k_norm, whose gradients are partial; tied ends with LoRA; packed projections."""
    for result in run_distributed(4, jobs.steps, name, (2, 2), adapter=adapter, **options):
        assert_like_one_process(result, name, 2, adapter)


def assert_accelerate_like_one_process(results, name, data, adapter=None, accumulation=1):
    model = build(name, adapter)
    batches = [batches_for(model, data * accumulation, rows=8, seed=10 + step) for step in range(2)]
    history = train(model, batches, groups=True)
    for result in results:
        assert_losses_equal(result["losses"][:2], [entry["loss"] for entry in history])
        assert_losses_equal(result["norms"][:2], [entry["grad_norm"] for entry in history], rtol=1e-5)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(results[0]["values"][key], value, rtol=1e-4, atol=2e-5, msg=key)
    assert results[1]["values"] == {}


def test_accelerate_loop_with_a_saved_and_loaded_state(tmp_path):
    results = run_distributed(2, jobs.accelerate_steps, "llama_tied", {"dp_shard_size": 2}, directory=str(tmp_path))
    assert results[0]["class"] == "LlamaForCausalLM"
    assert all(result["again"] for result in results)
    assert_accelerate_like_one_process(results, "llama_tied", 2)


def test_accelerate_with_tensor_parallelism_lora_checkpoints_and_accumulation():
    """Strategy 1 keeps gradients whole, which must not be reduced twice. Every MLP of the two layers runs twice per
    batch.
    """
    arguments = {"accumulation": 2, "activation_checkpointing": "full", "megatron_fsdp": {"zero_dp_strategy": 1}}
    results = run_distributed(
        4, jobs.accelerate_steps, "qwen3", {"tp_size": 2, "dp_shard_size": 2}, adapter=LORA, **arguments
    )
    assert {result["calls"] for result in results} == {8}
    assert_accelerate_like_one_process(results, "qwen3", 2, LORA, accumulation=2)


def test_accelerate_with_replicas_and_experts():
    """HSDP; megatron-fsdp takes modules called experts for expert parallel."""
    sizes = {"dp_replicate_size": 2, "dp_shard_size": 2}
    results = run_distributed(4, jobs.accelerate_steps, "mixtral", sizes, data=4, accumulation=2)
    assert_accelerate_like_one_process(results, "mixtral", 4, accumulation=2)


def test_trainer_trains_clips_and_saves(tmp_path):
    results = run_distributed(4, jobs.trainer_steps, "llama", None, str(tmp_path), save_strategy="steps", save_steps=5)
    model = build("llama")
    steps = [batches_for(model, 1, 8, 10 + step) for step in range(5)]
    history = train_steps(model, steps, max_grad_norm=1.0, combine="tokens")
    for result in results:
        assert [entry["loss"] for entry in result["history"]] == pytest.approx([h["loss"] for h in history], rel=1e-4)
        assert [e["grad_norm"] for e in result["history"]] == pytest.approx([h["grad_norm"] for h in history], rel=1e-4)
    checkpoint = tmp_path / "checkpoint-5"
    assert {"model.safetensors", "optimizer.bin", "pytorch_model_fsdp.bin"} <= {f.name for f in checkpoint.iterdir()}
    saved = type(model).from_pretrained(checkpoint).state_dict()
    start = build("llama").state_dict()
    for key, value in model.state_dict().items():  # AdamW turns rounding of gradients near zero into steps
        assert (saved[key] - value).norm() <= 1e-2 * (value - start[key]).norm(), key


def test_clipping_scales_bfloat16_gradients_and_counts_replicated_parameters_once():
    for result in run_distributed(2, jobs.norms_of_mixed_gradients):
        assert result["before"] == pytest.approx((16 + 8) ** 0.5)  # 2 x 8 elements in shards, 8 in copies
        assert result["after"] == pytest.approx(1.0, rel=1e-2)
        assert result["largest"] == 1.0
        assert result["dtypes"] == {torch.bfloat16}
    for before, after, dtypes in run_distributed(2, jobs.bfloat16_clip):
        assert before > 0.5 and after == pytest.approx(0.1, rel=1e-2) and dtypes == "torch.bfloat16"


def test_ranks_of_a_cp_axis_reduce_too():
    """The mesh of the reference: (dp, cp, tp), and dp_shard_dim says dp. Each rank has other data."""
    for result in run_distributed(2, jobs.steps, "llama", (1, 2, 1), ("dp", "cp", "tp")):
        assert_like_one_process(result, "llama", 2)


def test_activation_checkpointing_is_applied():
    sizes, mode = {"dp_shard_size": 2}, {"activation_checkpointing": "submodule"}
    results = run_distributed(2, jobs.accelerate_steps, "llama", sizes, **mode)
    assert {result["calls"] for result in results} == {4}
    assert_accelerate_like_one_process(results, "llama", 2)


@pytest.mark.core
def test_refusals_are_the_same_on_all_ranks():
    parts = [
        "LlamaDecoderLayr",
        "megatron_fsdp_unit_modules=[]",
        "LlamaDecoderLayer contains LlamaMLP",
        "zero_dp_strategy=4",
        "overlap_grad_reduce=False with zero_dp_strategy=3",
        "overlap_param_gather=False with zero_dp_strategy=3",
        "nccl_ub='yes'",
        "init_fsdp_with_meta_device=True with zero_dp_strategy=0",
        "calculate_per_token_loss=True",
        "dp_shard_dim='data'",
        "tp_dim='tensor'",
        "both 'dp'",
        "style Own",
        "up_prj",
        "GPT2",
    ]
    for messages in run_distributed(2, jobs.refusals):
        for part, message in zip(parts, messages, strict=True):
            assert part in message


def test_import_is_lazy_and_changes_no_log_level():
    found = in_fresh_interpreter(
        """
        import json, logging, sys
        import hf_automodel_parallel.backends.megatron_fsdp as ours
        import hf_automodel_parallel.backends.megatron_fsdp.strategy
        before = "megatron_fsdp" in sys.modules
        have = ours.HAVE_MEGATRON_FSDP
        levels = [logging.getLogger(n).level for n in ("megatron_fsdp", "hf_automodel_parallel", "")]
        print(json.dumps([before, have, levels]))
        """
    )
    assert found == [False, True, [0, 0, 30]]
