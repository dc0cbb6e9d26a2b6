"""Strategies that scripts register: with a flow of their own, composed of the default, one that shards nothing."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import expect_error, run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from torch import nn
from torch.distributed.fsdp import FSDPModule
from unit.strategies.test_registry import Bare, Forgetful, forget

from hf_automodel_parallel import (
    AutoParallelismConfig,
    DefaultParallelizationStrategy,
    ParallelizationStrategy,
    register_parallel_strategy,
)


def one_step(sizes: dict[str, int], dp_size: int, strategy: type, adapter: Any = None, **fields: Any) -> Any:
    register_parallel_strategy(name="LlamaForCausalLM")(strategy)
    try:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **fields))
        model = build("llama", adapter)
        batch = batches_for(model, dp_size)[data_rank(accelerator)]
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        gradients = full_grads(model)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        return mean_over_ranks(loss), gradients, units, list(Bare.calls)
    finally:
        Bare.calls.clear()
        forget()


def test_a_strategy_with_a_flow_of_its_own():
    loss, gradients, units, calls = run_distributed(2, one_step, {"dp_shard_size": 2}, 2, Bare)[0]
    want_loss, want = loss_and_grads(build("llama"), batches_for(build("llama"), 2))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    assert units == ["", "model.layers.0", "model.layers.1"]  # by default the ends are units, too
    (call,) = calls
    assert call["sequence_parallel"] is False and call["tp_mesh_name"] == "tp" and call["offload_policy"] is None


class Composed(ParallelizationStrategy):
    """Calls the default flow from its own, as code written for the reference API does."""

    def parallelize(self, model: nn.Module, device_mesh: Any, **kwargs: Any) -> nn.Module:
        return DefaultParallelizationStrategy().parallelize(model, device_mesh, **kwargs)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_strategy_composed_of_the_default(adapter):
    world, sizes, dp_size = MESHES["tp2_fsdp2"]
    fields = {"activation_checkpointing": "submodule"}
    loss, gradients, *_ = run_distributed(world, one_step, sizes, dp_size, Composed, adapter, **fields)[0]
    reference = build("llama", adapter)
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


@pytest.mark.core
def test_a_strategy_that_shards_nothing_is_refused():
    expect_error(
        2,
        one_step,
        {"dp_shard_size": 2},
        2,
        Forgetful,
        match="Forgetful.parallelize returned a LlamaForCausalLM that FSDP2",
    )
