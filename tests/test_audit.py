"""A plan that forgets a parameter between sharded projections must not train on silently."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from harness.pool import expect_error, run_distributed
from parity.jobs import batches_for, build, data_rank, trainable
from parity.test_gradients import LORA
from torch import nn

from hf_automodel_parallel import AutoParallelismConfig


class ScaledActivation(nn.Module):
    """An activation with a learnable scale per call, such as xIELU's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x) * self.scale


def one_step(sizes: dict, plan_the_scale: bool, raw_loop: bool = False) -> float:
    """A Llama whose activation has a parameter that its ``_tp_plan`` does not know; returns the scale after a step."""
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = ScaledActivation()
    plan = None
    if plan_the_scale:
        plan = {**model.tp_plan, "model.layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, tp_plan=plan))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    dp = accelerator.parallelism_config.data_parallel_size
    loss = model(**batches_for(model, dp)[data_rank(accelerator)]).loss
    loss.backward() if raw_loop else accelerator.backward(loss)
    optimizer.step()
    return model.model.layers[0].mlp.act_fn.scale.full_tensor().item()


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"tp_size": 2, "dp_shard_size": 2}], ids=["tp2", "tp2_fsdp2"])
def test_forgotten_partial_gradient_is_an_error_at_the_first_step(sizes):
    world = 2 if len(sizes) == 1 else 4
    messages = expect_error(world, one_step, sizes, False, match=r"mlp\.act_fn\.scale")
    assert all("replicated_with_grad_allreduce" in message for message in messages)


def test_raw_loop_is_audited_too():
    expect_error(2, one_step, {"tp_size": 2}, False, raw_loop=True, match="different gradients on the ranks")


def test_the_remedy_in_the_message_is_right():
    """With the plan entry that the message proposes, the step is the one of a single process."""
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = ScaledActivation()
    model(**batches_for(model, 1)[0]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    want = model.model.layers[0].mlp.act_fn.scale.item()
    got = run_distributed(2, one_step, {"tp_size": 2}, True)
    assert got == pytest.approx([want, want], rel=1e-6)


def silent_steps(name: str, adapter: dict | None) -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build(name, adapter)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    for _ in range(2):
        accelerator.backward(model(**batches_for(model, 1)[0]).loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "name, adapter",
    [("qwen3_moe", None), ("llama", {**LORA, "init_lora_weights": True}), ("gemma3", LORA)],
    ids=["moe", "default_init", "gemma3"],
)
def test_no_false_alarm(name, adapter):
    """Zero gradients of lora_A at the default initialisation, routers, head norms: all fine."""
    run_distributed(2, silent_steps, name, adapter)
