"""The optimizer keeps its groups, options and state when ``prepare`` gives it the sharded parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from harness.compare import (
    assert_same_tensors,
    full_parameters,
    normalize_name,
)
from harness.meshes import MESHES, run_on_mesh
from harness.pool import expect_error
from harness.training import batches_for, build, data_rank
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ranks.accelerate.jobs import make_accelerator

# eps this large keeps Adam's division from amplifying the rounding of gradients that are nearly zero.
ADAM = {"lr": 1e-2, "eps": 1e-3}


def optimizer_two_groups(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1, "name": "matrices"},
        {"params": vectors, "lr": 3e-3, "betas": (0.5, 0.9), "weight_decay": 0.0, "name": "vectors"},
    ]
    return torch.optim.AdamW(groups, **ADAM)


def optimizer_frozen_parameters(model: nn.Module) -> torch.optim.Optimizer:
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(False)
    return torch.optim.AdamW(model.parameters(), weight_decay=0.1, **ADAM)


def optimizer_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **ADAM)


def optimizer_adagrad(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=1e-2, initial_accumulator_value=0.1)


def optimizer_momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


class Scenario(NamedTuple):
    """An optimizer that may have stepped before prepare, or be created after it, in a loop that may evaluate in
    between.
    """

    make: Callable[[nn.Module], torch.optim.Optimizer]
    steps_before: int = 0
    created_after_prepare: bool = False
    evaluates: bool = False


OPTIMIZERS = {
    "two_groups": Scenario(optimizer_two_groups),
    "frozen_parameters": Scenario(optimizer_frozen_parameters),
    "created_after_prepare": Scenario(optimizer_two_groups, created_after_prepare=True),
    "created_after_evaluation": Scenario(optimizer_two_groups, created_after_prepare=True, evaluates=True),
    "evaluates_between_backward_and_step": Scenario(optimizer_two_groups, evaluates=True),
    "adamw_has_stepped": Scenario(optimizer_adamw, steps_before=1),
    "two_groups_have_stepped": Scenario(optimizer_two_groups, steps_before=1),
    "momentum_has_stepped": Scenario(optimizer_momentum, steps_before=1),
    "adagrad_state_of_its_constructor": Scenario(optimizer_adagrad),
    "adagrad_state_after_evaluation": Scenario(optimizer_adagrad, created_after_prepare=True, evaluates=True),
    "adagrad_has_stepped": Scenario(optimizer_adagrad, steps_before=1),
}
PARALLEL_STEPS = 2


def groups_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Hyper-parameters and parameter names of each group."""
    names = {id(p): normalize_name(n) for n, p in model.named_parameters()}
    return [group | {"params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def whole_batch_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict]) -> None:
    for batch in batches:
        (model(**batch, use_cache=False).loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def evaluate(model: nn.Module, batch: dict[str, torch.Tensor], really: bool) -> None:
    """A forward without a backward: FSDP2 frees only some of what it gathers for it."""
    if really:
        model.eval()
        with torch.no_grad():
            model(**batch, use_cache=False)
        model.train()


def parameters_after_steps(
    sizes: dict[str, int] | None, dp_size: int, scenario: str
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Parameters and optimizer groups; `sizes` is None in one process."""
    make, before, late, evaluates = OPTIMIZERS[scenario]
    model = build("qwen3")
    steps = [batches_for(model, dp_size, seed=20 + step) for step in range(before + PARALLEL_STEPS)]
    optimizer = None if late else make(model)
    for batches in steps[:before]:
        whole_batch_step(model, optimizer, batches)
    if sizes is None:
        optimizer = make(model) if late else optimizer
        for batches in steps[before:]:
            whole_batch_step(model, optimizer, batches)
    else:
        accelerator = make_accelerator(sizes)
        if late:
            model = accelerator.prepare(model)
            evaluate(model, steps[0][0], evaluates)
            optimizer = accelerator.prepare(make(model))
        else:
            model, optimizer = accelerator.prepare(model, optimizer)
        for batches in steps[before:]:
            accelerator.backward(model(**batches[data_rank(accelerator)], use_cache=False).loss)
            evaluate(model, batches[0], evaluates)
            optimizer.step()
            optimizer.zero_grad()
        evaluate(model, steps[0][0], evaluates)
        model.zero_grad()
        accelerator.free_memory()
        for unit in [m for m in model.modules() if isinstance(m, FSDPModule)]:
            unit.reshard()  # an evaluation leaves some units gathered
    return full_parameters(model), groups_of(optimizer, model)


@pytest.mark.core_cases("tp2-two_groups", "tp2_fsdp2-adamw_has_stepped")
@pytest.mark.parametrize("scenario", OPTIMIZERS)
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_optimizer_is_the_same_after_prepare(mesh, scenario):
    """Groups, hyper-parameters and existing state survive: the next steps are those of one process.

    An evaluation changes nothing, though FSDP2 leaves the last units gathered after it: an optimizer created then does
    not hold what the model shows at that moment, and a step makes what is gathered stale.
    """
    got, got_groups = run_on_mesh(mesh, parameters_after_steps, scenario)[0]
    want, want_groups = parameters_after_steps(None, MESHES[mesh][2], scenario)
    assert got_groups == want_groups
    assert_same_tensors(got, {n: p.detach() for n, p in want.items()}, rtol=1e-4, atol=2e-6)


def prepare_with_stepped_adafactor(sizes: dict[str, int], dp_size: int) -> None:
    model = build("llama")
    optimizer = torch.optim.Adafactor(model.parameters())
    whole_batch_step(model, optimizer, batches_for(model, 1))
    make_accelerator(sizes).prepare(model, optimizer)


@pytest.mark.core
def test_existing_state_that_cannot_be_sharded_is_refused():
    """Factored state has another shape than its parameter: kept whole beside a shard it would be wrong."""
    expect_error(2, prepare_with_stepped_adafactor, {"dp_shard_size": 2}, 2, match="Adafactor.*state")
