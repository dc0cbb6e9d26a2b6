"""Several dtypes in one model: stored, computed and reduced as in one process.

What FSDP2 does for float32 beside bfloat16 is shown exactly with float64 beside float32, where equality can be tested.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.fsdp.dtype_groups import fully_shard_by_dtype


def decayed(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A Llama MLP whose input is scaled by a parameter of the module's own, in its own dtype, as in gated delta
    nets.
    """
    self.seen = (self.A_log.dtype, self.gate_proj.weight.dtype)
    x = (x * torch.exp(-self.A_log)).to(x.dtype)
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def mixed(wide: torch.dtype, narrow: torch.dtype, adapter: Any = None, name: str = "llama") -> nn.Module:
    """A model in `narrow` with norms and a directly owned parameter per layer in `wide`."""
    model = build(name).to(narrow)
    for layer in model.model.layers:
        values = torch.linspace(-0.5, 0.5, model.config.hidden_size, dtype=wide)
        layer.mlp.A_log = nn.Parameter(values)
        layer.mlp.forward = types.MethodType(decayed, layer.mlp)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.to(wide)
            norm.register_forward_hook(lambda module, args, output: output.to(args[0].dtype))
    if adapter is not None:
        from harness.models import lora

        model = lora(model, **adapter)
    return model


def step(
    sizes: dict[str, int],
    dp_size: int,
    arguments: tuple[Any, ...],
    precision: str = "no",
    unfreeze: bool = False,
    **config: Any,
) -> tuple[float, dict[str, torch.Tensor | None], list[tuple[torch.dtype, torch.dtype]], list[Any]]:
    """Loss, gradients, dtypes that the MLPs saw in flight, and the buffers' dtypes, of one step and one under
    no_sync.
    """
    accelerator = Accelerator(
        parallelism_config=AutoParallelismConfig(**sizes, **config),
        mixed_precision=precision,
        gradient_accumulation_steps=2,
    )
    model = mixed(*arguments)
    if unfreeze:
        model.requires_grad_(True)
    buffers = [b.dtype for b in model.buffers()]
    names = list(model.state_dict())
    batches = batches_for(model, dp_size * 2, rows=8)
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    assert list(model.state_dict()) == names, "a name changed"
    assert [b.dtype for b in model.buffers()] == buffers
    total = torch.zeros(())
    for micro in range(2):
        with accelerator.accumulate(model):
            loss = model(**batches[micro * dp_size + data_rank(accelerator)], use_cache=False).loss
            accelerator.backward(loss)
            total += loss.detach() / 2
    dist.all_reduce(total)
    seen = [m.seen for m in model.modules() if hasattr(m, "seen")]
    return total.item() / dist.get_world_size(), full_grads(model), seen, [p.dtype for p in model.parameters()]


EXACT = [
    ("fsdp2", {}, None),
    ("tp2", {}, None),
    ("tp2_fsdp2", {}, None),
    ("hsdp", {}, None),
    ("tp2_fsdp2", {"activation_checkpointing": "full"}, None),
    ("tp2_fsdp2", {"activation_checkpointing": "submodule"}, None),
    ("fsdp2", {"compile": "aot_eager"}, None),
    ("tp2_fsdp2", {"reshard_after_forward": False}, None),
    ("tp2_fsdp2", {}, LORA),
    ("fsdp2", {}, LORA),
]


@pytest.mark.core_cases("fsdp2-full", "tp2-full", "tp2_fsdp2-lora")
@pytest.mark.parametrize(
    "cell", EXACT, ids=lambda c: "-".join(map(str, (c[0], *c[1].values(), "lora" if c[2] else "full")))
)
def test_float64_among_float32(cell):
    mesh, config, adapter = cell
    world, sizes, dp_size = MESHES[mesh]
    arguments = (torch.float64, torch.float32, adapter)
    loss, gradients, seen, _ = run_distributed(world, step, sizes, dp_size, arguments, **config)[0]
    reference = mixed(*arguments)
    want_loss, want = loss_and_grads(reference, batches_for(reference, 2 * dp_size, rows=8))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    assert set(seen) == {(torch.float64, torch.float32)} or "compile" in config


