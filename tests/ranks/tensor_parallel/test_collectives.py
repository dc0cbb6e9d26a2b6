"""Communication is counted, not timed: exact, and the same on a busy machine (eager; compiled code has its own
counts).
"""

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from harness.collectives import CollectiveCounter, CollectiveCounts, flush_deferred
from harness.meshes import MESHES
from harness.models import LORA_7
from harness.pool import run_distributed
from harness.training import batches_for, build, data_rank, trainable
from torch.distributed.device_mesh import DeviceMesh

from hf_automodel_parallel import AutoParallelismConfig

LORA = {"target_modules": LORA_7}
MODELS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "llama_full": ("llama", None),
    "llama_lora": ("llama", LORA),
    "qwen3_full": ("qwen3", None),
}

Counts = dict[str, Counter]


def by_axis(counts: CollectiveCounts, mesh: DeviceMesh) -> Counts:
    """The counts on each axis of ``mesh`` and, as "elsewhere", those of all other groups."""
    result = {axis: Counter(counts.on(mesh[axis])) for axis in mesh.mesh_dim_names if mesh[axis].size() > 1}
    return result | {"elsewhere": counts.total - sum(result.values(), Counter())}


# ---- what a layer costs --------------------------------------------------------------------------------------------


def forward_and_backward(model_name: str, layer_counts: list[int], **fields: Any) -> dict[int, tuple[Counts, Counts]]:
    """Collectives of one forward and one backward without a flush, by number of layers."""
    name, adapter = MODELS[model_name]
    result = {}
    for layers in layer_counts:
        config = AutoParallelismConfig(tp_size=2, **fields)
        accelerator = Accelerator(parallelism_config=config)
        model = build(name, adapter, num_hidden_layers=layers)
        batch = batches_for(model, 1)[0]
        model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
        with CollectiveCounter() as forward:
            loss = model(**batch, use_cache=False).loss
        with CollectiveCounter() as backward, flush_deferred(model):
            loss.backward()
        mesh = accelerator.torch_device_mesh
        result[layers] = by_axis(forward.counts, mesh), by_axis(backward.counts, mesh)
    return result


@functools.cache
def costs(model: str) -> list[dict[int, tuple[Counts, Counts]]]:
    return run_distributed(2, forward_and_backward, model, [2, 4])


@pytest.mark.core
@pytest.mark.parametrize("model", MODELS)
def test_a_dense_layer_costs_two_all_reduces_in_forward_and_two_in_backward(model):
    """The known minimum; the difference between two and four layers has neither embedding nor head in it."""
    for rank in costs(model):
        (forward2, backward2), (forward4, backward4) = rank[2], rank[4]
        assert forward4["tp"] - forward2["tp"] == {"all_reduce": 2 * 2}
        assert backward4["tp"] - backward2["tp"] == {"all_reduce": 2 * 2}
        for counts in (*rank[2], *rank[4]):
            assert counts["elsewhere"] == {}


@pytest.mark.core
def test_lora_adds_no_collective_to_a_forward():
    assert costs("llama_lora")[0][4][0] == costs("llama_full")[0][4][0]


#: Forward: the sum of the embedding's vocabulary slices; the loss's maxima and sums, instead of gathered logits.
#: Backward: the boundary before the head.
EMBEDDING_AND_HEAD = Counter(all_reduce=1 + 2 + 1)


def both_ways(model: str, layers: int) -> Counter:
    """Forward and backward on the tp axis."""
    return sum((counts["tp"] for counts in costs(model)[0][layers]), Counter())


@pytest.mark.core
@pytest.mark.parametrize("layers", [2, 4])
def test_layers_cost_one_less_when_nothing_below_them_is_trained(layers):
    """No gradient flows to the input of layer 0 under LoRA, so its first boundary has nothing to sum: 4L - 1."""
    assert both_ways("llama_full", layers) == EMBEDDING_AND_HEAD + Counter(all_reduce=4 * layers)
    assert both_ways("llama_lora", layers) == EMBEDDING_AND_HEAD + Counter(all_reduce=4 * layers - 1)


# ---- the same with sequence parallelism ------------------------------------------------------------------------------


@functools.cache
def sequence_costs(model: str) -> list[dict[int, tuple[Counts, Counts]]]:
    return run_distributed(2, forward_and_backward, model, [2, 4], sequence_parallel=True)


@pytest.mark.core_cases("llama_full")
@pytest.mark.parametrize("model", MODELS)
def test_a_dense_layer_on_shares_costs_two_gathers_and_two_reduce_scatters_each_way(model):
    """As many bytes as two all-reduces; no all-reduce of activations."""
    for rank in sequence_costs(model):
        (forward2, backward2), (forward4, backward4) = rank[2], rank[4]
        assert forward4["tp"] - forward2["tp"] == {"all_gather": 2 * 2, "reduce_scatter": 2 * 2}
        assert backward4["tp"] - backward2["tp"] == {"all_gather": 2 * 2, "reduce_scatter": 2 * 2}
        for counts in (*rank[2], *rank[4]):
            assert counts["elsewhere"] == {}


@pytest.mark.parametrize("model", ["llama_full", "llama_lora"])
def test_gathering_again_costs_two_all_gathers_per_layer_in_backward(model):
    """One for each block, whatever reads its input: q, k and v, gate and up, and their adapters."""
    fields = {"sequence_parallel": True, "sequence_parallel_regather": True}
    again = run_distributed(2, forward_and_backward, model, [2, 4], **fields)
    for rank, kept in zip(again, sequence_costs(model), strict=True):
        for layers in (2, 4):
            assert rank[layers][0] == kept[layers][0]
            assert rank[layers][1]["tp"] - kept[layers][1]["tp"] == {"all_gather": 2 * layers}


