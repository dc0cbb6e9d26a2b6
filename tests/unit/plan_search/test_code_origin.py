"""Code of the user's own is found where it really runs, and the plan is tried with it."""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from harness.models import build_model
from sweep.tiny import tiny_config
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, activations
from transformers.models.llama import modeling_llama

from hf_automodel_parallel.core.sharding_spec import Plan
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan_search import proof, proven_record
from hf_automodel_parallel.plan_search.code_origin import running_code
from hf_automodel_parallel.plan_search.proof import proven_plan
from hf_automodel_parallel.plan_search.search import derived_plan


def selected(model: nn.Module) -> Plan:
    return select_plan(model, None, ("hf", "registry", "default", "derived"), 2, derived_plan, proven_plan)


def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
    """A softmax over heads."""
    key, value = (modeling_llama.repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * module.scaling
    return (scores.softmax(1) @ value).transpose(1, 2), None


def registered() -> nn.Module:
    AttentionInterface.register("own_softmax_over_heads", attention)
    return build_model("llama", attn_implementation="own_softmax_over_heads")


ROTARY, EAGER = modeling_llama.apply_rotary_pos_emb, modeling_llama.eager_attention_forward
MLP, SDPA = modeling_llama.LlamaMLP.forward, F.scaled_dot_product_attention


def rotary(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
    q, k = ROTARY(q, k, *args, **kwargs)
    return q.roll(1, 1), k


def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).flip(-1))


class Flipped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x.flip(-1))


def flipped_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return SDPA(query.flip(1), key, value, *args, **kwargs)


def on_instances(model: nn.Module) -> nn.Module:
    """A forward of each instance, decorated by a function of a library."""
    for layer in model.model.layers:
        bound = types.MethodType(mlp, layer.mlp)
        layer.mlp.forward = functools.partial(bound)
    return model


@contextmanager
def code_of_mlp() -> Iterator[None]:
    """The code object in the stock function."""
    stock = MLP.__code__
    MLP.__code__ = mlp.__code__
    try:
        yield
    finally:
        MLP.__code__ = stock


@contextmanager
def entry_of_activations() -> Iterator[None]:
    stock = dict.__getitem__(activations.ACT2FN, "silu")
    activations.ACT2FN["silu"] = Flipped
    try:
        yield
    finally:
        activations.ACT2FN["silu"] = stock


CASES: dict[str, Any] = {
    "attention function": nullcontext,
    "function of a module": lambda: patch.object(modeling_llama, "apply_rotary_pos_emb", rotary),
    "forward of a class": lambda: patch.object(modeling_llama.LlamaMLP, "forward", mlp),
    "decorated forward of a class": lambda: patch.object(modeling_llama.LlamaMLP, "forward", torch.enable_grad()(mlp)),
    "code of a class": code_of_mlp,
    "forward of instances": nullcontext,
    "activation": entry_of_activations,
    "function of torch": lambda: patch.object(F, "scaled_dot_product_attention", flipped_attention),
}


def model_of(case: str) -> nn.Module:
    if case == "attention function":
        return registered()
    model = build_model("llama")
    return on_instances(model) if case == "forward of instances" else model


def test_replaced_code_of_a_stock_class_is_tried(monkeypatch):
    """Each is found under one name, and the trial with it finds what it does to the plan of the stock class."""
    failures: list[str] = []
    held = proof._held
    monkeypatch.setattr(proof, "_KNOWN", {})
    monkeypatch.setattr(proof, "_held", lambda trial, plan, failure: failures.append(failure) or plan)
    wrong: dict[str, Any] = {}
    for case, replaced in CASES.items():
        failures.clear()
        with replaced():
            model = model_of(case)
            own = running_code(model).own
            selected(model)
        left = running_code(build_model("llama")).own
        if len(own) != 1 or len(failures) != 1 or left:
            wrong[case] = own, failures, left
    assert not wrong
    monkeypatch.setattr(proof, "_held", held)
    proof._KNOWN.clear()
    with patch.object(modeling_llama, "apply_rotary_pos_emb", rotary):
        plan = selected(build_model("llama"))
        assert [note for note in plan.notes if "self_attn: sharded one layer at a time" in note]
        assert {e.style for p, e in plan.entries.items() if ".self_attn." in p} == {
            "colwise_gather_output",
            "rowwise_split_input",
        }


def test_code_that_the_record_does_not_have_is_tried(monkeypatch):
    """Stock code of a known release costs milliseconds; of another source, or with another plan, it is tried."""
    tries: list[float] = []
    trial = proof._Trial

    def counted(*args: Any) -> Any:
        tries.append(0.0)
        return trial(*args)

    monkeypatch.setattr(proof, "_Trial", counted)
    monkeypatch.setattr(proof, "_KNOWN", {})
    model = build_model("llama")
    selected(model)  # reads files
    start = time.process_time()
    assert not any("tried by values" in note for note in selected(model).notes)
    assert time.process_time() - start < 1 and not tries
    other = Plan("hf", {k: v for k, v in select_plan(model).entries.items() if ".mlp." in k})
    assert not proven_record.is_recorded(model, other, running_code(model).modules)
    digest = proven_record.source_digest
    changed = lambda name: digest(name).replace("a", "b").replace("0", "1") + "x"  # noqa: E731
    monkeypatch.setattr(proven_record, "source_digest", changed)
    start = time.process_time()
    assert any("tried by values: equal to one process" in note for note in selected(model).notes)
    assert time.process_time() - start < 5 and len(tries) == 1
    selected(model)
    assert len(tries) == 1


@pytest.mark.both_ends
def test_the_record_has_the_plans_of_the_installed_release():
    """Of both supported ends: no class that is in wide use is tried at prepare."""
    types = ["llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "phi3", "olmo2", "qwen3_moe", "glm4", "cohere"]
    missing = []
    for name in types:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(name))
        if not proven_record.is_recorded(model, select_plan(model), running_code(model).modules):
            missing.append(name)
    assert not missing, "make record"
