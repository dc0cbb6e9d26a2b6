"""Plans written as torch styles: on this package's engine at parity, with adapters, labels and FSDP2; and on torch's
own.
"""

import pytest
import torch
import torch.distributed as dist
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.meshes import MESHES
from harness.models import build_model
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, first_gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_automodel_parallel.parallelizer.torch_plans import get_parallel_plan

ATTENTION, MLP = "model.layers.*.self_attn.", "model.layers.*.mlp."


def ends():
    """Vocabulary-parallel embedding; logits that stay sharded, as a DTensor."""
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }


def llama_plan():
    """What NeMo AutoModel writes for Llama, Qwen and Gemma."""
    shared = ColwiseParallel()  # one object for several entries, as its cache returned them
    columns = [ATTENTION + name for name in ("q_proj", "k_proj", "v_proj")] + [MLP + "gate_proj", MLP + "up_proj"]
    rows = {ATTENTION + "o_proj": RowwiseParallel(), MLP + "down_proj": RowwiseParallel()}
    return dict.fromkeys(columns, shared) | rows | ends()


def phi3_plan():
    """And for Phi3: attention stays whole around fused projections; gate and up are one DTensor."""
    whole = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    return {
        ATTENTION + "qkv_proj": RowwiseParallel(**whole),
        ATTENTION + "o_proj": ColwiseParallel(**whole),
        MLP + "gate_up_proj": ColwiseParallel(use_local_output=False),
        MLP + "down_proj": RowwiseParallel(),
    } | ends()


def selected(name):
    return get_parallel_plan(build(name), tp_size=2)


CELLS = {
    "llama-tp2-lora": ("llama_tied", "tp2", LORA, llama_plan),
    "llama-tp2_fsdp2-lora": ("llama", "tp2_fsdp2", LORA, llama_plan),
    "phi3-tp2-full": ("phi3", "tp2", None, phi3_plan),
    "qwen3-tp2_fsdp2-lora": ("qwen3", "tp2_fsdp2", LORA, lambda: selected("qwen3")),
    "mixtral-tp2-full": ("mixtral", "tp2", None, lambda: selected("mixtral")),
}


@pytest.mark.core_cases("llama-tp2-lora", "qwen3-tp2_fsdp2-lora")
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_equal_one_process(cell):
    name, mesh, adapter, plan = CELLS[cell]
    world, sizes, dp_size = MESHES[mesh]
    sizes = sizes | {"tp_plan": plan()}
    loss, gradients = run_distributed(world, first_gradients, name, sizes, adapter=adapter, dp_size=dp_size)[0]
    reference = build(name, adapter)
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


def on_torchs_engine(cells):
    """Loss, gradients and number of sharded parameters of each (model, sequence_parallel), by ``parallelize_module``
    alone.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = []
    for name, sequence_parallel in cells:
        model = build_model(name)
        plan = get_parallel_plan(model, sequence_parallel, tp_size=mesh.size())
        parallelize_module(model, mesh, plan)
        sharded = sum(isinstance(p, DTensor) and p.placements != (Replicate(),) for p in model.parameters())
        total = torch.zeros(())
        for batch in batches_for(model, 2):  # two backwards into the same gradients
            loss = model(**batch, use_cache=False).loss / 2
            loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
            loss.backward()
            total += loss.detach()
        results.append((total.item(), full_grads(model), sharded))
    return results


@pytest.mark.core
def test_selected_plans_are_right_on_torchs_engine_too():
    """Also the norms of heads (partial gradients), and with activations along the sequence."""
    cells = [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)]
    results = run_distributed(2, on_torchs_engine, cells)[0]
    for (name, _), (loss, gradients, sharded) in zip(cells, results, strict=True):
        reference = build_model(name)
        want_loss, want = loss_and_grads(reference, batches_for(reference, 2))
        assert sharded == 2 * 7 + 2
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)
