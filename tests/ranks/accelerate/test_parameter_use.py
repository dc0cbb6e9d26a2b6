"""What a script does to the parameters of a prepared model, and when: it takes effect, or raises."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.models import build_model, make_batches
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from hf_automodel_parallel import AutoParallelismConfig, full_parameter
from hf_automodel_parallel.audit.first_step import GradientAuditError
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


def embedding_first(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    embedded = model.get_input_embeddings()(batch["input_ids"])
    return model(inputs_embeds=embedded * 1.5, labels=batch["labels"]).loss


def decoder_and_head(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
    return model.lm_head(hidden).square().mean()


def soft_tokens(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    table = full_parameter(model.get_input_embeddings().weight)
    return (model(input_ids=batch["input_ids"]).logits.softmax(-1) @ table).square().mean()


WAYS = (embedding_first, decoder_and_head, soft_tokens)


def by_parts(sizes: dict[str, int]) -> list[tuple[float, dict[str, Any]]]:
    results = []
    for way in WAYS:
        accelerator, model, batch = prepared(sizes)
        if "dp_shard_size" in sizes:
            batch = {name: rows.chunk(2)[dist.get_rank()] for name, rows in batch.items()}
        loss = way(model, batch)
        accelerator.backward(loss)
        results.append((mean_over_ranks(loss.detach()), full_grads(model)))
        accelerator.state._reset_state()
    return results


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"dp_shard_size": 2}], ids=["tp2", "fsdp2"])
def test_losses_of_parts_of_the_model(sizes):
    """A script calls parts of the model first, or alone, or reads a full weight in a loss that depends on the data."""
    got = run_distributed(2, by_parts, sizes)
    for index, way in enumerate(WAYS):
        model = build_model("llama").train()
        loss = way(model, make_batches(1, 4, 16, 128, seed=3)[0])
        loss.backward()
        want = {name: parameter.grad for name, parameter in model.named_parameters()}
        for results in got:
            assert_losses_equal(results[index][0], loss.item())
            assert_gradients_equal(results[index][1], want)


def stepping_hook() -> str:
    accelerator, model, batch = prepared({"tp_size": 2})
    model.get_parameter(NAME).register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    try:
        accelerator.backward(model(**batch).loss)
    except GradientAuditError as error:
        return str(error)
    return "nothing"


def test_a_hook_that_takes_the_step_itself_is_refused_before_the_first_one():
    for said in run_distributed(2, stepping_hook):
        assert NAME in said and "before gradients are complete over the tp axis" in said


def with_code_of_its_own() -> torch.nn.Module:
    """An MLP that checkpoints itself, and one with a parametrization that each read in training mode moves on."""
    model = build_model("llama").train()
    first, second = (layer.mlp for layer in model.model.layers[:2])
    original = type(first).forward

    class Recomputed(type(first)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(original, self, x, use_reentrant=False)

    first.__class__ = Recomputed
    torch.manual_seed(3)
    spectral_norm(second.down_proj)
    return model


def own_code() -> tuple[float, dict[str, Any]]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = with_code_of_its_own()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    loss = model(**make_batches(1, 4, 16, 128, seed=3)[0]).loss
    accelerator.backward(loss)
    return loss.item(), full_grads(model)


def test_checkpoints_inside_of_layers_and_weights_that_change_as_they_are_read():
    want_loss, want = loss_and_grads(with_code_of_its_own(), make_batches(1, 4, 16, 128, seed=3))
    for loss, gradients in run_distributed(2, own_code):
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)
