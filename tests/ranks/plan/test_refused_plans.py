"""Plans, head counts and models that tensor parallelism cannot use: one clear error on every rank."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.meshes import MESHES
from harness.pool import expect_error
from harness.training import build, trainable

from hf_automodel_parallel import AutoParallelismConfig
from ranks.accelerate.jobs import TP2, call_prepare


@pytest.mark.core_cases("tp2-style", "tp2-key", "tp2_fsdp2-import")
@pytest.mark.parametrize(
    "tp_plan, message",
    [
        ({"lm_head": "columnwise"}, r"'lm_head' has the unknown style 'columnwise'"),
        ({"model.layers.*.mlp.up": "colwise"}, r"'model\.layers\.\*\.mlp\.up' match no module"),
        ({"model.norm": "colwise"}, r"shards linear layers, but model\.norm is a LlamaRMSNorm"),
        ("no_such_plan", r"tp_plan='no_such_plan' is neither a named plan"),
        ("no.such:plan", r"No module named 'no'"),
        ({}, r"is empty"),
    ],
    ids=["style", "key", "layer", "name", "import", "empty"],
)
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_plan_that_cannot_be_used(mesh, tp_plan, message):
    world, sizes, _ = MESHES[mesh]
    expect_error(world, call_prepare, {**sizes, "tp_plan": tp_plan}, match=message)


@pytest.mark.core_cases("tp2-full", "tp2_fsdp2-lora")
@pytest.mark.parametrize("adapter", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_heads_that_do_not_divide(mesh, adapter):
    world, sizes, _ = MESHES[mesh]
    message = r"num_key_value_heads=3 does not divide by tp_size=2"
    expect_error(world, call_prepare, sizes, "llama_odd_heads", adapter=adapter, match=message)


def test_heads_that_divide_by_two_but_not_by_four():
    six = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6}
    message = r"num_key_value_heads=6 does not divide by tp_size=4"
    expect_error(4, call_prepare, {"tp_size": 4}, overrides=six, match=message)


def test_intermediate_size_that_does_not_divide():
    overrides = {"intermediate_size": 127}
    expect_error(2, call_prepare, TP2, overrides=overrides, match=r"gate_proj\.weight of shape \(127, 64\).*tp_size=2")


@pytest.mark.core
def test_model_without_a_plan():
    sizes = {**TP2, "plan_order": ["hf", "registry", "default"]}
    expect_error(
        2, call_prepare, sizes, "gpt2", match=r"no tensor-parallel plan for the class GPT2LMHeadModel.*tp_plan="
    )


def just_prepare(model: str, adapter: dict[str, Any] | None, sizes: dict[str, int]) -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    built = build(model, adapter)
    accelerator.prepare(built, torch.optim.AdamW(trainable(built), lr=1e-3))


@pytest.mark.parametrize("adapter", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize(
    "model, message",
    [
        ("llama_odd_heads", r"num_key_value_heads=3 does not divide by tp_size=2"),
        ("gpt2", r"GPT2LMHeadModel.*(tp_plan|tp_size=1)"),
    ],
)
def test_what_cannot_be_sharded_is_a_clear_error_on_all_ranks(model, message, adapter):
    """Stock: a single key/value head dies in the model's `view()`, deep inside the first forward."""
    sizes = {"tp_size": 2, "plan_order": ("hf", "registry", "default")}  # without deriving one
    expect_error(2, just_prepare, model, adapter, sizes, match=rf"(?s){message}")
