"""A derived plan of a model with nn.Linear subclasses of its own."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import batches_for, build
from unit.plan.test_linear_check import NormedActivation

from hf_automodel_parallel import AutoParallelismConfig


def gradients_with_replaced_activations(parallel: bool) -> tuple[float, dict[str, torch.Tensor | None], bool]:
    model = build("gpt2").eval()
    for layer in model.transformer.h:
        layer.mlp.act = NormedActivation()
    batch = batches_for(model, 1)[0]
    if not parallel:
        return *loss_and_grads(model, [batch]), False
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = model.eval()(**batch).loss
    accelerator.backward(loss)
    sharded = not model.transformer.h[0].attn.c_proj.weight.placements[-1].is_replicate()
    return loss.item(), full_grads(model), sharded


def test_a_derived_plan_of_a_model_whose_modules_were_replaced():
    """It is proven for what the class builds; here the activation reads all features of its input."""
    loss, gradients, sharded = run_distributed(2, gradients_with_replaced_activations, True)[0]
    want_loss, want, _ = gradients_with_replaced_activations(False)
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    assert sharded  # the rest of the plan is used