def test_tied_ends_and_everything_trainable_beside_adapters():
    """Trainable base weights of two dtypes and adapters in a unit; the tied ends are one unit."""
    world, sizes, dp_size = MESHES["tp2_fsdp2"]
    arguments = (torch.float64, torch.float32, LORA, "llama_tied")
    loss, gradients, _, _ = run_distributed(world, step, sizes, dp_size, arguments, unfreeze=True)[0]
    reference = mixed(*arguments)
    reference.requires_grad_(True)
    want_loss, want = loss_and_grads(reference, batches_for(reference, 2 * dp_size, rows=8))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


@pytest.mark.core_cases("full-bf16")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_float32_among_bfloat16(precision, adapter):
    """What is float32 computes in float32; gradients have the dtype of the stored parameters, and bfloat16's
    accuracy.
    """
    world, sizes, dp_size = MESHES["tp2_fsdp2"]
    arguments = (torch.float32, torch.bfloat16, adapter)
    loss, gradients, seen, stored = run_distributed(world, step, sizes, dp_size, arguments, precision=precision)[0]
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    exact = mixed(*arguments).float()
    want_loss, want = loss_and_grads(exact, batches_for(exact, 2 * dp_size, rows=8))
    assert loss == pytest.approx(want_loss, rel=2e-2)
    names = {n: p for n, p in mixed(*arguments).named_parameters()}
    for (name, gradient), dtype in zip(gradients.items(), stored, strict=True):
        assert (gradient is None) == (want[name] is None), name
        # Trainable parameters are upcast under mixed precision, as Accelerate does; nothing else changes its dtype.
        assert dtype == (torch.float32 if precision == "bf16" and names[name].requires_grad else names[name].dtype), (
            name
        )
        if gradient is not None:
            assert gradient.dtype == dtype
            assert (gradient.float() - want[name]).norm() <= 0.1 * want[name].norm(), name


def compute_dtypes(policy: Any, listed: list[str]) -> list[tuple[torch.dtype, torch.dtype]]:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2), fsdp_plugin=plugin)
    model = mixed(torch.float32, torch.float32)
    model._keep_in_fp32_modules_strict = set(listed)
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    accelerator.backward(model(**batches_for(model, 1)[0], use_cache=False).loss)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    return [m.seen for m in model.modules() if hasattr(m, "seen")]


@pytest.mark.parametrize("listed", [[], ["A_log"]])
def test_policy_of_the_user_and_names_that_the_model_keeps_in_float32(listed):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen = run_distributed(2, compute_dtypes, policy, listed)[0]
    assert set(seen) == {(torch.float32 if listed else torch.bfloat16, torch.bfloat16)}


class Mixed(nn.Module):
    """Owns parameters of two dtypes directly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(6, 4))
        self.b = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.inner = nn.Linear(4, 4).double()
        self.shared = self.inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner((x @ self.a).double() * self.b)


def by_dtype() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 6)
    reference, module = Mixed(), Mixed()
    for part in x:
        (reference(part).square().sum() / 2).backward()
    mesh = dist.init_device_mesh("cpu", (2,))
    assert fully_shard_by_dtype(module, mesh, reshard_after_forward=True) is module
    module(x[dist.get_rank()]).square().sum().backward()
    want = {n: p.grad for n, p in reference.named_parameters()}
    return full_grads(module), want, sum(isinstance(m, FSDPModule) for m in module.modules())


def test_fully_shard_by_dtype_on_a_plain_module():
    gradients, want, groups = run_distributed(2, by_dtype)[0]
    assert_gradients_equal(gradients, want)
    assert groups == 2
