"""megatron-fsdp under our tensor parallelism: its real code on gloo, with stand-ins for CUDA's streams in the jobs alone."""

from typing import Any

import megatron_jobs as jobs
import pytest
import torch
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from parity.jobs import batches_for, build

DP2, TP2 = (2, 1), (1, 2)
LORA = {"target_modules": "all-linear"}


def assert_like_one_process(
    result: dict[str, Any],
    name: str,
    data: int,
    adapter: dict[str, Any] | None = None,
    count: int = 2,
    accumulation: int = 1,
    groups: bool = False,
) -> None:
    """Gradients of the first step, then losses, norms and values of `count` steps of AdamW, against the same model alone."""
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


@pytest.mark.parametrize("strategy", [3, 2, 1, 0])
def test_data_parallel(strategy):
    """Two parameter groups: their learning rates and weight decays survive."""
    for result in run_distributed(2, jobs.steps, "llama", DP2, groups=True, zero_dp_strategy=strategy):
        assert_like_one_process(result, "llama", 2, groups=True)


def test_tensor_parallel_alone_is_returned_unwrapped():
    for result in run_distributed(2, jobs.unwrapped_steps, "qwen3"):
        assert_gradients_equal(result["gradients"], result["wanted"])
        assert result["class"] == "Qwen3ForCausalLM"


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
