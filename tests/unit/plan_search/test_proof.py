"""Plans are tried by values on classes that no release of the libraries has: what mixes heads or features is found."""

from __future__ import annotations

import time

import pytest
import torch
from harness.mixing import FEATURES, HEADS, mixing_model
from harness.models import build_model
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from hf_automodel_parallel.core.sharding_spec import Plan
from hf_automodel_parallel.errors import PlanError
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan_search import proof
from hf_automodel_parallel.plan_search.parity_check import ParityCheck
from hf_automodel_parallel.plan_search.proof import proven_plan
from hf_automodel_parallel.plan_search.search import derived_plan

ORDER = ("hf", "registry", "default", "derived")


def selected(model: nn.Module, tp_plan: dict[str, str] | None = None) -> Plan:
    return select_plan(model, tp_plan, ORDER, 2, derived_plan, proven_plan)


def failure(model: nn.Module, plan: Plan, length: int = 7) -> str | None:
    """The first difference of the model itself, at its own sizes and in training mode."""
    return ParityCheck(model, 2, length, training=True, labels=True).failure(plan, completed=plan.origin != "derived")


@pytest.mark.parametrize("mixings", [["", *HEADS], [*FEATURES]], ids=["heads", "features"])
def test_parameter_free_mixing(mixings):
    """Every plan that is selected computes what one process does; what does not is gathered, and a note names it."""
    wrong = {}
    for mixing in mixings:
        model = mixing_model(mixing)
        length = 151 if "long" in mixing else 7
        plan = selected(model)
        found = failure(model, plan, length)
        block = "" if not mixing else "self_attn" if mixing in HEADS else "mlp"
        named = {part for part in ("self_attn", "mlp") for note in plan.notes if f".{part}: " in note}
        styles = {e.style for p, e in plan.entries.items() if block and block in p}
        expected = {block} - {""} if styles != {"colwise", "rowwise"} else set()
        # Without the run on fake tensors, which finds some of them, too.
        check = ParityCheck(model, 2, length, training=True, labels=True)
        untried = check.failure(select_plan(model, None, ORDER))
        if found or named != expected or (bool(expected) != bool(untried)) or plan.origin != "default":
            wrong[mixing] = found, named, expected, untried, plan
    assert not wrong


class FlippedSiLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * x.detach().flip(-1).sign()


class ReversedHeads(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> object:
        hooked = self.o_proj.register_forward_pre_hook(lambda _, args: (args[0].flip(-1),))
        try:
            return super().forward(hidden_states, **kwargs)
        finally:
            hooked.remove()


class FlippedMLP(LlamaMLP):
    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.scales = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scales
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).flip(-1))


def replace_forward(model: nn.Module) -> None:
    """As quantisation tools do it: a function around the original method."""
    for layer in model.model.layers:
        original = layer.mlp.act_fn.forward
        layer.mlp.act_fn.forward = lambda x, original=original: original(x.flip(-1))


def with_replaced(kind: str) -> nn.Module:
    model = build_model("llama", num_hidden_layers=3)
    if kind == "forward":
        replace_forward(model)
    elif kind == "activation":
        for layer in model.model.layers:
            layer.mlp.act_fn = FlippedSiLU()
    elif kind == "attention of one layer":
        model.model.layers[2].self_attn = ReversedHeads(model.config, 2)
    elif kind == "MLP":
        for layer in model.model.layers:
            layer.mlp = FlippedMLP(model.config)
    return model


def test_modules_replaced_after_the_model_was_built():
    """The plan of Hugging Face for a stock class, whose parts a user has replaced."""
    wrong = {}
    for kind, block in {
        "forward": "mlp",
        "activation": "mlp",
        "attention of one layer": "self_attn",
        "MLP": "mlp",
    }.items():
        plan = selected(with_replaced(kind))
        styles = {e.style for p, e in plan.entries.items() if f".{block}." in p}
        if (
            plan.origin != "hf"
            or styles - {"colwise_gather_output", "rowwise_split_input"}
            or "rowwise" not in {e.style for e in plan.entries.values()}
        ):
            wrong[kind] = plan
        with pytest.raises(
            PlanError,
            match=r"tp_plan does not compute.*(in evaluation mode with 7 tokens|aten.flip.* moves).*tp_size=1",
        ):
            selected(with_replaced(kind), {p: e.style for p, e in select_plan(build_model("llama")).entries.items()})
    assert not wrong


def test_what_a_trial_costs():
    """CPU time; in a process without a process group, so without a collective."""
    assert not torch.distributed.is_initialized()
    costs = {}
    for name, model in (
        ("stock", build_model("llama", num_hidden_layers=6)),
        ("unknown", mixing_model(vocab_size=136)),
    ):
        plan = select_plan(model, None, ORDER)
        started = time.process_time()
        proven_plan(model, plan)
        costs[name] = time.process_time() - started
    assert costs["stock"] < 1 and costs["unknown"] < 5, costs


def test_stock_classes_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(proof, "_Trial", lambda *_: pytest.fail("tried"))
    assert selected(build_model("llama")).origin == "hf"
    with pytest.raises(BaseException, match="tried"):
        selected(mixing_model("", num_hidden_layers=1))


def test_what_cannot_be_tried_is_said(caplog):
    """A module that runs at some sizes only; the run on fake tensors is what is left."""

    class Sized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.silu(x) if x.shape[-1] in (64, 128) else None

    model = build_model("llama")
    model.model.layers[0].mlp.act_fn = Sized()
    plan = selected(model)
    assert plan.origin == "hf" and any("was not tried by values" in note for note in plan.notes)
    assert "runs code of its own (Sized)" in caplog.text


def test_a_process_tries_a_plan_once(monkeypatch):
    first = selected(mixing_model("rolled heads"))
    monkeypatch.setattr(proof, "_Trial", lambda *_: pytest.fail("tried again"))
    assert selected(mixing_model("rolled heads")) == first
