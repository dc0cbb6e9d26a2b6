"""Optimizers: each trains as in one process, or is refused by name at prepare because it would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_losses_equal, full_parameters
from harness.pool import expect_error, run_distributed
from parity.jobs import _Rows, batches_for, build, data_rank, trainable
from parity.test_gradients import LORA, MESHES

from hf_automodel_parallel import AutoParallelismConfig, ConfigError

Parameters = list[torch.nn.Parameter]


class Lion(torch.optim.Optimizer):
    """A user's element-wise optimizer."""

    def __init__(self, params: Any, lr: float = 1e-4, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                p.add_(torch.tanh(100 * average), alpha=-group["lr"])  # a sign without its jump, which amplifies rounding


class TrustRatio(torch.optim.Optimizer):
    """LARS, with operators that DTensor carries over all shards."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.add_(p.grad / (p.grad.norm() + 1e-12) * p.norm(), alpha=-group["lr"])


class TrustRatioOfShards(TrustRatio):
    """LARS as written for local tensors: the norms are those of the shards."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                sharded = hasattr(p, "to_local")
                weight, gradient = (p.to_local(), p.grad.to_local()) if sharded else (p, p.grad)
                weight.add_(gradient / (gradient.norm() + 1e-12) * weight.norm(), alpha=-group["lr"])


class Closed(TrustRatio):
    """Nobody can construct a second one from its groups and defaults."""

    def __init__(self, params: Any, key: object) -> None:
        assert key == "secret"
        super().__init__(params, lr=0.1)


def matrices_and_rest(params: Parameters) -> list[dict[str, Any]]:
    """Two groups of different settings, as for weight decay."""
    return [
        {"params": [p for p in params if p.ndim > 1], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "lr": 3e-3, "weight_decay": 0.0},
    ]


def schedule_free(params: Parameters) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params, lr=1e-3, warmup_steps=2)
    optimizer.train()
    return optimizer


O = torch.optim
ACCEPTED: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "sgd": lambda p: O.SGD(p, lr=0.1),
    "nesterov": lambda p: O.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: O.Adam(p, lr=1e-3, eps=1e-4, amsgrad=True),
    "adamw_fused": lambda p: O.AdamW(p, lr=1e-3, eps=1e-4, fused=True),
    "adamw_foreach": lambda p: O.AdamW(p, lr=1e-3, eps=1e-4, foreach=True),
    "adamw_tensor_lr": lambda p: O.AdamW(p, lr=torch.tensor(1e-3), eps=1e-4),
    "adamw_groups": lambda p: O.AdamW(matrices_and_rest(p), eps=1e-4),
    "adagrad": lambda p: O.Adagrad(p, lr=1e-2, eps=1e-4),
    "adadelta": lambda p: O.Adadelta(p, lr=0.1, eps=1e-4),
    "adamax": lambda p: O.Adamax(p, lr=1e-3, eps=1e-3),
    "nadam": lambda p: O.NAdam(p, lr=1e-3, eps=1e-4),
    "radam": lambda p: O.RAdam(p, lr=1e-3, eps=1e-4),
    "rmsprop": lambda p: O.RMSprop(p, lr=1e-3, eps=1e-3, momentum=0.9, centered=True),
    "asgd": lambda p: O.ASGD(p, lr=0.05),
    "lion": lambda p: Lion(p, lr=1e-3),
    "trust_ratio": lambda p: TrustRatio(p, lr=1e-2),
    "schedule_free": schedule_free,
}

#: name -> (how it is made, what the error says)
REFUSED: dict[str, tuple[Callable[[Parameters], torch.optim.Optimizer], str]] = {
    "adafactor": (lambda p: O.Adafactor(p), "Adafactor does not work on sharded parameters.*Use an element-wise"),
    "rprop": (lambda p: O.Rprop(p), "Rprop does not work on sharded parameters"),
    "lbfgs": (lambda p: O.LBFGS(p), "LBFGS does not work on sharded parameters"),
    "sgd_fused": (lambda p: O.SGD(p, fused=True), "SGD does not work on sharded parameters"),
    "trust_ratio_of_shards": (lambda p: TrustRatioOfShards(p, lr=0.1), "TrustRatioOfShards computes something else"),
    "closed": (lambda p: Closed(p, "secret"), "Closed cannot be tried.*check_optimizer=False"),
}


def transformers_adafactor(params: Parameters) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params)


def eight_bit(params: Parameters) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params)


REFUSED["transformers_adafactor"] = (transformers_adafactor, "Adafactor does not work on sharded parameters")
REFUSED["adamw_8bit"] = (eight_bit, "AdamW8bit does not work on sharded parameters")


def five_steps(
    model: torch.nn.Module, optimizer: Any, steps: list[dict[str, torch.Tensor]], backward: Callable[..., Any]
) -> list[torch.Tensor]:
    losses = []
    for batch in steps:
        loss = model(**batch, use_cache=False).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def train_all(
    names: list[str], sizes: dict[str, int], adapter: dict[str, Any] | None, dp_size: int
) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses and parameters of five steps with each of the optimizers; and their states keep the parameters' shapes."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    result = {}
    for name in names:
        model = build("llama", adapter, num_hidden_layers=1)
        steps = [batches_for(model, dp_size, rows=4, seed=10 + step)[data_rank(accelerator)] for step in range(5)]
        model, optimizer = accelerator.prepare(model, ACCEPTED[name](trainable(model)))
        losses = torch.stack(five_steps(model, optimizer, steps, accelerator.backward))
        dist.all_reduce(losses)
        shapes = {tuple(p.shape) for p in trainable(model)} | {()}
        for state in optimizer.state_dict()["state"].values():
            assert all(tuple(v.shape) in shapes for v in state.values() if isinstance(v, torch.Tensor)), name
        result[name] = ((losses / dist.get_world_size()).tolist(), full_parameters(model))
        accelerator.free_memory()
    return result


CELLS = [
    ("tp2_fsdp2", None, list(ACCEPTED)),
    ("tp2_fsdp2", LORA, ["nesterov", "adamw_groups", "rmsprop", "trust_ratio", "schedule_free"]),
    ("tp2", None, ["nesterov", "adagrad", "trust_ratio", "schedule_free"]),
    ("tp2", LORA, ["adagrad", "lion", "nadam"]),
    ("fsdp2", None, ["nesterov", "adamax", "trust_ratio", "schedule_free"]),
    ("fsdp2", LORA, ["radam", "adamw_groups", "trust_ratio"]),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c[0]}-{'full' if c[1] is None else 'lora'}")
def test_trains_as_in_one_process(cell):
    mesh, adapter, names = cell
    world, sizes, dp_size = MESHES[mesh]
    got = run_distributed(world, train_all, names, sizes, adapter, dp_size)[0]
    for name in names:
        model = build("llama", adapter, num_hidden_layers=1)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        steps = [batches_for(model, 1, rows=4, seed=10 + step)[0] for step in range(5)]
        losses = five_steps(model, ACCEPTED[name](trainable(model)), steps, lambda loss: loss.backward())
        assert_losses_equal(got[name][0], [loss.item() for loss in losses])
        for parameter, value in model.named_parameters():
            update = (value.detach() - start[parameter]).norm()
            error = (got[name][1][parameter] - value.detach()).norm()
            assert error <= 1e-3 * update + 1e-7 * value.detach().norm(), (name, parameter, error / update)
            print(name, parameter, float(error/update))
