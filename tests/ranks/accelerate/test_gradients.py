"""Ways through the backward: accumulation, clipping, loops without ``Accelerator.backward``; as in one process."""

import functools
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from harness.compare import assert_gradients_equal, full_grads, full_parameters
from harness.meshes import MESHES, run_on_mesh
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from torch import nn
from torch.distributed.tensor import DTensor

from hf_automodel_parallel import AutoParallelismConfig
from ranks.accelerate.jobs import make_accelerator


def copied(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without copies, what is replicated on a rank would go on changing with the model."""
    return {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}


WAYS_MODELS = {"qwen3_full": ("qwen3", None), "llama_lora": ("llama", LORA)}
WAYS_CELLS = [("qwen3_full", "tp2"), ("llama_lora", "tp2"), ("qwen3_full", "tp2_fsdp2"), ("llama_lora", "tp2_fsdp2")]


WAYS_CELLS += [("llama_lora", "fsdp2")]


CLIP = 0.01


def gradients_by_way(sizes: dict[str, int], dp_size: int, name: str, adapter: Any) -> dict[str, dict]:
    """Gradients at the initial weights, collected in all the ways in which a script may collect them."""
    accelerator = make_accelerator(sizes)
    model = build(name, adapter)
    batches = batches_for(model, 2 * dp_size, rows=8)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=1.0))
    mine = data_rank(accelerator)

    def loss(micro: int) -> torch.Tensor:
        return model(**batches[micro * dp_size + mine], use_cache=False).loss

    ways: dict[str, dict] = {}

    def done(way: str) -> None:
        ways[way] = copied(full_grads(model))
        optimizer.zero_grad()

    accelerator.backward(loss(0))
    done("one_backward")

    accelerator.backward(loss(0))
    accelerator.backward(loss(1))
    done("several_backwards")

    accelerator.backward(loss(0) + loss(1))
    done("two_forwards_one_backward")

    with accelerator.no_sync(model):
        accelerator.backward(loss(0))
    accelerator.backward(loss(1))
    done("no_sync")

    accelerator.backward(loss(0))
    with accelerator.no_sync(model):
        accelerator.backward(loss(1))
    accelerator.backward(loss(0))
    done("no_sync_between")

    accelerator.backward(loss(0))
    optimizer.zero_grad(set_to_none=False)
    ways["zeroed_in_place"] = copied(full_grads(model))
    accelerator.backward(loss(1))
    done("after_zero_in_place")

    accelerator.backward(loss(0))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    ways["norm"] = {"norm": norm.full_tensor() if isinstance(norm, DTensor) else norm}
    done("clipped_by_torch")

    accelerator.gradient_accumulation_steps = 2
    for micro in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(loss(micro))
    done("accumulate")
    accelerator.gradient_accumulation_steps = 1

    again = Accelerator(
        parallelism_config=AutoParallelismConfig(**sizes),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, sync_each_batch=True),
    )
    again.prepare(model)
    for micro in range(2):
        with again.accumulate(model):
            again.backward(loss(micro))
    done("accumulate_sync_each_batch")

    before = copied(full_parameters(model))
    loss(0).backward()
    loss(1).backward()
    optimizer.step()
    optimizer.zero_grad()
    ways["raw_loop"] = {n: before[n] - p for n, p in full_parameters(model).items()}
    return ways


@functools.cache
def ways_of(model: str, mesh: str) -> dict[str, dict]:
    return run_on_mesh(mesh, gradients_by_way, *WAYS_MODELS[model])[0]


@functools.cache
def reference_gradients(model: str, dp_size: int) -> tuple[dict, dict]:
    """The gradients of the first and of the second micro-batch of all data-parallel ranks together."""
    reference = build(*WAYS_MODELS[model])
    batches = batches_for(reference, 2 * dp_size, rows=8)
    return loss_and_grads(reference, batches[:dp_size])[1], loss_and_grads(reference, batches[dp_size:])[1]


#: way -> how often the gradients of the two micro-batches are in the result
WAYS = {
    "one_backward": (1, 0),
    "several_backwards": (1, 1),
    "two_forwards_one_backward": (1, 1),
    "no_sync": (1, 1),
    "no_sync_between": (2, 1),
    "after_zero_in_place": (0, 1),
    "accumulate": (0.5, 0.5),
    "accumulate_sync_each_batch": (0.5, 0.5),
}
each_cell = pytest.mark.parametrize("cell", WAYS_CELLS, ids="-".join)
CORE_CELLS = ("qwen3_full-tp2", "qwen3_full-tp2_fsdp2", "llama_lora-fsdp2")


@pytest.mark.core_cases(
    *(f"{cell}-{way}" for cell in CORE_CELLS for way in WAYS)
)  # they come from one run of the ranks
@pytest.mark.parametrize("way", WAYS)
@each_cell
def test_gradients_are_right_whichever_way_they_are_collected(cell, way):
    """Partial gradients are summed exactly once, also when a script never says that a step is complete."""
    model, mesh = cell
    first, second = reference_gradients(model, MESHES[mesh][2])
    a, b = WAYS[way]
    want = {n: None if g is None else a * g + b * second[n] for n, g in first.items()}
    assert_gradients_equal(ways_of(model, mesh)[way], want)


@pytest.mark.core_cases(*CORE_CELLS)
@each_cell
def test_zero_grad_in_place_leaves_zeros(cell):
    zeroed = ways_of(*cell)["zeroed_in_place"]
    present = [g for g in zeroed.values() if g is not None]
    assert present and not any(g.any() for g in present)


@pytest.mark.core_cases(*CORE_CELLS)
@each_cell
def test_clipping_directly_with_torch(cell):
    """`torch.nn.utils.clip_grad_norm_` after `accelerator.backward` sees complete gradients."""
    model, mesh = cell
    first, _ = reference_gradients(model, MESHES[mesh][2])
    norm = nn.utils.get_total_norm([g for g in first.values() if g is not None])
    ways = ways_of(model, mesh)
    assert ways["norm"]["norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    factor = CLIP / (norm + 1e-6)
    assert_gradients_equal(ways["clipped_by_torch"], {n: None if g is None else g * factor for n, g in first.items()})


@pytest.mark.core_cases(*CORE_CELLS)
@each_cell
def test_raw_loop_without_accelerator_backward(cell):
    """`loss.backward()` and `optimizer.step()`: SGD with lr 1 subtracts exactly the gradient."""
    model, mesh = cell
    first, second = reference_gradients(model, MESHES[mesh][2])
    moved = ways_of(model, mesh)["raw_loop"]
    for name, gradient in first.items():
        want = torch.zeros_like(moved[name]) if gradient is None else gradient + second[name]
        torch.testing.assert_close(moved[name], want, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def norms_of_two(sizes: dict[str, int]) -> list[float]:
    """Gradient norms of two models of one class, each clipped on its own."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    norms = []
    models = []
    for seed in (0, 1):
        model = build("llama", num_hidden_layers=1, seed=seed)
        models.append(accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[0])
    for model in models:
        accelerator.backward(model(**batches_for(model, 1)[0], use_cache=False).loss)
    for model in models:
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
    return norms


@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_a_second_model_of_the_same_class_is_clipped(mesh):
    """Accelerate compares the lists of parameters with ``==``, which is no truth value for tensors of equal shapes."""
    want = []
    for seed in (0, 1):
        model = build("llama", num_hidden_layers=1, seed=seed)
        model(**batches_for(model, 1)[0], use_cache=False).loss.backward()
        want.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
    for norms in run_distributed(2, norms_of_two, MESHES[mesh][1]):
        assert norms == pytest.approx(want, rel=1e-5)


def clipped_under_a_scaler(part: bool) -> tuple[float, float]:
    """Norm before clipping with a gradient scaler, as mixed precision in float16 has one, and that of the gradients
    after it.
    """
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama", num_hidden_layers=1)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator.backward(model(**batches_for(model, 1)[0], use_cache=False).loss)
    chosen = list(model.parameters())[: 3 if part else None]
    norm = accelerator.clip_grad_norm_(chosen, 0.1)
    after = torch.stack([p.grad.full_tensor().norm() for p in chosen]).norm()
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item(), after.item()


@pytest.mark.core_cases("part")
@pytest.mark.parametrize("part", [False, True], ids=["all", "part"])
def test_clipping_unscales_once(part):
    model = build("llama", num_hidden_layers=1)
    model(**batches_for(model, 1)[0], use_cache=False).loss.backward()
    want = nn.utils.clip_grad_norm_(list(model.parameters())[: 3 if part else None], 0.1).item()
    for norm, after in run_distributed(2, clipped_under_a_scaler, part):
        assert (norm, after) == pytest.approx((want, 0.1), rel=1e-4)
