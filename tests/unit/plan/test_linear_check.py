"""Linear layers with a forward of their own (BitNet and the like): right on shares, or whole, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.training import build
from torch import nn

from hf_automodel_parallel.core.model_structure import find_layers
from hf_automodel_parallel.core.sharding_spec import ShardingSpec
from hf_automodel_parallel.errors import PlanError
from hf_automodel_parallel.plan.analysis.varying_check import complete
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan_search import proxy_model
from hf_automodel_parallel.plan_search.parity_check import parallel_copy, run_once
from hf_automodel_parallel.plan_search.proxy_model import replaced_modules
from hf_automodel_parallel.tensor_parallel.thread_group import run_ranks

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


class BitLinear(nn.Linear):
    """One scale for the whole weight, with a straight-through gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight.abs().mean()
        ternary = (self.weight / scale).round().clamp(-1, 1) * scale
        return F.linear(x, self.weight + (ternary - self.weight).detach(), self.bias)


class NormedInput(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.rms_norm(x, (x.shape[-1],)), self.weight, self.bias)


class Activated(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(x, self.weight, self.bias))


class Scaled(nn.Linear):
    def __init__(self, *sizes: int, bias: bool) -> None:
        super().__init__(*sizes, bias=bias)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * self.scale


def with_layers(kind: Any, names: tuple[str, ...], model: str = "llama") -> nn.Module:
    """A Llama some of whose linear layers somebody has replaced."""
    result = build(model)
    for name, module in list(result.named_modules()):
        owner, _, key = name.rpartition(".")
        if key in names:
            new = kind(module.in_features, module.out_features, bias=module.bias is not None)
            new.weight = module.weight
            setattr(result.get_submodule(owner), key, new)
    return result.eval()


def completed(model: nn.Module, plan: Any = None, order: tuple[str, ...] = ("hf",)) -> ShardingSpec:
    chosen = select_plan(model, plan, order, tp_size=2)
    spec = resolve(model, chosen, 2)
    complete(model, spec, find_layers(model), 2, chosen.strict)
    return spec


@pytest.mark.parametrize(
    ("kind", "names", "stays_sharded"),
    [
        (BitLinear, COLUMNS, False),
        (BitLinear, ROWS, False),
        (BitLinear, ("lm_head",), False),
        (NormedInput, COLUMNS, True),
        (NormedInput, ("o_proj",), False),
        (Activated, (*COLUMNS, "lm_head"), True),
        (Activated, ROWS, False),
        (Scaled, (*COLUMNS, *ROWS), True),
        (Scaled, ("lm_head",), False),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_what_two_ranks_compute(kind, names, stays_sharded):
    model = with_layers(kind, names)
    spec = completed(model)
    for name, module in model.named_modules():
        if isinstance(module, kind):
            assert (spec.parameters.get(f"{name}.weight") is not None) is stays_sharded, name
            assert stays_sharded or any(name.startswith(note.split(" is replicated")[0]) for note in spec.notes)
    inputs = {"input_ids": torch.arange(18).view(2, 9), "use_cache": False}
    names_of = {module: name for name, module in model.named_modules()}
    layers = [names_of[layer] for layer in find_layers(model)]
    want = run_once(model, inputs)
    for got in run_ranks(2, lambda mesh: run_once(parallel_copy(model, spec, layers, mesh), inputs)):
        torch.testing.assert_close(got.outputs, want.outputs, rtol=1e-5, atol=1e-5)
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            if name not in spec.parameters:
                torch.testing.assert_close(got.gradients[name], want.gradients[name], rtol=1e-4, atol=1e-4)


def test_a_tied_head_takes_its_embedding_along():
    spec = completed(with_layers(BitLinear, ("lm_head",), "llama_tied"))
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & spec.parameters.keys()
    assert not {"lm_head", "model.embed_tokens"} & spec.modules.keys()


@pytest.mark.parametrize(("names", "place"), [(COLUMNS, "model.layers.0.self_attn.q_proj"), (("lm_head",), "lm_head")])
def test_in_a_plan_of_the_user_s_own_it_is_refused(names, place):
    plan = {f"model.layers.*.self_attn.{key}_proj": "colwise" for key in "qkv"}
    plan |= {"model.layers.*.self_attn.o_proj": "rowwise", "lm_head": "colwise_gather_output"}
    with pytest.raises(PlanError, match=f"wrong for {place}.*the forward of BitLinear"):
        completed(with_layers(BitLinear, names), plan)


class NormedActivation(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.gelu(x), dim=-1)


def test_replaced_modules_are_seen_through_adapters():
    model = build("gpt2", {})
    assert replaced_modules(model) == []
    model.get_base_model().transformer.h[1].mlp.act = NormedActivation()
    assert replaced_modules(model) == ["transformer.h.1.mlp.act"]


def test_a_replaced_module_whose_name_begins_like_a_wrapped_one(monkeypatch):
    """PEFT's "base_layer" is a whole part of a name."""

    def built(*_: Any) -> nn.Module:
        return nn.ModuleDict({"base_layer_norm": nn.ModuleDict({"base_layer_norm": nn.LayerNorm(4)})})

    monkeypatch.setattr(proxy_model, "build_proxy_model", built)
    model = built()
    assert replaced_modules(model) == []
    model["base_layer_norm"]["base_layer_norm"] = nn.Identity()
    assert replaced_modules(model) == ["base_layer_norm.base_layer_norm"]
