"""Deriving plans in one process: what is found, what is refused, and that a wrong plan is not accepted."""

from __future__ import annotations

import pytest
import torch
from harness.models import build_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
)

from hf_automodel_parallel import verify_plan
from hf_automodel_parallel.core.sharding_spec import Plan, PlanEntry
from hf_automodel_parallel.errors import PlanError
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan_search.parity_check import ParityCheck
from hf_automodel_parallel.plan_search.proxy_model import HIDDEN, INTERMEDIATE, build_proxy_model, proxy_config
from hf_automodel_parallel.plan_search.search import derived_plan
from hf_automodel_parallel.tensor_parallel.thread_group import run_ranks


def styles(plan: Plan) -> dict[str, str]:
    return {pattern: entry.style for pattern, entry in plan.entries.items()}


GPT2 = {
    "transformer.h.*.attn.c_attn": "qkv_colwise",
    "transformer.h.*.attn.c_proj": "rowwise",
    "transformer.h.*.mlp.c_fc": "colwise",
    "transformer.h.*.mlp.c_proj": "rowwise",
    "transformer.wte": "embedding_rowwise",
    "lm_head": "colwise_gather_output",
}


def test_gpt2():
    model = build_model("gpt2")
    state = torch.get_rng_state()
    plan = select_plan(model, plan_order=("hf", "registry", "default", "derived"), tp_size=2, derive=derived_plan)
    assert torch.equal(torch.get_rng_state(), state), "the random state of the training is left alone"
    assert plan.origin == "derived" and styles(plan) == GPT2
    assert plan.counts == {"transformer.h.*.attn": ("num_heads", "embed_dim", "split_size")}
    assert any("no _tp_plan" in note for note in plan.notes) and any("gradient" in note for note in plan.notes)


def test_heads_that_do_not_divide_are_gathered():
    """Three ranks cannot share four heads: the projections are sharded, the attention is whole on each rank."""
    plan = derived_plan(build_model("gpt2", num_attention_heads=4), tp_size=3)
    assert styles(plan)["transformer.h.*.attn.c_attn"] == "colwise_gather_output"
    assert styles(plan)["transformer.h.*.mlp.c_fc"] == "colwise" and not plan.counts


HYBRIDS = {
    # where its attention is, which a proxy model has to show too
    "bamba": ({"attn_layer_indices": [9, 18, 27]}, "model.layers.*.self_attn"),
    # one attention for several layers, so that two of them are needed; it reads more than the hidden states
    "zamba": ({}, "model.layers.*.shared_transf.self_attn"),
    "zamba2": ({}, "model.layers.*.shared_transformer.self_attn"),
    # recurrent, recurrent, attention, and so on; the recurrent ones keep states between two forwards
    "recurrent_gemma": ({}, "model.layers.*.temporal_block"),
}


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_hybrids_of_state_space_layers_and_attention(model_type):
    """At their real sizes: a proxy model keeps what the sizes have to do with each other, and each kind of layer."""
    fields, attention = HYBRIDS[model_type]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    found = styles(derived_plan(model, tp_size=2))
    assert [found.get(f"{attention}.{name}_proj") for name in "qkvo"] == ["colwise", "colwise", "colwise", "rowwise"]


