"""What differs between ranks is one clear error on every rank within seconds: never a hang, never a wrong result."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.meshes import MESHES
from harness.models import build_model, lora
from harness.pool import expect_error, run_distributed
from harness.training import build

from hf_automodel_parallel import AutoParallelismConfig
from ranks.accelerate.jobs import TP2, prepare, sgd, with_plugin


def config_depends_on_the_rank(configs: list) -> None:
    prepare(configs[dist.get_rank()])


@pytest.mark.core_cases("configs0")
@pytest.mark.parametrize("configs", [[{"tp": 2}, {"dp_shard": 2}], [{"dp_replicate": 2}, {}]])
def test_other_sizes_on_one_rank(configs):
    """For example two machines with different config files: each rank would wait in groups that the others never
    make.
    """
    expect_error(
        2, config_depends_on_the_rank, configs, match=r"different parallelism configs: .* on rank 0, .* on rank 1\."
    )


def test_sizes_that_do_not_fit_on_one_rank():
    messages = expect_error(
        2, config_depends_on_the_rank, [{"tp": 2}, {"tp": 4}], match=r"tp_size=4.*but there are 2 processes"
    )
    assert "failed on rank 1" in messages[0]


@pytest.mark.core_cases("activation_checkpointing-values2")
@pytest.mark.parametrize(
    "name, values",
    [
        ("loss_parallel", (None, False)),
        ("sequence_parallel_regather", (True, False)),
        ("activation_checkpointing", ("full", "selective")),
        ("check_optimizer", (False, True)),
    ],
)
def test_other_choices_on_one_rank(name, values):
    """One rank would wait in a collective that the other never calls."""
    configs = [{"tp": 2, "sequence_parallel": True, name: value} for value in values]
    message = (
        rf"different parallelism configs: {name}={values[0]!r} on rank 0, {name}={values[1]!r} on rank 1\. Start all"
    )
    expect_error(2, config_depends_on_the_rank, configs, match=message)


def test_what_ranks_may_write_differently():
    """The same in other words, and what each rank does alone."""
    configs = [
        {"tp": 2, "audit": True, "plan_order": ["hf"]},
        {"tp": 2, "plan_order": ["hf", "default"], "loss_chunk_size": 8},
    ]
    run_distributed(2, config_depends_on_the_rank, configs)


def plugin_depends_on_the_rank(options: list[dict[str, Any]]) -> None:
    with_plugin(TP2, {"fsdp_version": 2, **options[dist.get_rank()]})


def test_other_plugin_on_one_rank():
    message = r"option activation_checkpointing='none'.* on rank 0 and .*activation_checkpointing='full'.* on rank 1\."
    expect_error(2, plugin_depends_on_the_rank, [{}, {"activation_checkpointing": True}], match=message)


@pytest.mark.core
def test_other_plan_on_one_rank():
    plans = [{"tp": 2}, {"tp": 2, "tp_plan": {"lm_head": "rowwise_split_input"}}]
    expect_error(2, config_depends_on_the_rank, plans, match=r"not the same on all ranks: ranks \[1\]")


def plan_fails_on_one_rank(rank: int) -> None:
    def plan() -> dict[str, str]:
        if dist.get_rank() == rank:
            raise RuntimeError("no such file")
        return {"lm_head": "colwise_gather_output"}

    prepare({**TP2, "tp_plan": plan} if rank < 2 else {"tp": 2, "dp_shard": 2, "tp_plan": plan})


@pytest.mark.core_cases("2-1")
@pytest.mark.parametrize("world, rank", [(2, 0), (2, 1), (4, 3)])
def test_error_on_one_rank_is_an_error_on_all(world, rank):
    """Only one rank cannot read something; the others say which rank and why instead of waiting for it."""
    messages = expect_error(world, plan_fails_on_one_rank, rank, match=r"no such file")
    for other, message in enumerate(messages):
        assert message == "no such file" or f"failed on rank {rank}" in message, (other, message)


def another_model_on_one_rank(sizes: dict, rank: int, kind: str) -> None:
    here = dist.get_rank() == rank
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build_model("llama", **({"intermediate_size": 64} if here and kind == "size" else {}))
    if here and kind == "heads":
        model = build_model("llama_odd_heads")
    if kind == "adapter":
        model = lora(model, r=8 if here else 4)
    if here and kind == "dtype":
        model = model.to(torch.bfloat16)
    if here and kind == "frozen":
        model.lm_head.requires_grad_(False)
    if here and kind == "depth":
        model = build_model("llama", num_hidden_layers=3)
    accelerator.prepare(model, sgd(model))


@pytest.mark.core_cases("tp2-1-size", "fsdp2-0-adapter", "tp2_fsdp2-3-dtype")
@pytest.mark.parametrize("kind", ["size", "heads", "adapter", "dtype", "frozen", "depth"])
@pytest.mark.parametrize("mesh, rank", [("tp2", 1), ("fsdp2", 0), ("tp2_fsdp2", 3)])
def test_another_model_on_one_rank(mesh, rank, kind):
    """Whatever differs, all ranks say so before the first collective that would wait for ever or mix up two models."""
    world, sizes, _ = MESHES[mesh]
    message = r"not the same on all ranks: ranks \["
    if kind == "heads" and "tp" in mesh:
        message = r"num_key_value_heads=3"
    messages = expect_error(world, another_model_on_one_rank, sizes, rank, kind, match=message)
    if "num_key_value_heads" not in message:  # each rank names the same difference
        assert len(set(messages)) == 1 and "for example in" in messages[0]


def tied_on_one_rank() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama_tied" if dist.get_rank() == 0 else "llama")
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def buffer_on_one_rank() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2))
    model = build("llama")
    if dist.get_rank() == 1:
        model.register_buffer("extra", torch.zeros(3))
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("job", [tied_on_one_rank, buffer_on_one_rank])
def test_models_that_differ_in_ties_or_buffers(job):
    expect_error(2, job, match="not the same on all ranks")


def two_models_on_one_rank() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    models = [build("llama") for _ in range(1 + dist.get_rank())]
    accelerator.prepare(*models, torch.optim.SGD(models[0].parameters(), lr=0.1))


def test_a_mistake_in_the_arguments_of_one_rank_ends_all():
    expect_error(2, two_models_on_one_rank, match="2 models in one prepare call")
