"""What a script may expect of `Accelerator` and `Trainer`, kept on every mesh: schedulers, metrics, accumulation,
saving.
"""

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, full_parameters, normalize_name
from harness.meshes import MESHES, each_mesh, run_on_mesh
from harness.models import build_model, make_batches
from harness.oracle import loss_and_grads, train_steps
from harness.pool import expect_error, run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_automodel_parallel import AutoParallelismConfig

#: name -> (world size, size fields, number of data-parallel ranks)


def make_accelerator(sizes: dict[str, int], **options: Any) -> Accelerator:
    return Accelerator(parallelism_config=AutoParallelismConfig(**sizes), **options)


def copied(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without copies, what is replicated on a rank would go on changing with the model."""
    return {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}


def assert_same_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# ---- learning rates ------------------------------------------------------------------------------------------------

#: name -> (steps of accumulation, split_batches, one-cycle instead of linear)
RATES = {
    "plain": (1, False, False),
    "accumulation": (3, False, False),
    "split_batches": (1, True, False),
    "split_batches_accumulation": (2, True, False),
    "one_cycle": (1, False, True),
}
MICRO_STEPS = 8
CYCLE = 7  # not a multiple of the ranks, and fewer than what they would advance


def make_schedule(optimizer: torch.optim.Optimizer, one_cycle: bool) -> Any:
    if one_cycle:
        return OneCycleLR(optimizer, max_lr=1.0, total_steps=CYCLE)
    return LambdaLR(optimizer, lambda n: 1.0 - n / 100)


def measured_rates(sizes: dict[str, int] | None, dp_size: int) -> dict[str, list[float]]:
    """The learning rate after each micro-batch, for every variant; `sizes` is None for Accelerate without this
    package.
    """
    rates = {}
    for name, (accumulation, split, one_cycle) in RATES.items():
        options = {
            "gradient_accumulation_steps": accumulation,
            "dataloader_config": DataLoaderConfiguration(split_batches=split),
        }
        accelerator = Accelerator(**options) if sizes is None else make_accelerator(sizes, **options)
        model: nn.Module = nn.Linear(2, 2) if sizes is None else build("llama", num_hidden_layers=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, make_schedule(optimizer, one_cycle))
        rates[name] = []
        for _ in range(MICRO_STEPS):
            with accelerator.accumulate(model):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            rates[name].append(schedule.get_last_lr()[0])
    return rates


def rates_by_hand(dp_size: int) -> dict[str, list[float]]:
    """`dp_size` processes of stock Accelerate: each optimizer step advances the schedule once per process.

    With `split_batches` once, because the batch is then the script's own; and never beyond the end of a cycle.
    """
    rates = {}
    for name, (accumulation, split, one_cycle) in RATES.items():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        schedule = make_schedule(optimizer, one_cycle)
        rates[name], advanced = [], 0
        for micro in range(1, MICRO_STEPS + 1):
            for _ in range((1 if split else dp_size) if micro % accumulation == 0 else 0):
                if not one_cycle or advanced < CYCLE:
                    schedule.step()
                    advanced += 1
            rates[name].append(schedule.get_last_lr()[0])
    return rates


@each_mesh
def test_scheduler_advances_once_per_data_parallel_rank(mesh):
    """Stock steps once per *process*; the ranks of a tp group share one batch, so it would run tp times too fast."""
    want = rates_by_hand(MESHES[mesh][2])
    for got in run_on_mesh(mesh, measured_rates):
        for name, rates in want.items():
            assert got[name] == pytest.approx(rates), name


def test_rates_by_hand_are_those_of_two_stock_processes():
    assert run_distributed(2, measured_rates, None, 2)[0] == {
        name: pytest.approx(rates) for name, rates in rates_by_hand(2).items()
    }


# ---- metrics -------------------------------------------------------------------------------------------------------

SAMPLES = 11  # batches of two: neither they nor the ranks divide it


class Numbers(Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"id": torch.tensor(index), "row": torch.tensor([index, index**2])}


def gathered(sizes: dict[str, int], dp_size: int) -> dict[str, list[Any]]:
    accelerator = make_accelerator(sizes)
    loader = accelerator.prepare(DataLoader(Numbers(), batch_size=2))
    seen: dict[str, list[Any]] = {
        kind: [] for kind in ("tensor", "matrix", "dict", "nested", "objects", "dicts", "tensors_as_objects")
    }
    for batch in loader:
        ids, rows = batch["id"], batch["row"]
        seen["tensor"] += accelerator.gather_for_metrics(ids).tolist()
        seen["matrix"] += accelerator.gather_for_metrics(rows).tolist()
        seen["dict"] += accelerator.gather_for_metrics(batch)["id"].tolist()
        assert accelerator.gather_for_metrics(rows[:0]).shape == (0, 2), "an empty batch"
        first, (second, third) = accelerator.gather_for_metrics((ids, [rows, {"again": ids}]))
        seen["nested"] += list(zip(first.tolist(), second.tolist(), third["again"].tolist(), strict=True))
        seen["objects"] += accelerator.gather_for_metrics([f"sample {i}" for i in ids.tolist()])
        seen["dicts"] += accelerator.gather_for_metrics([{"id": i} for i in ids.tolist()])
        ragged = [torch.arange(i) for i in ids.tolist()]  # cannot be concatenated: what the option is for
        seen["tensors_as_objects"] += [len(t) for t in accelerator.gather_for_metrics(ragged, use_gather_object=True)]
    return seen


@each_mesh
def test_gather_for_metrics_returns_each_sample_once(mesh):
    """Gathered over all processes, each sample would come once per tp rank, and the cut at the end be wrong."""
    numbers = list(range(SAMPLES))
    for seen in run_on_mesh(mesh, gathered):
        assert seen["tensor"] == seen["dict"] == seen["tensors_as_objects"] == numbers
        assert seen["matrix"] == [[i, i**2] for i in numbers]
        assert seen["nested"] == [(i, [i, i**2], i) for i in numbers]
        assert seen["objects"] == [f"sample {i}" for i in numbers]
        assert seen["dicts"] == [{"id": i} for i in numbers]


# ---- ways through the backward -------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("way", WAYS)
@each_cell
def test_gradients_are_right_whichever_way_they_are_collected(cell, way):
    """Partial gradients are summed exactly once, also when a script never says that a step is complete."""
    model, mesh = cell
    first, second = reference_gradients(model, MESHES[mesh][2])
    a, b = WAYS[way]
    want = {n: None if g is None else a * g + b * second[n] for n, g in first.items()}
    assert_gradients_equal(ways_of(model, mesh)[way], want)


@each_cell
def test_zero_grad_in_place_leaves_zeros(cell):
    zeroed = ways_of(*cell)["zeroed_in_place"]
    present = [g for g in zeroed.values() if g is not None]
    assert present and not any(g.any() for g in present)


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


@each_cell
def test_raw_loop_without_accelerator_backward(cell):
    """`loss.backward()` and `optimizer.step()`: SGD with lr 1 subtracts exactly the gradient."""
    model, mesh = cell
    first, second = reference_gradients(model, MESHES[mesh][2])
    moved = ways_of(model, mesh)["raw_loop"]
    for name, gradient in first.items():
        want = torch.zeros_like(moved[name]) if gradient is None else gradient + second[name]
        torch.testing.assert_close(moved[name], want, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# ---- optimizers ----------------------------------------------------------------------------------------------------

# eps this large keeps Adam's division from amplifying the rounding of gradients that are nearly zero.
ADAM = {"lr": 1e-2, "eps": 1e-3}


def optimizer_two_groups(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1, "name": "matrices"},
        {"params": vectors, "lr": 3e-3, "betas": (0.5, 0.9), "weight_decay": 0.0, "name": "vectors"},
    ]
    return torch.optim.AdamW(groups, **ADAM)


def optimizer_frozen_parameters(model: nn.Module) -> torch.optim.Optimizer:
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(False)
    return torch.optim.AdamW(model.parameters(), weight_decay=0.1, **ADAM)


def optimizer_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **ADAM)


def optimizer_adagrad(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=1e-2, initial_accumulator_value=0.1)


def optimizer_momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


class Scenario(NamedTuple):
    """An optimizer that may have stepped before prepare, or be created after it, in a loop that may evaluate in
    between.
    """

    make: Callable[[nn.Module], torch.optim.Optimizer]
    steps_before: int = 0
    created_after_prepare: bool = False
    evaluates: bool = False


OPTIMIZERS = {
    "two_groups": Scenario(optimizer_two_groups),
    "frozen_parameters": Scenario(optimizer_frozen_parameters),
    "created_after_prepare": Scenario(optimizer_two_groups, created_after_prepare=True),
    "created_after_evaluation": Scenario(optimizer_two_groups, created_after_prepare=True, evaluates=True),
    "evaluates_between_backward_and_step": Scenario(optimizer_two_groups, evaluates=True),
    "adamw_has_stepped": Scenario(optimizer_adamw, steps_before=1),
    "two_groups_have_stepped": Scenario(optimizer_two_groups, steps_before=1),
    "momentum_has_stepped": Scenario(optimizer_momentum, steps_before=1),
    "adagrad_state_of_its_constructor": Scenario(optimizer_adagrad),
    "adagrad_state_after_evaluation": Scenario(optimizer_adagrad, created_after_prepare=True, evaluates=True),
    "adagrad_has_stepped": Scenario(optimizer_adagrad, steps_before=1),
}
PARALLEL_STEPS = 2


def groups_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Hyper-parameters and parameter names of each group."""
    names = {id(p): normalize_name(n) for n, p in model.named_parameters()}
    return [group | {"params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def whole_batch_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict]) -> None:
    for batch in batches:
        (model(**batch, use_cache=False).loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def evaluate(model: nn.Module, batch: dict[str, torch.Tensor], really: bool) -> None:
    """A forward without a backward: FSDP2 frees only some of what it gathers for it."""
    if really:
        model.eval()
        with torch.no_grad():
            model(**batch, use_cache=False)
        model.train()


def parameters_after_steps(
    sizes: dict[str, int] | None, dp_size: int, names: list[str]
) -> dict[str, tuple[dict[str, torch.Tensor], list[dict[str, Any]]]]:
    """Parameters and optimizer groups for each scenario; `sizes` is None in one process."""
    results = {}
    for name in names:
        make, before, late, evaluates = OPTIMIZERS[name]
        model = build("qwen3")
        steps = [batches_for(model, dp_size, seed=20 + step) for step in range(before + PARALLEL_STEPS)]
        optimizer = None if late else make(model)
        for batches in steps[:before]:
            whole_batch_step(model, optimizer, batches)
        if sizes is None:
            optimizer = make(model) if late else optimizer
            for batches in steps[before:]:
                whole_batch_step(model, optimizer, batches)
        else:
            accelerator = make_accelerator(sizes)
            if late:
                model = accelerator.prepare(model)
                evaluate(model, steps[0][0], evaluates)
                optimizer = accelerator.prepare(make(model))
            else:
                model, optimizer = accelerator.prepare(model, optimizer)
            for batches in steps[before:]:
                accelerator.backward(model(**batches[data_rank(accelerator)], use_cache=False).loss)
                evaluate(model, batches[0], evaluates)
                optimizer.step()
                optimizer.zero_grad()
            evaluate(model, steps[0][0], evaluates)
            model.zero_grad()
            accelerator.free_memory()
            for unit in [m for m in model.modules() if isinstance(m, FSDPModule)]:
                unit.reshard()  # an evaluation leaves some units gathered
        results[name] = (full_parameters(model), groups_of(optimizer, model))
    return results


@functools.cache
def optimizer_results(mesh: str) -> dict[str, Any]:
    return run_on_mesh(mesh, parameters_after_steps, list(OPTIMIZERS))[0]


@functools.cache
def optimizer_reference(dp_size: int) -> dict[str, Any]:
    return parameters_after_steps(None, dp_size, list(OPTIMIZERS))


@pytest.mark.parametrize("scenario", OPTIMIZERS)
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_optimizer_is_the_same_after_prepare(mesh, scenario):
    """Groups, hyper-parameters and existing state survive: the next steps are those of one process.

    An evaluation changes nothing, though FSDP2 leaves the last units gathered after it: an optimizer created then does
    not hold what the model shows at that moment, and a step makes what is gathered stale.
    """
    got, got_groups = optimizer_results(mesh)[scenario]
    want, want_groups = optimizer_reference(MESHES[mesh][2])[scenario]
    assert got_groups == want_groups
    assert_same_tensors(got, {n: p.detach() for n, p in want.items()}, rtol=1e-4, atol=2e-6)


def prepare_with_stepped_adafactor(sizes: dict[str, int], dp_size: int) -> None:
    model = build("llama")
    optimizer = torch.optim.Adafactor(model.parameters())
    whole_batch_step(model, optimizer, batches_for(model, 1))
    make_accelerator(sizes).prepare(model, optimizer)


def test_existing_state_that_cannot_be_sharded_is_refused():
    """Factored state has another shape than its parameter: kept whole beside a shard it would be wrong."""
    expect_error(2, prepare_with_stepped_adafactor, {"dp_shard_size": 2}, 2, match="Adafactor.*state")


# ---- evaluation, several prepares ----------------------------------------------------------------------------------


def evaluate_only(sizes: dict[str, int], dp_size: int) -> float:
    accelerator = make_accelerator(sizes)
    model = build("llama_tied")
    batches = batches_for(model, dp_size)
    model = accelerator.prepare(model)
    model.eval()
    with torch.no_grad():
        loss = model(**batches[data_rank(accelerator)], use_cache=False).loss
    return accelerator.gather_for_metrics(loss).mean().item()


@each_mesh
def test_model_prepared_alone_evaluates_as_one_process(mesh):
    reference = build("llama_tied")
    want, _ = loss_and_grads(reference, batches_for(reference, MESHES[mesh][2]))
    for loss in run_on_mesh(mesh, evaluate_only):
        assert_losses_equal(loss, want)


def train_without_optimizer(sizes: dict[str, int], dp_size: int) -> None:
    accelerator = make_accelerator(sizes)
    model = accelerator.prepare(build("llama"))
    model.train()
    model(**batches_for(model, 1)[0], use_cache=False)


def test_training_a_model_prepared_alone_is_refused():
    expect_error(2, train_without_optimizer, {"tp_size": 2}, 1, match="prepared without an optimizer")


def unwrapped(sizes: dict[str, int], dp_size: int) -> dict[str, Any]:
    accelerator = make_accelerator(sizes)
    plain, adapted = build("llama"), build("llama", LORA)
    prepared, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    inner = accelerator.unwrap_model(prepared)
    prepared_adapted, _ = accelerator.prepare(adapted, torch.optim.SGD(trainable(adapted), lr=0.1))
    inner_adapted = accelerator.unwrap_model(prepared_adapted)
    return {
        "same_object": inner is plain and inner_adapted is adapted,
        "classes": isinstance(inner, LlamaForCausalLM) and isinstance(inner_adapted, PeftModel),
        "state_dict": accelerator.get_state_dict(prepared),
        "parameters": full_parameters(prepared),
    }


@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_unwrap_model_and_get_state_dict(mesh):
    results = run_on_mesh(mesh, unwrapped)
    assert all(r["same_object"] and r["classes"] for r in results)
    assert_same_tensors(results[0]["state_dict"], results[0]["parameters"], rtol=0, atol=0)
    assert_same_tensors(
        results[0]["parameters"], {n: p.detach() for n, p in build("llama").named_parameters()}, rtol=0, atol=0
    )


def forget(sizes: dict[str, int], dp_size: int) -> bool:
    accelerator = make_accelerator(sizes)
    model = build("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    known = weakref.ref(model)
    accelerator.free_memory()
    del model, optimizer
    gc.collect()
    return known() is None


def test_a_prepared_model_can_be_freed():
    """A script that trains one model after the other must not keep all of them."""
    assert run_on_mesh("tp2", forget) == [True, True]


# ---- data ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(16))


def streamed(sizes: dict[str, int], dp_size: int) -> list[int]:
    accelerator = make_accelerator(sizes)
    model = build("llama", num_hidden_layers=1)
    _, _, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(Stream(), batch_size=2)
    )
    return [i for batch in loader for i in batch.tolist()]


def shuffled(sizes: dict[str, int], dp_size: int) -> list[int]:
    """As in a script that seeds each rank differently, after prepare."""
    accelerator = make_accelerator(sizes)
    model = build("llama", num_hidden_layers=1)
    _, _, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(list(range(16)), batch_size=2, shuffle=True),
    )
    torch.manual_seed(dist.get_rank())
    return [i for _ in range(2) for batch in loader for i in batch.tolist()]


@pytest.mark.parametrize("job", [streamed, shuffled], ids=["iterable", "shuffled"])
@each_mesh
def test_ranks_of_a_tp_group_read_the_same_data_and_the_others_the_rest(mesh, job):
    by_rank = run_on_mesh(mesh, job)
    _, sizes, dp_size = MESHES[mesh]
    groups = by_rank[:: sizes.get("tp_size", 1)]
    assert by_rank == [data for data in groups for _ in range(sizes.get("tp_size", 1))]
    epochs = 2 if job is shuffled else 1
    for epoch in range(epochs):
        size = len(groups[0]) // epochs
        assert sorted(i for data in groups for i in data[epoch * size : (epoch + 1) * size]) == list(range(16))


# ---- saving --------------------------------------------------------------------------------------------------------


def train_and_save(
    sizes: dict[str, int], dp_size: int, name: str, adapter: Any, kind: str, directory: str, resume: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, learning rates and parameters of steps 3 and 4 of 4; a resumed run starts from other weights."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    accelerator = make_accelerator(sizes, fsdp_plugin=plugin)
    model = build(name, adapter and adapter | {"seed": 7 if resume else 1}, seed=0 if adapter or not resume else 7)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, make_schedule(optimizer, False))
    history = []
    if resume:
        accelerator.load_state(directory)
    for step in range(2 if resume else 0, 4):
        if step == 2 and not resume:
            accelerator.save_state(directory)
        batch = batches_for(model, dp_size, seed=30 + step)[data_rank(accelerator)]
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step >= 2:
            history += [loss.item(), schedule.get_last_lr()[0]]
    return history, full_parameters(model)


@pytest.mark.parametrize(
    "name, adapter, kind",
    [
        ("llama", LORA, "SHARDED_STATE_DICT"),
        ("llama_tied", None, "FULL_STATE_DICT"),
        ("phi3", None, "SHARDED_STATE_DICT"),
        ("phi3", LORA, "FULL_STATE_DICT"),
    ],
    ids=lambda value: "lora" if isinstance(value, dict) else "full" if value is None else value.lower(),
)
def test_save_state_and_load_state_continue_exactly(name, adapter, kind, tmp_path):
    """Every bit (same mesh)."""
    saved = run_on_mesh("tp2_fsdp2", train_and_save, name, adapter, kind, str(tmp_path), False)
    resumed = run_on_mesh("tp2_fsdp2", train_and_save, name, adapter, kind, str(tmp_path), True)
    for (want_history, want), (history, parameters) in zip(saved, resumed, strict=True):
        assert history == want_history
        assert_same_tensors(parameters, want, rtol=0, atol=0)


def write_after_evaluation(sizes: dict[str, int], dp_size: int) -> list[float]:
    """Losses of an evaluation, of one after all parameters were halved in place, and of one process's halved model."""
    accelerator = make_accelerator(sizes)
    model = build("llama")
    batch = batches_for(model, 1)[0]
    halved = build("llama")
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
        want = halved(**batch).loss.item()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        before = model(**batch).loss.item()
        for parameter in model.parameters():
            parameter.mul_(0.5)
        return [before, model(**batch).loss.item(), want]


@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_parameters_written_after_an_evaluation_are_used(mesh):
    """An averaged or clamped model: FSDP2 leaves the last units gathered after a forward without gradients."""
    for before, after, want in run_on_mesh(mesh, write_after_evaluation):
        assert after == pytest.approx(want, rel=1e-6) and after != pytest.approx(before, rel=1e-3)


# ---- Trainer -------------------------------------------------------------------------------------------------------


class Rows(Dataset):
    def __init__(self, rows: int, vocabulary: int, seed: int) -> None:
        (batch,) = make_batches(1, rows, 16, vocabulary, seed)
        self.rows = [{key: tensor[i] for key, tensor in batch.items()} for i in range(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def batch(self, start: int = 0, stop: int | None = None) -> dict[str, torch.Tensor]:
        chosen = self.rows[start:stop]
        return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}


class InOrder(Trainer):
    """Only the order of the data is fixed; everything else is stock."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def arguments(directory: str, sizes: dict[str, int], dp_size: int, **options: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": directory,
        "use_cpu": True,
        "per_device_train_batch_size": 4 // dp_size,
        "per_device_eval_batch_size": 4 // dp_size,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "parallelism_config": AutoParallelismConfig(**sizes),
    }
    return TrainingArguments(**values | options)


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


EVALUATION_ROWS = 8
PREDICTION_ROWS = 11  # divides by nothing


def life_of_a_trainer(sizes: dict[str, int], dp_size: int, adapter: Any, directory: str) -> dict[str, Any]:
    """Evaluate, predict, train, train again, evaluate, and train the same model with a second Trainer."""
    model = build("qwen3", adapter)
    train, evaluation = Rows(8, 128, seed=40), Rows(EVALUATION_ROWS, 128, seed=41)
    trainer = InOrder(model, arguments(directory, sizes, dp_size), train_dataset=train, eval_dataset=evaluation)
    result = {"loss_before": trainer.evaluate()["eval_loss"]}
    prediction = trainer.predict(Rows(PREDICTION_ROWS, 128, seed=42))
    result["logits"], result["labels"] = map(torch.as_tensor, (prediction.predictions, prediction.label_ids))
    trainer.train()
    result["first"] = losses_of(trainer)
    trainer.train()
    result["second"] = losses_of(trainer)
    result["loss_after"] = trainer.evaluate()["eval_loss"]
    another = InOrder(model, arguments(directory, sizes, dp_size), train_dataset=train, eval_dataset=evaluation)
    another.train()
    result["another"] = losses_of(another)
    return result


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_evaluate_predict_train_twice_and_with_a_second_trainer(mesh, adapter, tmp_path):
    """In this order: the model is then prepared before there is an optimizer, and again by each `train()`."""
    results = run_on_mesh(mesh, life_of_a_trainer, adapter, str(tmp_path))
    reference = build("qwen3", adapter)
    train, evaluation, prediction = Rows(8, 128, 40), Rows(EVALUATION_ROWS, 128, 41), Rows(PREDICTION_ROWS, 128, 42)
    with torch.no_grad():
        before = reference(**evaluation.batch()).loss.item()
        logits = reference(**prediction.batch()).logits
    steps = [[train.batch(0, 4)], [train.batch(4, 8)]]
    for result in results:
        assert_losses_equal(result["loss_before"], before)
        assert result["logits"].shape == logits.shape
        torch.testing.assert_close(result["logits"], logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(result["labels"], prediction.batch()["labels"])
    # The second train() goes on with the optimizer of the first; the second Trainer makes one of its own.
    optimizer = torch.optim.AdamW(trainable(reference), lr=1e-2, eps=1e-3, weight_decay=0.0)
    assert_losses_equal(results[0]["first"], history(reference, optimizer, steps), rtol=1e-5)
    assert_losses_equal(results[0]["second"], history(reference, optimizer, steps), rtol=1e-5)
    with torch.no_grad():
        assert_losses_equal(results[0]["loss_after"], reference(**evaluation.batch()).loss.item(), rtol=1e-5)
    optimizer = torch.optim.AdamW(trainable(reference), lr=1e-2, eps=1e-3, weight_decay=0.0)
    assert_losses_equal(results[0]["another"], history(reference, optimizer, steps), rtol=1e-5)


def history(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[list[dict]]) -> list[float]:
    """Losses of one process whose gradients are clipped at 1, as Trainer does."""
    losses = []
    for batches in steps:
        optimizer.zero_grad()
        loss = sum(model(**batch, use_cache=False).loss for batch in batches) / len(batches)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_and_save_model(
    sizes: dict[str, int], dp_size: int, name: str, adapter: Any, directory: str
) -> dict[str, torch.Tensor]:
    model = build(name, adapter)
    rows = Rows(8, model.config.vocab_size, seed=40)
    trainer = InOrder(model, arguments(directory, sizes, dp_size), train_dataset=rows)
    trainer.train()
    trainer.save_model(directory)
    dist.barrier()
    return full_parameters(trainer.model)


SAVED = [
    ("llama_odd_vocab", None),
    ("llama_tied", None),
    ("phi3", None),
    ("mixtral", None),
    ("llama_odd_vocab", {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
    ("mixtral", LORA),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(
    "name, adapter", SAVED, ids=lambda v: "full" if v is None else "lora" if isinstance(v, dict) else v
)
def test_saved_model_is_that_of_one_process(name, adapter, tmp_path):
    """`Trainer.save_model` writes what plain `from_pretrained` loads, every tensor identical to the trained one."""
    want = run_on_mesh("tp2_fsdp2", train_and_save_model, name, adapter, str(tmp_path))[0]
    if adapter is None:
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    else:
        assert not list(Path(tmp_path).glob("model*.safetensors")), "the base model was saved beside the adapter"
        loaded = PeftModel.from_pretrained(build_model(name), tmp_path)
    assert_same_tensors({n: p.detach() for n, p in loaded.named_parameters()}, want, rtol=0, atol=0)
    start = build(name, adapter)
    moved = [n for n, p in start.named_parameters() if p.requires_grad and torch.equal(p, want[n])]
    assert not moved, f"not trained: {moved}"


# ---- mixed precision -----------------------------------------------------------------------------------------------


def train_in_bf16(sizes: dict[str, int], dp_size: int, dtype: torch.dtype, adapter: Any) -> dict[str, Any]:
    accelerator = make_accelerator(sizes, mixed_precision="bf16")
    model = build("qwen3", adapter).to(dtype)
    seen = {}
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    losses = []
    for step in range(2):
        batch = batches_for(model, dp_size, seed=10 + step)[data_rank(accelerator)]
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        if step == 0:
            seen["gradients"] = {p.grad.dtype for p in trainable(model)}
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return seen | {
        "losses": [accelerator.gather_for_metrics(loss).mean().item() for loss in losses],
        "trainable": {p.dtype for p in model.parameters() if p.requires_grad},
        "frozen": {p.dtype for p in model.parameters() if not p.requires_grad},
        "state": {v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "step"},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32_model", "bfloat16_model"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@each_mesh
def test_bf16_mixed_precision_keeps_trainable_parameters_in_float32(mesh, adapter, dtype):
    """Computed in bfloat16, gradients reduced, clipped and applied in float32; frozen weights stay as they were
    loaded.
    """
    reference = build("qwen3", adapter)
    steps = [batches_for(reference, MESHES[mesh][2], seed=10 + step) for step in range(2)]
    want = [step["loss"] for step in train_steps(reference, steps, lr=1e-2, max_grad_norm=1.0)]
    for result in run_on_mesh(mesh, train_in_bf16, dtype, adapter):
        assert result["trainable"] == result["gradients"] == result["state"] == {torch.float32}
        assert result["frozen"] == (set() if adapter is None else {dtype})
        assert_losses_equal(result["losses"], want, rtol=2e-2)


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("part", [False, True], ids=["all", "part"])
def test_clipping_unscales_once(part):
    model = build("llama", num_hidden_layers=1)
    model(**batches_for(model, 1)[0], use_cache=False).loss.backward()
    want = nn.utils.clip_grad_norm_(list(model.parameters())[: 3 if part else None], 0.1).item()
    for norm, after in run_distributed(2, clipped_under_a_scaler, part):
        assert (norm, after) == pytest.approx((want, 0.1), rel=1e-4)