def test_what_kernels_read_is_left_whole():
    """Mamba hands weights to fused kernels where these are installed: the run without them shows nothing of it."""
    for model_type in ("mamba", "mamba2", "falcon_mamba"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
        assert {p.rpartition(".")[2] for p in styles(derived_plan(model, tp_size=2))} == {
            "in_proj",
            "embeddings",
            "lm_head",
        }


def test_a_plan_that_forgets_something_fails_the_check():
    """The proof is what makes a derived plan safe, so it has to see every kind of mistake."""
    small = build_proxy_model(build_model("gpt2"))
    check = ParityCheck(small, 2)

    def failure(changes: dict[str, str], counts: dict[str, tuple[str, ...]]) -> str | None:
        wanted = {k: v for k, v in (GPT2 | changes).items() if v}
        return check.failure(Plan("derived", {k: PlanEntry(k, v, "") for k, v in wanted.items()}, counts=counts))

    right = {"transformer.h.*.attn": ("split_size",)}
    assert failure({}, right) is None
    assert "ValueError" in failure({}, {}), "its forward splits into thirds of the whole width"
    assert failure({"transformer.h.*.attn.c_attn": "colwise"}, right) is not None, "q, k and v are mixed up"
    assert failure({"transformer.h.*.mlp.c_fc": ""}, right) is not None
    # Only a gradient shows this one: the norm's output enters the sharded region through no boundary.
    qwen = ParityCheck(build_proxy_model(build_model("qwen3")), 2)
    entries = select_plan(build_model("qwen3")).entries
    assert qwen.failure(Plan("explicit", dict(entries))) is None
    forgotten = {k: v for k, v in entries.items() if "norm" not in k}
    assert "gradient of model.layers.0.self_attn" in qwen.failure(Plan("explicit", forgotten))


def test_layers_that_take_keys_and_values_of_others():
    """Gemma3n: a width for each layer, and last layers that go by their number, so that all layers are kept."""
    model = build_model("gemma3n", num_kv_shared_layers=4)
    small = build_proxy_model(model)
    assert small.config.num_hidden_layers == model.config.num_hidden_layers
    assert set(small.config.intermediate_size) == {INTERMEDIATE}
    assert small.model.layers[0].mlp.up_proj.weight.shape == (INTERMEDIATE, HIDDEN)


def test_verify_plan():
    report = verify_plan(build_model("llama").config, tp=2)
    assert report.plan.origin == "hf" and report.ranks == 2 and report.parameters > 20
    with pytest.raises(PlanError, match=r"does not compute what one process does.*tp_plan"):
        wrong = {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"}
        verify_plan(build_model("llama"), tp=2, plan=wrong)
    with pytest.raises(PlanError, match=r"^the tp_plan entries 'model.layer.\*.up_proj' match no module"):
        verify_plan(build_model("llama"), tp=2, plan={"model.layer.*.up_proj": "colwise"})
    with pytest.raises(PlanError, match="tp=1"):
        verify_plan(build_model("llama"), tp=1)
    attention = {f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
    # as prepare would take it: the norms of heads, which it does not name, are seen to
    verify_plan(build_model("qwen3"), tp=2, plan=attention | {"model.layers.*.self_attn.o_proj": "rowwise"})


def test_what_cannot_be_tried_is_refused():
    class Plain(nn.Module):
        pass

    with pytest.raises(PlanError, match="Plain has no config"):
        derived_plan(Plain())
    with pytest.raises(
        PlanError, match=r"no tensor-parallel plan for the class Plain.*tp_plan=.*derived: Plain has no"
    ):
        select_plan(Plain(), plan_order=("hf", "derived"), derive=derived_plan)


def test_a_rank_that_fails_releases_the_others():
    def wait(mesh):
        if mesh.rank == 1:
            raise RuntimeError("no such shape")
        mesh.exchange(torch.zeros(1))

    with pytest.raises(RuntimeError, match="no such shape"):
        run_ranks(3, wait)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_encoders_with_a_classification_head(model_type):
    config = AutoConfig.for_model(model_type, num_labels=3, pad_token_id=0, vocab_size=400)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(proxy_config(config))
    plan = derived_plan(model, tp_size=2)
    assert "rowwise" in styles(plan).values() and "embedding_rowwise" in styles(plan).values()


def test_multiple_choice():
    """Several rows of tokens for each sample: a batch without them cannot be run."""
    with torch.device("meta"):
        config = AutoConfig.for_model("bert", hidden_size=32, num_attention_heads=4, intermediate_size=64)
        model = AutoModelForMultipleChoice.from_config(config)
    plan = styles(derived_plan(model, tp_size=2))
    assert plan["bert.encoder.layer.*.attention.self.query"] == "colwise"
    assert plan["bert.encoder.layer.*.output.dense"] == "rowwise"


def test_the_users_config_is_left_alone():
    model = build_model("gpt2")
    before = model.config.to_dict()
    proxy_config(model.config)
    assert model.config.to_dict() == before
