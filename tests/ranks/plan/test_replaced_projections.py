"""A module of the user in the place of a projection: the own plan does not fit, a derived one does."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.models import build_model
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import batches_for
from torch import nn

from hf_automodel_parallel import AutoParallelismConfig


class Gated(nn.Module):
    """A gate for each feature behind a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.gate = linear, nn.Parameter(torch.full((linear.out_features,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.gate.sigmoid()


def gated() -> Any:
    model = build_model("llama").train()
    for layer in model.model.layers:
        layer.mlp.up_proj = Gated(layer.mlp.up_proj)
    return model


def train() -> tuple[float, dict[str, Any], tuple[int, ...]]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = gated()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    loss = model(**batches_for(model, 1)[0]).loss
    accelerator.backward(loss)
    shape = tuple(model.model.layers[0].self_attn.q_proj.weight.to_local().shape)
    return mean_over_ranks(loss), full_grads(model), shape


def test_gate_in_the_place_of_a_projection():
    model = gated()
    want_loss, want = loss_and_grads(model, batches_for(model, 1))
    for loss, gradients, shape in run_distributed(2, train):
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)
        assert shape[0] * 2 == model.model.layers[0].self_attn.q_proj.out_features