def test_the_ends_on_shares_cost_no_all_reduce_but_that_of_the_embedding():
    """Forward: the vocabulary slices' sum, hidden states gathered, the loss. Backward: hidden states, embedding's
    gradient.
    """
    forward, backward = (counts["tp"] for counts in sequence_costs("llama_full")[0][2])
    layers = Counter(all_gather=2 * 2, reduce_scatter=2 * 2)
    assert forward == layers + Counter(all_reduce=1 + 2, all_gather=1)
    assert backward == layers + Counter(reduce_scatter=1, all_gather=1)


def test_lora_on_shares_saves_what_nobody_below_needs():
    """A frozen embedding: neither the gradient of the first layer's input nor its boundary is needed."""
    forward, backward = (counts["tp"] for counts in sequence_costs("llama_lora")[0][2])
    assert forward == sequence_costs("llama_full")[0][2][0]["tp"]
    assert backward == Counter(all_gather=2 * 2, reduce_scatter=2 * 2 - 1 + 1)


# ---- what a step costs beyond its activations ----------------------------------------------------------------------


def micro_batch_and_step(
    sizes: dict[str, int], dp_size: int, model_name: str, accumulation: int, sync_each_batch: bool
) -> list[Counts]:
    """Collectives of the activations of one micro-batch, of the first whole optimizer step, and of the second."""
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_each_batch=sync_each_batch)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes), gradient_accumulation_plugin=plugin)
    model = build(*MODELS[model_name])
    batches = batches_for(model, dp_size * accumulation, rows=8)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    mine = [batches[micro * dp_size + data_rank(accelerator)] for micro in range(accumulation)]
    mesh = accelerator.torch_device_mesh
    with CollectiveCounter() as one, flush_deferred(model):
        model(**mine[0], use_cache=False).loss.backward()
    model.zero_grad()
    counts = [by_axis(one.counts, mesh)]
    for _ in range(2):
        with CollectiveCounter() as step:
            for batch in mine:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch, use_cache=False).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        counts.append(by_axis(step.counts, mesh))
    return counts


STEPS = {"plain": (1, False), "accumulation": (4, False), "sync_each_batch": (4, True)}


@functools.cache
def step_costs(model: str, mesh: str, step: str) -> list[list[Counts]]:
    world, sizes, dp_size = MESHES[mesh]
    return run_distributed(world, micro_batch_and_step, sizes, dp_size, model, *STEPS[step])


def times(counter: Counter, factor: int) -> Counter:
    return Counter({kind: count * factor for kind, count in counter.items()})


@pytest.mark.core_cases(
    "qwen3_full-1-tp2-plain", *(f"qwen3_full-1-tp2_fsdp2-{step}" for step in STEPS)
)  # the latter from runs that another core test needs
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
@pytest.mark.parametrize("model, flushes", [("qwen3_full", 1), ("llama_lora", 1), ("llama_full", 0)])
def test_partial_gradients_cost_one_all_reduce_per_step(model, flushes, mesh, step):
    """All of them together, however many and however often accumulated: left to itself FSDP2 takes one each and
    micro-batch.

    A model without partial gradients pays nothing.
    """
    for one, _, whole in step_costs(model, mesh, step):
        extra = Counter(whole["tp"])
        extra.subtract(times(one["tp"], STEPS[step][0]))
        assert {kind: count for kind, count in extra.items() if count} == ({"all_reduce": 1} if flushes else {})


@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
@pytest.mark.parametrize("model", ["qwen3_full", "llama_lora"])
def test_the_first_step_costs_at_most_one_gather_more(model, mesh):
    """In it the gradients of replicated parameters are compared between the ranks; never again."""
    for _, first, second in step_costs(model, mesh, "accumulation"):
        extra = sum(first.values(), Counter())
        extra.subtract(sum(second.values(), Counter()))
        assert {kind: count for kind, count in extra.items() if count} in ({}, {"all_gather": 1})


@pytest.mark.parametrize("model", ["qwen3_full", "llama_lora"])
def test_tensor_parallelism_alone_has_no_data_parallel_collective(model):
    """FSDP2 runs on an axis of one rank there, which must cost nothing."""
    for one, _, whole in step_costs(model, "tp2", "accumulation"):
        assert one["elsewhere"] == whole["elsewhere"] == {}
        assert set(whole) == {"tp", "elsewhere"}


@pytest.mark.core_cases("llama_lora")
@pytest.mark.parametrize("model", ["qwen3_full", "llama_lora"])
def test_fsdp_alone_has_no_tensor_parallel_collective(model):
    """Only parameters are gathered and gradients scattered; no activation and no partial gradient is summed."""
    for _, _, whole in step_costs(model, "fsdp2", "plain"):
        assert set(whole) == {"dp_shard", "elsewhere"} and whole["elsewhere"] == {}
        assert set(whole["dp_shard"]) == {"all_gather", "reduce_scatter"}


@pytest.mark.core_cases("qwen3_full")
@pytest.mark.parametrize("model", ["qwen3_full", "llama_lora"])
def test_gradients_are_reduced_over_data_parallel_ranks_once_per_step(model):
    """With accumulation only in the last micro-batch; `sync_each_batch` asks for each."""
    plain, accumulated, each = (
        step_costs(model, "tp2_fsdp2", step)[0][-1]["dp_shard"]["reduce_scatter"]
        for step in ("plain", "accumulation", "sync_each_batch")
    )
    assert plain > 0 and accumulated == plain and each == 4 * plain
    assert all(whole["dp_shard"]["all_reduce"] == 0 for *_, whole in step_costs(model, "tp2_fsdp2", "plain"))
