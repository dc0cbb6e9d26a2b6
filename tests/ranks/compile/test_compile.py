"""Compiled layers: one graph without breaks, the gradients of one process, and no collective more than eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.collectives import count_collectives_profiler, flush_deferred
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.meshes import MESHES
from harness.models import LORA_7, make_batches
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.compile import compile_layers
from hf_automodel_parallel.core.model_structure import find_layers
from hf_automodel_parallel.core.model_view import ModelView


def prepare(name: str, sizes: dict, adapter: dict | None, backend: Any = None, **overrides: Any):
    """A prepared model, its layers compiled if a backend is given."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build(name, adapter, **overrides)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    if backend is not None:
        compile_layers(find_layers(ModelView.of(model).inner), backend=backend, fullgraph=True)
    return accelerator, model


def compiled_gradients(name: str, sizes: dict, adapter: dict | None, dp_size: int, lengths: tuple[int, ...]):
    """Loss and gradients after some batches of other lengths, the graphs after each length, and the state dict's
    keys.
    """
    graphs: list[int] = []

    def backend(graph, inputs):
        graphs.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    accelerator, model = prepare(name, sizes, adapter, backend, num_hidden_layers=4)
    counts = []
    for length in lengths:
        batch = make_batches(dp_size, 2, length, 128, seed=3)[data_rank(accelerator)]
        accelerator.backward(model(**batch, use_cache=False).loss)
        model.zero_grad()
        counts.append(len(graphs))
    loss = model(**batches_for(model, dp_size)[data_rank(accelerator)], use_cache=False).loss
    accelerator.backward(loss)
    total = accelerator.reduce(loss.detach(), "mean").item()
    return total, full_grads(model), counts, list(model.state_dict())


@pytest.mark.parametrize(
    "model, mesh, adapter, kinds",
    [("qwen3", "tp2", None, 1), ("llama", "fsdp2", LORA, 2)],
    ids=["qwen3-tp2-full", "llama-fsdp2-lora"],
)
def test_compiled_layers_equal_one_process(model, mesh, adapter, kinds):
    """`kinds`: with a frozen embedding the first layer's input needs no gradient, which is a graph of its own.

    Gradients of compiled layers on both axes are cells of the parity table.
    """
    world, sizes, dp_size = MESHES[mesh]
    loss, gradients, graphs, keys = run_distributed(
        world, compiled_gradients, model, sizes, adapter, dp_size, (16, 8, 12), timeout=240
    )[0]
    reference = build(model, adapter, num_hidden_layers=4)
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    assert graphs == [kinds, 2 * kinds, 2 * kinds], "one recompilation, for dynamic lengths, then none"
    assert keys == list(reference.state_dict())


def all_reduces(adapter: dict | None, compiled: bool) -> list[int]:
    """All-reduces in forward and backward of a 2-layer and a 4-layer model; only tp has any in this mesh."""
    result = []
    for layers in (2, 4):
        accelerator, model = prepare(
            "llama", {"tp_size": 2}, adapter, "aot_eager" if compiled else None, num_hidden_layers=layers
        )
        batch = batches_for(model, 1)[0]

        def forward(model=model, batch=batch):
            return model(**batch, use_cache=False).loss

        accelerator.backward(forward())  # compile before counting
        model.zero_grad()
        out: list[torch.Tensor] = []
        result.append(count_collectives_profiler(lambda out=out, forward=forward: out.append(forward()))["all_reduce"])
        with flush_deferred(model):  # without the one all-reduce of the Partial gradients
            result.append(count_collectives_profiler(lambda out=out: out[0].backward())["all_reduce"])
    return result


@pytest.mark.core_cases("lora-eager")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("adapter", [None, {"target_modules": LORA_7}], ids=["full", "lora"])
def test_two_all_reduces_forward_and_two_backward_per_layer(adapter, compiled):
    forward_2, backward_2, forward_4, backward_4 = run_distributed(2, all_reduces, adapter, compiled, timeout=240)[0]
    assert (forward_4 - forward_2) / 2 == 2
    assert (backward_4 - backward_2) / 2 == 2
    # The ends: the vocabulary-sharded embedding and the loss (maxima and sums) reduce forward, the head's input
    # backward.
    assert forward_2 == 2 * 2 + 1 + 2
    # With a frozen embedding nothing below layer 0 is trained: its first boundary costs nothing (4L - 1 in the layers).
    assert backward_2 == 2 * 2 + 1 - (adapter is not None)


# ---- graphs under every checkpoint ---------------------------------------------------------------------------------


def graphs_while_training(mode: str, adapter: dict | None, layers: int, batches: int) -> dict[str, Any]:
    """Graphs after each of some training batches of varying length and after evaluating, breaks, and the state dict's
    keys.
    """
    from torch._dynamo.utils import counters

    config = AutoParallelismConfig(tp_size=2, activation_checkpointing=mode, compile="aot_eager")
    accelerator = Accelerator(parallelism_config=config)
    model = build("llama", adapter, num_hidden_layers=layers)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    counters.clear()
    counts = {"train": [], "eval": []}
    for index in range(batches):
        batch = make_batches(1, 2, 8 + (index * 7) % 20, 128, seed=index)[0]
        model.train()
        accelerator.backward(model(**batch, use_cache=False).loss)
        model.zero_grad()
        counts["train"].append(counters["stats"]["unique_graphs"])
        if index >= 3 and index % 2:  # switching back and forth
            model.eval()
            with torch.no_grad():
                model(**batch, use_cache=False)
            counts["eval"].append(counters["stats"]["unique_graphs"])
    return {**counts, "breaks": dict(counters["graph_break"]), "keys": list(model.state_dict())}


@pytest.mark.parametrize(
    "mode, adapter",
    [("none", LORA), ("full", None), ("submodule", None), ("selective", LORA)],
    ids=["none-lora", "full-full", "submodule-full", "selective-lora"],
)
def test_graphs_are_few_whole_and_constant(mode, adapter):
    """At most two graphs (first length, any length) per kind of layer and of pass; none after the second batch."""
    kinds = 1 if adapter is None else 2  # a frozen embedding gives the first layer an input without gradient
    layers = 2 * kinds + 1  # more than the graphs that are allowed, so that one graph a layer would be too many
    seen = run_distributed(2, graphs_while_training, mode, adapter, layers, 10, timeout=240)[0]
    assert not seen["breaks"]
    assert 1 <= seen["train"][1] <= 2 * kinds < layers, "graphs grow with the depth"
    assert seen["train"][1:4] == [seen["train"][1]] * 3, "a graph after the second batch"
    evaluation = seen["eval"][-1] - seen["train"][3]
    assert evaluation <= 2 and len(set(seen["eval"][1:])) == 1, seen
    assert seen["train"][-1] == seen["eval"][-1], "switching compiles again"
    assert seen["keys"] == list(build("llama", adapter, num_hidden_layers=layers).state_dict())
