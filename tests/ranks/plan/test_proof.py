"""A model that combines heads or features without parameters, under the plan that holds for it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.mixing import mixing_model
from harness.models import make_batches
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from hf_automodel_parallel import AutoParallelismConfig

MIXING = ["talking heads", "fake quantisation"]


def mixed_gradients() -> list[tuple[float, dict[str, torch.Tensor | None]]]:
    results = []
    for mixing in MIXING:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
        model = mixing_model(mixing)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
        loss = model(**make_batches(1, 2, 16, 128, seed=3)[0]).loss
        accelerator.backward(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        results.append((total.item() / dist.get_world_size(), full_grads(model)))
        accelerator.state._reset_state()
    return results


def test_parameter_free_mixing_computes_what_one_process_does():
    for mixing, (loss, gradients) in zip(MIXING, run_distributed(2, mixed_gradients)[0], strict=True):
        want_loss, want = loss_and_grads(mixing_model(mixing), make_batches(1, 2, 16, 128, seed=3))
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)
