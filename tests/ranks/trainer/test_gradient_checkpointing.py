"""The Trainer's own ``gradient_checkpointing`` option."""

from typing import Any

import pytest
import torch
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.meshes import run_on_mesh
from harness.oracle import loss_and_grads
from harness.training import LORA, build
from torch import nn
from transformers import (
    TrainerCallback,
)

from ranks.trainer.jobs import InOrder, Rows, arguments, losses_of


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor | None] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients = full_grads(model)


class CountForwards:
    """Forwards of a decoder layer's MLP: the recomputation must really happen."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        inner = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
        inner.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.count += 1


def checkpointed_gradients(
    sizes: dict[str, int], dp_size: int, name: str, adapter: Any, reentrant: bool, directory: str
) -> tuple[float, dict[str, torch.Tensor | None], int]:
    model = build(name, adapter)
    counter, keep = CountForwards(model), KeepGradients()
    args = arguments(
        directory,
        sizes,
        dp_size,
        max_steps=1,
        max_grad_norm=0.0,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    trainer = InOrder(model, args, train_dataset=Rows(4, 128, seed=40), callbacks=[keep])
    trainer.train()
    return losses_of(trainer)[0], keep.gradients, counter.count


@pytest.mark.core_cases("tp2-full-non_reentrant", "tp2_fsdp2-lora-reentrant")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("name, adapter", [("qwen3", None), ("llama", LORA)], ids=["full", "lora"])
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_gradient_checkpointing_of_the_trainer(mesh, name, adapter, reentrant, tmp_path):
    """The recomputed forward enters the same regions, and partial gradients are still summed once."""
    loss, gradients, forwards = run_on_mesh(mesh, checkpointed_gradients, name, adapter, reentrant, str(tmp_path))[0]
    reference = build(name, adapter)
    want_loss, want = loss_and_grads(reference, [Rows(4, 128, seed=40).batch()])
    assert forwards == 2
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
