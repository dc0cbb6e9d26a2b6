"""`unshard_fsdp2_model`: log-probabilities of several forwards from parameters that are gathered once, and memory back
after.
"""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.collectives import CollectiveCounter
from harness.models import build_model, lora, make_batches
from harness.pool import run_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.fsdp.shard import unshard_fsdp2_model


def log_probabilities(model, batch):
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return torch.gather(logits.log_softmax(-1), 2, batch["input_ids"].unsqueeze(-1)).squeeze(-1)


def held_bytes(model):
    """Bytes of the parameters that this rank shows now."""
    shown = {id(p): p for p in model.parameters()}.values()
    return sum((p.to_local() if hasattr(p, "to_local") else p).untyped_storage().size() for p in shown)


class Stop(Exception):
    pass


def prepared(sizes, dtype):
    model = lora(build_model("qwen3").to(dtype), target_modules=["q_proj", "down_proj"])
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model, _ = accelerator.prepare(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    return accelerator, model


def inside(sizes, dtype):
    """Bfloat16 with float32 adapters makes units with companions."""
    accelerator, model = prepared(sizes, dtype)
    batch = make_batches(1, 2, 8, 128, 3)[0]
    before = held_bytes(model)
    ranks = tuple(dist.get_process_group_ranks(accelerator.torch_device_mesh["dp_shard"].get_group()))
    settings = [g.post_forward_mesh_info for m in model.modules() if isinstance(m, FSDPModule) for g in groups(m)]
    with CollectiveCounter() as counter, unshard_fsdp2_model(model):
        gathers = counter.counts.by_ranks[ranks]
        gathered, first = held_bytes(model), gathers["all_gather"]
        values = [log_probabilities(model, batch) for _ in range(2)]
        later, again = held_bytes(model), gathers["all_gather"] - first
    after = held_bytes(model)
    freed = []
    layers = model.get_base_model().model.layers
    handle = layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Stop()))
    for forward in (True, False):
        with pytest.raises(Stop), unshard_fsdp2_model(model):
            if forward:  # in the middle of it
                log_probabilities(model, batch)
            raise Stop
        freed.append(held_bytes(model))
    handle.remove()
    unshard = type(layers[1]).unshard
    type(layers[1]).unshard = lambda unit, *a: (_ for _ in ()).throw(Stop()) if unit is layers[1] else unshard(unit, *a)
    try:
        with pytest.raises(Stop), unshard_fsdp2_model(model):
            raise AssertionError("not reached")
    finally:
        type(layers[1]).unshard = unshard
    freed.append(held_bytes(model))
    kept = settings == [
        g.post_forward_mesh_info for m in model.modules() if isinstance(m, FSDPModule) for g in groups(m)
    ]
    loss = model(**batch, use_cache=False).loss  # training goes on
    accelerator.backward(loss)
    return {
        "values": values,
        "bytes": (before, gathered, later, after, *freed),
        "again": (first > 0, again),
        "kept": kept,
        "trains": all(p.grad is not None for p in model.parameters() if p.requires_grad),
        "loss": loss.item(),
    }


def groups(unit):
    return unit._get_fsdp_state()._fsdp_param_groups


@pytest.mark.core_cases("fsdp2")
@pytest.mark.parametrize(
    "world, sizes, dtype",
    [(2, {"dp_shard_size": 2}, torch.float32), (4, {"tp_size": 2, "dp_shard_size": 2}, torch.bfloat16)],
    ids=["fsdp2", "tp2_fsdp2-bfloat16"],
)
def test_values_of_one_process_and_memory_back(world, sizes, dtype):
    result = run_distributed(world, inside, sizes, dtype)[0]
    reference = lora(build_model("qwen3").to(dtype), target_modules=["q_proj", "down_proj"])
    batch = make_batches(1, 2, 8, 128, 3)[0]
    want = log_probabilities(reference, batch)
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    for value in result["values"]:
        torch.testing.assert_close(value, want, atol=tolerance, rtol=0)
    before, gathered, later, *after = result["bytes"]
    assert later == gathered > 1.5 * before
    assert after == [before] * 4
    assert result["again"] == (True, 0), "parameters were gathered again in the second forward"
    assert result["kept"] and result["trains"]
    assert abs(result["loss"] - reference(**batch).loss.item()) <= tolerance


def plain_units(_):
    """Units made by torch's own `fully_shard`, whose root decides by itself when it is freed."""
    model = build_model("llama")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = make_batches(1, 2, 8, 128, 3)[0]
    before = held_bytes(model)
    with unshard_fsdp2_model(model):
        values = log_probabilities(model, batch)
    after = held_bytes(model)
    log_probabilities(model, batch)
    root_kept = held_bytes(model)
    return values, before, after, root_kept


def test_units_of_torch():
    values, before, after, root_kept = run_distributed(2, plain_units, None)[0]
    torch.testing.assert_close(values, log_probabilities(build_model("llama"), make_batches(1, 2, 8, 128, 3)[0]))
    assert after == before < root_kept


@pytest.mark.core
def test_a_model_without_units_is_left_alone():
    model = build_model("llama")
    names = {name: p for name, p in model.named_parameters()}
    with unshard_fsdp2_model(model):
        assert all(p is names[name] for name, p in model.named_parameters())
