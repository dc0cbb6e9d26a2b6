"""Experts that are modules of their own: each data-parallel rank uses others, and one nobody uses has no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.models import build_model, lora, randomize
from harness.pool import run_distributed
from harness.training import batches_for, data_rank, trainable
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.strategies.registry import get_parallelization_strategy

#: For each micro-batch of each data-parallel rank: the experts it uses. Nobody uses the last one.
OTHERS = [[[0], [1]]]
UNEQUAL = [[[0, 1, 2], [1]]]
ACCUMULATED = [[[0], [1]], [[0, 2], [1]], [[2], [0]]]
SAME = [[[0], [0]]]
FOUR = [[[0], [1], [0, 2], [0]]]


class Experts(nn.Module):
    """In the place of an MLP; which experts run is said from outside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(4))
        self.chosen: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return sum((self.experts[i](hidden) for i in self.chosen), torch.zeros_like(hidden))


def mixture(adapter: bool = False) -> nn.Module:
    model = build_model("llama")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for layer in model.model.layers:
            layer.mlp = Experts(model.config.hidden_size)
            randomize(layer.mlp)
    return lora(model) if adapter else model


def choose(model: nn.Module, chosen: list[int]) -> None:
    for module in model.modules():
        if hasattr(module, "chosen"):
            module.chosen = chosen


def one_process(routes: list[list[list[int]]], adapter: bool = False) -> tuple[float, dict[str, torch.Tensor | None]]:
    model = mixture(adapter)
    batches, total = batches_for(model, len(routes) * len(routes[0]), rows=8), 0.0
    for batch, chosen in zip(batches, (chosen for step in routes for chosen in step), strict=True):
        choose(model, chosen)
        loss = model(**batch, use_cache=False).loss / len(batches)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


def through_prepare(
    sizes: dict[str, Any],
    routes: list[list[list[int]]],
    adapter: bool = False,
    each: bool = False,
    steps: int = 1,
    **options: Any,
) -> tuple[float, dict[str, torch.Tensor | None], list[str]]:
    """Loss, gradients of the last of ``steps`` equal steps, and the names of all parameters."""
    plugin = GradientAccumulationPlugin(num_steps=len(routes), sync_each_batch=each)
    config = AutoParallelismConfig(**sizes)
    accelerator = Accelerator(parallelism_config=config, gradient_accumulation_plugin=plugin, **options)
    model = mixture(adapter)
    batches = batches_for(model, len(routes) * len(routes[0]), rows=8)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.0))
    rank = data_rank(accelerator)
    for step in range(steps):
        total = torch.zeros(())
        for micro, chosen in enumerate(routes):
            choose(model, chosen[rank])
            with accelerator.accumulate(model):
                loss = model(**batches[micro * len(chosen) + rank], use_cache=False).loss
                accelerator.backward(loss)
                total += loss.detach() / len(routes)
        optimizer.step()
        if step < steps - 1:
            optimizer.zero_grad()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size(), full_grads(model), [name for name, _ in model.named_parameters()]


def through_parallelize(routes: list[list[list[int]]]) -> tuple[float, dict[str, torch.Tensor | None]]:
    """The same in a loop without an Accelerator, with as many backwards that each reduce."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp_shard_cp", "tp"))
    model = mixture()
    batches = batches_for(model, len(routes) * 2, rows=8)
    model = get_parallelization_strategy(model).parallelize(model, mesh, mp_policy=MixedPrecisionPolicy())
    total = torch.zeros(())
    for micro, chosen in enumerate(routes):
        choose(model, chosen[dist.get_rank()])
        loss = model(**batches[micro * 2 + dist.get_rank()], use_cache=False).loss / len(routes)
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / 2, full_grads(model)


def check(got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    assert_losses_equal(got[0], want[0])
    assert_gradients_equal(got[1], want[1])
    assert any(gradient is None for name, gradient in got[1].items() if "experts.3." in name)


SHARDED, HYBRID = {"dp_shard_size": 2}, {"dp_replicate_size": 2, "dp_shard_size": 2}
CASES = {
    "others": (SHARDED, OTHERS, {}),
    "unequal": (SHARDED, UNEQUAL, {}),
    "unused": (SHARDED, SAME, {}),
    "several-steps": (SHARDED, OTHERS, {"steps": 3}),
    "accumulated": (SHARDED, ACCUMULATED, {"steps": 2}),
    "each-batch": (SHARDED, ACCUMULATED, {"each": True}),
    "adapters": (SHARDED, ACCUMULATED, {"adapter": True}),
    "replicated-adapters": ({**SHARDED, "adapters_over_dp": "replicated"}, ACCUMULATED, {"adapter": True, "steps": 2}),
    "checkpointed": ({**SHARDED, "activation_checkpointing": "full"}, UNEQUAL, {}),
    "hybrid": (HYBRID, FOUR, {}),
    "tp2_fsdp2": ({"tp_size": 2, "dp_shard_size": 2}, OTHERS, {}),
}


@pytest.mark.core_cases("others", "accumulated", "tp2_fsdp2")
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_one_process(case):
    sizes, routes, options = CASES[case]
    results = run_distributed(
        4 if len(sizes) > 1 and case not in ("checkpointed", "replicated-adapters") else 2,
        through_prepare,
        sizes,
        routes,
        **options,
    )
    want = one_process(routes, options.get("adapter", False))
    for result in results:
        check(result, want)
        assert result[2] == list(want[1]), "what counts is no parameter of the model"


def float32_reduction() -> FullyShardedDataParallelPlugin:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )


@pytest.mark.parametrize("reduce", ["bf16", "float32"])
def test_accumulation_under_mixed_precision_keeps_one_dtype(reduce):
    """Reduced in float32, what was accumulated is float32, and what the last micro-batch alone used is bfloat16."""
    options = {"mixed_precision": "bf16"} if reduce == "bf16" else {"fsdp_plugin": float32_reduction()}
    _, gradients, _ = run_distributed(2, through_prepare, SHARDED, ACCUMULATED, **options)[0]
    _, want = one_process(ACCUMULATED)
    assert [name for name, g in gradients.items() if g is None] == [name for name, g in want.items() if g is None]
    for name, gradient in gradients.items():
        if gradient is not None:
            assert (gradient - want[name]).norm() < 0.05 * want[name].norm() + 1e-3, name


@pytest.mark.parametrize("routes", [UNEQUAL, ACCUMULATED], ids=["unequal", "accumulated"])
def test_a_loop_without_accelerator(routes):
    for result in run_distributed(2, through_parallelize, routes):
        check(result, one_process(routes))


def reductions() -> list[int]:
    """How often a model whose parameters all have gradients reads who used what."""
    from hf_automodel_parallel.fsdp import unused_gradients as unused_gradients

    reads = []
    original = torch.Tensor.tolist
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**SHARDED))
    model = build_model("llama")
    batch = batches_for(model, 2)[dist.get_rank()]
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    torch.Tensor.tolist = lambda tensor: reads.append(1) or original(tensor)  # type: ignore[method-assign]
    try:
        accelerator.backward(model(**batch, use_cache=False).loss)
    finally:
        torch.Tensor.tolist = original  # type: ignore[method-assign]
    assert isinstance(model, FSDPModule) and not any(isinstance(m, unused_gradients.Used) for m in model.modules())
    return reads


def test_nobody_reads_where_nothing_was_filled_in():
    assert run_distributed(2, reductions) == [[], []]
