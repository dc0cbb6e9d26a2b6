"""A model that combines heads or features without parameters, under the plan that holds for it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.mixing import mixing_model
from harness.models import build_model, make_batches
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.accelerate_plugin.prepared import prepared

MIXING = ["talking heads", "fake quantisation"]


def mixed_gradients() -> list[tuple[float, dict[str, torch.Tensor | None]]]:
    results = []
    for mixing in MIXING:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
        model = mixing_model(mixing)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
        loss = model(**make_batches(1, 2, 16, 128, seed=3)[0]).loss
        accelerator.backward(loss)
        results.append((mean_over_ranks(loss), full_grads(model)))
        accelerator.state._reset_state()
    return results


def test_parameter_free_mixing_computes_what_one_process_does():
    for mixing, (loss, gradients) in zip(MIXING, run_distributed(2, mixed_gradients)[0], strict=True):
        want_loss, want = loss_and_grads(mixing_model(mixing), make_batches(1, 2, 16, 128, seed=3))
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)


class Communicating(torch.nn.Module):
    """Code of a user that runs a collective of its own."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Communicating.calls += 1
        dist.all_reduce(torch.ones(()))
        return torch.nn.functional.silu(x)


def communicating_model() -> tuple[int, list[str]]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build_model("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.act_fn = Communicating()
    Communicating.calls = 0
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    calls = Communicating.calls
    model(**make_batches(1, 2, 16, 128, seed=3)[0])
    return calls, list(prepared(model).context.plan.notes)


def test_a_trial_runs_no_collective_of_the_model():
    for calls, notes in run_distributed(2, communicating_model):
        assert any("not tried by values" in note and "collective of its own" in note for note in notes), (calls, notes)
