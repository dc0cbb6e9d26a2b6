"""What a script does to the parameters of a prepared model, and when: it takes effect, or raises."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.models import build_model, make_batches
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.errors import PrepareError

NAME = "model.layers.0.mlp.up_proj.weight"


def prepared(sizes: dict[str, int]) -> tuple[Accelerator, torch.nn.Module, dict[str, torch.Tensor]]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build_model("llama").train()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    return accelerator, model, make_batches(1, 4, 16, 128, seed=3)[0]


def assigned(sizes: dict[str, int]) -> list[str]:
    said = []
    for value in ("full", "shard", "written"):
        accelerator, model, batch = prepared(sizes)
        accelerator.backward(model(**batch).loss)
        parameter = model.get_parameter(NAME)
        if value == "full":
            parameter.data = torch.zeros(parameter.shape)
        elif value == "shard":
            parameter.data = parameter.data.clone() * 2
        else:
            with torch.no_grad():
                parameter.copy_(parameter * 2)
            parameter.data.mul_(0.5)
        try:
            with torch.no_grad():
                model.eval()(**batch)
            said.append("nothing")
        except PrepareError as error:
            said.append(str(error))
        accelerator.state._reset_state()
    return said


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"dp_shard_size": 2}], ids=["tp2", "fsdp2"])
def test_an_assignment_to_data_raises(sizes):
    for full, shard, written in run_distributed(2, assigned, sizes):
        assert NAME in full and NAME in shard and "parameter.copy_(value)" in full
        assert written == "nothing"


def inferred_first(sizes: dict[str, int]) -> tuple[list[float], dict[str, Any]]:
    accelerator, model, batch = prepared(sizes)
    with torch.inference_mode():
        losses = [model(**batch).loss.item()]
    loss = model(**batch).loss
    accelerator.backward(loss)
    return [*losses, loss.item()], full_grads(model)


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"dp_shard_size": 2}], ids=["tp2", "fsdp2"])
def test_training_after_a_first_forward_in_inference_mode(sizes):
    want_loss, want = loss_and_grads(build_model("llama").train(), make_batches(1, 4, 16, 128, seed=3))
    for losses, gradients in run_distributed(2, inferred_first, sizes):
        assert_losses_equal(losses, [want_loss] * 2)
        assert_gradients_equal(gradients, want)


def moved() -> list[str]:
    """A model that was moved to another dtype and back, on ranks of which one has an empty shard."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2))
    model = build_model("llama")
    model.norm_of_one = torch.nn.Parameter(torch.ones(1))
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    empty = [name for name, parameter in model.named_parameters() if parameter.to_local().numel() == 0]
    model.to(torch.float64)
    model.to(torch.float32)
    model(**make_batches(1, 4, 16, 128, seed=3)[0])
    return empty


def test_a_model_that_was_moved_is_not_taken_for_assigned_data():
    assert run_distributed(2, moved) == [[], ["norm_of_one"]]
