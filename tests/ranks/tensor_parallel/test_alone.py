"""Tensor parallelism alone costs nothing of FSDP2; the way of a gradient from a shard to its DTensor; clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.collectives import CollectiveCounter
from harness.meshes import MESHES
from harness.models import LORA_7
from harness.pool import run_distributed
from harness.training import batches_for, build, full_grads, trainable
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.errors import UnsupportedError
from hf_automodel_parallel.fsdp.shard import fsdp_units


def prepared(accelerator: Accelerator) -> tuple[torch.nn.Module, Any, dict[str, torch.Tensor]]:
    model = build("llama", num_hidden_layers=2)
    batch = batches_for(model, 1)[0]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return model, optimizer, batch


def whole_step() -> dict[str, Any]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model, optimizer, batch = prepared(accelerator)

    def step() -> None:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch, use_cache=False).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    step()  # the audit of the first step
    with CollectiveCounter() as counter:
        step()
    tp = accelerator.torch_device_mesh["tp"]
    hooks = [h for m in model.modules() for h in [*m._forward_pre_hooks.values(), *m._forward_hooks.values()]]
    public = [name for name in vars(FSDPModule) if not name.startswith("_")]
    own = [name for name in public if getattr(type(model), name) is getattr(FSDPModule, name)]
    model.unshard(async_op=True).wait()
    model.set_requires_gradient_sync(False)
    refused = []
    for name, value in (("set_gradient_divide_factor", 2.0), ("set_all_reduce_hook", print)):
        try:
            getattr(model, name)(value)
        except UnsupportedError as error:
            refused.append(str(error).partition("(")[0])
    return {
        "refused": refused,
        "groups": len(counter.counts.by_ranks),
        "elsewhere": counter.counts.total - counter.counts.on(tp),
        "hooks": [str(h) for h in hooks if "distributed.fsdp" in str(getattr(h, "__module__", ""))],
        "units": len(fsdp_units(model)),
        "module": isinstance(model, FSDPModule),
        "name": type(model).__name__,
        "not_overridden": own,
        "moved": next(model.to("cpu").parameters()).device.type,
    }


@pytest.mark.core
def test_no_hook_and_no_collective_of_fsdp2():
    for result in run_distributed(2, whole_step):
        assert result["elsewhere"] == {} and result["groups"] == 1, result
        assert result["hooks"] == [] and result["units"] == 0 and result["not_overridden"] == [], result
        assert result["refused"] == ["set_gradient_divide_factor", "set_all_reduce_hook"]
        assert result["module"] and result["name"] == "LlamaForCausalLM" and result["moved"] == "cpu", result


def units_where_fsdp2_casts_or_offloads() -> list[int]:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_offload=CPUOffloadPolicy(pin_memory=False), cpu_ram_efficient_loading=False
    )
    sums = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        cpu_ram_efficient_loading=False,
    )
    counts = []
    for options in ({"mixed_precision": "bf16"}, {"fsdp_plugin": plugin}, {"fsdp_plugin": sums}):
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2), **options)
        counts.append(len(fsdp_units(prepared(accelerator)[0])))
        AcceleratorState._reset_state()
    return counts


def test_fsdp2_stays_for_its_casts_its_sums_and_its_offload():
    for counts in run_distributed(2, units_where_fsdp2_casts_or_offloads):
        assert all(counts)


def gradients() -> dict[str, Any]:
    """Gradients of one backward, and by other ways that have to give the same."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model, _, batch = prepared(accelerator)
    loss = model(**batch, use_cache=False).loss
    loss.backward(retain_graph=True)
    once = full_grads(model)
    loss.backward(retain_graph=True)
    twice = full_grads(model)
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward(retain_graph=True)
    again = full_grads(model)
    weight = model.model.layers[0].mlp.down_proj.weight
    kept = weight.grad
    for parameter in model.parameters():
        parameter.grad.zero_()
    loss.backward()
    into = full_grads(model)
    seen = []
    handle = weight.register_hook(lambda gradient: seen.append(gradient.full_tensor()) or 2 * gradient)
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    doubled = weight.grad.full_tensor()
    handle.remove()
    model.zero_grad()
    partial = ""
    lora = build("llama", {"target_modules": LORA_7}, num_hidden_layers=1)
    lora, _ = accelerator.prepare(lora, torch.optim.SGD(trainable(lora), lr=0.1))
    lora.base_model.model.model.layers[0].mlp.gate_proj.lora_A.default.weight.register_hook(lambda gradient: None)
    try:
        lora(**batch, use_cache=False)
    except UnsupportedError as error:
        partial = str(error)
    refused = ""
    try:
        model(**batch, use_cache=False).loss.backward(create_graph=True)
    except UnsupportedError as error:
        refused = str(error)
    name = "model.layers.0.mlp.down_proj.weight"
    return {
        "twice": all(torch.allclose(twice[n], 2 * g, rtol=1e-5, atol=1e-8) for n, g in once.items()),
        "again": all(torch.equal(again[n], g) for n, g in once.items()),
        "into": all(torch.equal(into[n], g) for n, g in once.items()),
        "in_place": isinstance(kept, DTensor) and torch.equal(kept.full_tensor(), once[name]),
        "hook": torch.equal(seen[0], once[name]) and torch.equal(doubled, 2 * once[name]),
        "partial": "would see this rank's part" in partial,
        "refused": "create_graph" in refused,
    }


def test_a_gradient_takes_the_way_of_any_gradient():
    """Accumulated, dropped between two backwards, written over, seen and changed by a hook; never cut off silently."""
    for result in run_distributed(2, gradients):
        assert all(result.values()), result


def clipping(sizes: dict[str, int]) -> tuple[dict[str, int], float, float]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model, _, batch = prepared(accelerator)
    accelerator.backward(model(**batch, use_cache=False).loss)
    want = torch.nn.utils.get_total_norm(list(full_grads(model).values())).item()
    with CollectiveCounter() as counter:
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
    return dict(counter.counts.total), norm.item() / want, accelerator.clip_grad_norm_(model.parameters(), 9.0).item()


@pytest.mark.parametrize(("mesh", "axes"), [("tp2", 1), ("fsdp2", 1), ("tp2_fsdp2", 2)])
def test_clipping_reduces_one_norm_for_each_axis(mesh, axes):
    for counts, ratio, clipped in run_distributed(MESHES[mesh][0], clipping, MESHES[mesh][1]):
        assert counts == {"all_reduce": axes}
        assert ratio == pytest.approx(1, rel=1e-5) and clipped == pytest.approx(0.1, rel=1e-4)
