"""Parameters of which a part of the gradient is complete on every rank and the rest Partial: penalties in the loss,
modules that are used once more elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, full_parameters
from harness.meshes import MESHES
from harness.models import lora
from harness.pool import expect_error, run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor

from hf_automodel_parallel import AutoParallelismConfig


def penalty(model: nn.Module) -> Any:
    """Of all trainable weights, written as one has to write it for DTensors."""
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in trainable(model))
    return 0.05 * sum(p.pow(2).sum() for p in whole)


class Model(nn.Module):
    """A causal language model and what a user computes beside it."""

    def __init__(self, name: str, adapter: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.lm = build(name, adapter)

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.lm(**batch, use_cache=False).loss


class Penalised(Model):
    """Its penalty is computed where FSDP2 has gathered the parameters."""

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return super().forward(**batch) + penalty(self.lm)


class EarlyExit(Model):
    """The head reads a recorded hidden state through the final norm, too."""

    def forward(self, labels: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        output = self.lm(**batch, labels=labels, output_hidden_states=True, use_cache=False)
        logits = self.lm.lm_head(self.lm.model.norm(output.hidden_states[1]))
        return output.loss + F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class SharedNorm(Model):
    """Two layers have one norm."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        first, second = self.lm.model.layers
        second.input_layernorm = first.input_layernorm


class SharedBlock(Model):
    """Two layers have one MLP, with adapters inside: each of them takes part in both."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        first, second = self.lm.model.layers
        second.mlp = first.mlp
        self.lm = lora(self.lm, **LORA)


class Tail(nn.Module):
    """A final norm with a linear layer behind it."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.mix = norm, nn.Linear(width, width, bias=False)
        nn.init.normal_(self.mix.weight, std=width**-0.5, generator=torch.Generator().manual_seed(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.norm(x))


def with_tail() -> nn.Module:
    model = build("llama")
    model.model.norm = Tail(model.model.norm, 64)
    return lora(model, target_modules=["q_proj"]).train()


LATE = {"task_type": "CAUSAL_LM", "target_modules": ["mix", "up_proj"], "r": 4, "init_lora_weights": False}


def late_adapter() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """Parameters and gradients of an adapter that is added after `prepare` on a layer that works on shares."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, sequence_parallel=True))
    model = with_tail()
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    model.add_adapter("late", LoraConfig(**LATE))
    model.set_adapter("late")
    accelerator.backward(model(**batches_for(model, 1)[0], use_cache=False).loss)
    return full_parameters(model), full_grads(model)


def test_an_adapter_that_comes_late_outside_of_the_layers():
    parameters, gradients = run_distributed(2, late_adapter)[0]
    model = with_tail()
    model.add_adapter("late", LoraConfig(**LATE))
    model.set_adapter("late")
    model.load_state_dict(parameters, strict=False)
    model(**batches_for(model, 1)[0], use_cache=False).loss.backward()
    assert_gradients_equal(gradients, {name: p.grad for name, p in model.named_parameters()})


def late_adapter_on_the_tail() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, sequence_parallel=True))
    model = build("llama")
    model.model.norm = nn.Linear(64, 64)
    model = lora(model, target_modules=["q_proj"]).train()
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    model.add_adapter("late", LoraConfig(**LATE | {"target_modules": ["norm"]}))


def test_an_adapter_that_comes_late_around_the_last_module_on_shares_is_refused():
    expect_error(
        2, late_adapter_on_the_tail, match=r"model\.norm gathers the sequence itself.*before the model is sharded"
    )


def outside(model: Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch) + penalty(model)


def inside(model: Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch)


SEQUENCE = {"sequence_parallel": True}
CASES: dict[str, tuple[Callable[[], Model], Callable[..., torch.Tensor], str, dict[str, Any]]] = {
    "penalty_lora": (lambda: Model("llama", LORA), outside, "tp2_fsdp2", {}),
    "penalty_head_norms": (lambda: Model("qwen3"), outside, "tp2", {}),
    "penalty_sequence": (lambda: Model("llama", LORA), outside, "tp2", SEQUENCE),
    "penalty_norms_sequence": (lambda: Model("qwen3"), outside, "tp2_fsdp2", SEQUENCE),
    "penalty_in_forward": (lambda: Penalised("llama", LORA), inside, "tp2_fsdp2", {}),
    "final_norm_twice": (lambda: EarlyExit("llama"), inside, "tp2", SEQUENCE),
    "shared_norm": (lambda: SharedNorm("llama"), inside, "tp2", SEQUENCE),
    "shared_block": (lambda: SharedBlock("llama"), inside, "tp2", {}),
}


def accumulated(case: str) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Loss and gradients of two backwards, both of which complete them."""
    make, loss_of, mesh, options = CASES[case]
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**MESHES[mesh][1], **options))
    model = make().train()
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    total = 0.0
    for seed in (3, 4):
        loss = loss_of(model, batches_for(model.lm, MESHES[mesh][2], seed=seed)[data_rank(accelerator)])
        accelerator.backward(loss)
        total += accelerator.reduce(loss.detach(), "mean").item()
    return total, full_grads(model)


@pytest.mark.core_cases("penalty_lora", "shared_norm")
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_one_process(case):
    make, loss_of, mesh, _ = CASES[case]
    world, _, parts = MESHES[mesh]
    loss, gradients = run_distributed(world, accumulated, case)[0]
    model, total = make().train(), 0.0
    for seed in (3, 4):
        for batch in batches_for(model.lm, parts, seed=seed):
            want = loss_of(model, batch) / parts
            want.backward()
            total += want.item()
    assert_losses_equal(loss, total)
    assert_gradients_equal(gradients, {name: p.grad for name, p in model.named_parameters()})


def clipped_by_torch(name: str, adapter: dict[str, Any], sizes: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The norm that torch's function clips by in a loop with ``loss.backward()``, and the clipped gradients."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build(name, adapter)
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.0))
    for batch in batches_for(model, 2):
        (model(**batch, use_cache=False).loss / 2).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item(), full_grads(model)


@pytest.mark.core
def test_gradients_are_complete_after_a_backward_without_the_accelerator():
    want_model = build("llama", LORA)
    for batch in batches_for(want_model, 2):
        (want_model(**batch, use_cache=False).loss / 2).backward()
    want_norm = nn.utils.clip_grad_norm_(want_model.parameters(), 0.1).item()
    want = {name: parameter.grad for name, parameter in want_model.named_parameters()}
    for norm, gradients in run_distributed(2, clipped_by_torch, "llama", LORA, {"tp_size": 2}):
        assert_losses_equal(norm, want_norm, rtol=1e-5)
        assert_gradients_equal(gradients, want)
