"""A resolved plan is run with the shapes of one rank on fake tensors, and fused experts are checked numerically."""

import gc
import json

import pytest
import torch
from harness.models import lora
from sweep.tiny import build
from torch.nn import functional as F

from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.core.sharding_spec import PARTIAL_GRADIENT, InputHook, OutputHook
from hf_automodel_parallel.errors import PlanError, UnsupportedError
from hf_automodel_parallel.plan.analysis.feature_shard import FeatureShard
from hf_automodel_parallel.plan.analysis.varying import (
    FEATURES,
    INVARIANT,
    VARYING,
    Value,
    VaryingTrace,
    WrongPlan,
)
from hf_automodel_parallel.plan.analysis.varying_check import VaryingCheck, complete
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan.validate import refuse_expert_parallel


def completed(model, tp_plan=None, size=2):
    plan = select_plan(model, tp_plan)
    spec = resolve(model, plan, size)
    complete(model, spec, find_structure(model).layers, size, plan.strict)
    return spec


def partial(spec):
    return {
        name.rpartition("layers.0.")[2]
        for name, p in spec.parameters.items()
        if p == PARTIAL_GRADIENT and "layers.0." in name
    }


# ---- parameters between sharded layers
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, overrides, expected",
    [
        ("llama", {}, set()),
        ("apertus", {}, {f"self_attn.{n}_norm.weight" for n in "qk"} | {f"mlp.act_fn.alpha_{n}" for n in "np"}),
        ("glm4_moe", {"use_qk_norm": True}, {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}),
        (
            "phi",
            {"qk_layernorm": True},
            {f"self_attn.{n}_layernorm.{p}" for n in "qk" for p in ("weight", "bias")},
        ),
    ],
)
def test_replicated_parameters_on_differing_values_get_a_partial_gradient(model_type, overrides, expected):
    assert partial(completed(build(model_type, **overrides))) == expected


def test_the_names_that_peft_gives_are_marked_too():
    spec = completed(lora(build("apertus")))
    assert spec.parameters["base_model.model.model.layers.1.mlp.act_fn.alpha_p"] == PARTIAL_GRADIENT


def test_what_is_marked_is_in_the_table_for_people():
    rows = [row for row in completed(build("apertus")).rows if row[4] == "derived: run on fake tensors"]
    assert ("model.layers.*.mlp.act_fn.alpha_p", "between sharded layers", 2, "Replicate, Partial gradient") in [
        r[:4] for r in rows
    ]


# ---- plans that cannot be right
# ----------------------------------------------------------------------------------------

LAYER = "model.layers.*."
HALVES = {
    "only the way in": ({LAYER + "mlp.up_proj": "colwise"}, r"model\.layers\.0\.mlp \(LlamaMLP\)"),
    "one of two factors": (
        {LAYER + "mlp.up_proj": "colwise", LAYER + "mlp.down_proj": "rowwise"},
        r"model\.layers\.0\.mlp \(LlamaMLP\)",
    ),
    "only the queries": (
        {LAYER + "self_attn.q_proj": "colwise", LAYER + "self_attn.o_proj": "rowwise"},
        r"model\.layers\.0\.self_attn",
    ),
    "only the way out": ({LAYER + "mlp.down_proj": "rowwise"}, r"model\.layers\.0\.mlp\.down_proj"),
    "a sum of equal values": ({LAYER + "mlp": "all_reduce"}, r"model\.layers\.0\.mlp .*all-reduce multiplies it by 2"),
}


@pytest.mark.parametrize("plan, where", HALVES.values(), ids=HALVES.keys())
def test_an_explicit_plan_with_half_of_a_pair_is_refused_by_name(plan, where):
    with pytest.raises(PlanError, match=where):
        completed(build("llama"), plan)


def test_where_a_model_brings_a_plan_that_does_not_fit_the_part_stays_whole():
    spec = completed(build("doge"))
    assert not [name for name in (*spec.modules, *spec.parameters) if ".self_attn." in name]
    assert "model.layers.0.mlp.up_proj" in spec.modules
    assert any("model.layers.1.self_attn is replicated on every rank" in note for note in spec.notes)


def test_a_statistic_over_features_that_are_spread_over_ranks_is_seen():
    spec = completed(build("gemma3n_text"))
    assert not [name for name in spec.modules if "layers.0.mlp." in name]
    assert [name for name in spec.modules if "layers.0.self_attn." in name]
    assert any("aten.mean.dim combines features" in note for note in spec.notes)


# ---- experts
# -----------------------------------------------------------------------------------------------------------


def test_fused_experts_are_cut_so_that_the_shares_add_up():
    spec = completed(build("inkling_text"))  # its plan says one block, its forward takes the halves for gate and up
    assert spec.parameters["model.layers.0.mlp.experts.gate_up_proj"].blocks == 2
    assert spec.modules["model.layers.0.mlp.shared_experts"].input is InputHook.COPY_ALL_TO_TP
    assert spec.modules["model.layers.0.mlp.shared_experts"].output is OutputHook.REDUCE_FROM_TP


def test_adapters_on_fused_experts_follow_the_cut():
    adapters = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    spec = completed(lora(build("inkling_text"), **adapters))
    cut = [p for name, p in spec.parameters.items() if "experts" in name and "lora_B" in name and p.dim is not None]
    assert cut and all(p.blocks == 2 for p in cut)


def test_an_explicit_plan_that_cuts_fused_experts_wrongly_is_refused():
    experts = LAYER + "mlp.experts"
    plan = {experts: "moe_tp_experts", f"{experts}.gate_up_proj": "colwise", f"{experts}.down_proj": "rowwise"}
    with pytest.raises(PlanError, match="do not sum to that of one process. gate_up_proj is packed"):
        completed(build("qwen3_moe"), plan)
    spec = completed(build("qwen3_moe"), plan | {f"{experts}.gate_up_proj": "packed_colwise"})
    assert spec.parameters["model.layers.0.mlp.experts.gate_up_proj"].blocks == 2


@pytest.mark.parametrize("wanted", [{"ep_size": 2}, {"enable_expert_parallel": True}], ids=json.dumps)
def test_expert_parallelism_of_transformers_is_refused_by_name(wanted):
    model = build("qwen3_moe")
    refuse_expert_parallel(model)
    model.config.distributed_config = wanted
    with pytest.raises(UnsupportedError, match=f"{next(iter(wanted))}=.*expert parallelism.*Use tp_size"):
        refuse_expert_parallel(model)


# ---- the rules
# ---------------------------------------------------------------------------------------------------------


def test_rules():
    weight, x, own = torch.ones(4), torch.ones(3, 4), torch.ones(3, 4)
    trace = VaryingTrace({id(weight): Value(parameters=frozenset(["w"]))})
    trace.mark(x, INVARIANT)
    trace.mark(own, VARYING)
    with trace:
        doubled = weight * 2
        assert trace.value(doubled).parameters == {"w"}
        assert trace.value(x * doubled) == INVARIANT and "w" in trace.complete and not trace.partial
        assert trace.value(own + doubled) == VARYING and "w" in trace.partial
        with pytest.raises(WrongPlan, match="combines a replicated activation"):
            x * own
        assert trace.value(trace.copied_to_tp(x) * own) == VARYING
        target = torch.zeros(3, 4)
        target[:, :2].copy_(own[:, :2])  # through a view
        assert trace.value(target).varying


def test_a_tail_that_differs_is_told_from_the_rest():
    x = torch.ones(3, 10)
    trace = VaryingTrace({})
    trace.mark(x, Value(varying=True, tail=4))
    with trace:
        latent, rotary = torch.split(x, [6, 4], dim=-1)
        assert (trace.value(latent), trace.value(rotary)) == (INVARIANT, VARYING)
        assert trace.value(x[..., :6]) == INVARIANT


def test_shares_of_features_are_not_combined():
    x = torch.ones(2, 3, 8)
    trace = VaryingTrace({})
    trace.mark(x, FEATURES)
    with trace:
        y = torch.nn.functional.silu(x)
        with pytest.raises(WrongPlan, match="sharded over the ranks"):
            y.mean(-1)
        assert y.mean(1) is not None  # over tokens
        heads = y.view(2, 3, 2, 4)
        assert heads.mean(-1) is not None  # within a head


def test_shards_of_features_are_followed_through_views():
    """What combines, moves or cuts heads is seen after views; what happens within a head or over tokens is right."""
    wrong = {
        "softmax over heads": lambda x: x.view(2, 3, 2, 4).transpose(1, 2).softmax(1),
        "norm of all heads": lambda x: F.layer_norm(
            x.view(2, 3, 2, 4).transpose(1, 2).transpose(1, 2).flatten(2), (8,)
        ),
        "fake quantisation": lambda x: x.detach().abs().amax(-1, keepdim=True),
        "talking heads": lambda x: (lambda h: (h @ h.mT).softmax(-1).roll(1, 1))(x.view(2, 3, 2, 4).transpose(1, 2)),
        "rolled features": lambda x: x.roll(1, -1),
        "swapped halves": lambda x: x.chunk(2, -1)[1],
        "the first head": lambda x: x.unflatten(-1, (2, 4))[:, :, 0],
        "behind permute and unsqueeze": lambda x: x.view(2, 3, 2, 4).permute(2, 0, 1, 3).unsqueeze(1).flip(0),
        "repeated keys": lambda x: x.view(2, 3, 2, 4)[:, :, :, None].expand(2, 3, 2, 5, 4).reshape(2, 3, 10, 4).sum(2),
        "heads beside a norm": lambda x: x.view(2, 3, 2, 4).mean(-1).cumsum(-1),
        "most of the features": lambda x: x[..., :6],
    }
    right = {
        "within a head": lambda x: x.view(2, 3, 2, 4).roll(1, -1).chunk(2, -1)[1].softmax(-1),
        "over tokens": lambda x: x.view(2, 3, 2, 4).transpose(1, 2).flip(2)[:, :, 1:].cumsum(2),
        "products of heads": lambda x: (lambda h: (h @ h.mT).softmax(-1) @ h)(x.view(2, 3, 2, 4).transpose(1, 2)),
        "all features": lambda x: x[..., :8][..., 0:].detach(),
        "one head on each rank": lambda x: x.view(2, 3, 1, 8).mean(-1),
        "batches and heads": lambda x: x.view(2, 3, 2, 4).transpose(1, 2).reshape(4, 3, 4)[1:],
    }
    packed = Value(varying=True, features=FeatureShard(blocks=2))
    seen = {}
    for name, function in {**wrong, **right}.items():
        x = torch.ones(2, 3, 8)
        trace = VaryingTrace({})
        trace.mark(x, FEATURES)
        try:
            with trace:
                assert trace.value(function(x)).varying
        except WrongPlan as error:
            seen[name] = str(error)
    assert seen.keys() == wrong.keys() and all("that are sharded over the ranks" in s for s in seen.values()), seen
    trace = VaryingTrace({})
    trace.mark(x, packed)
    with trace:
        gate, up = x.chunk(2, -1)
        assert trace.value(gate * up) == VARYING
        with pytest.raises(WrongPlan, match="combines features"):
            x.detach().mean(-1)


def test_memory_that_was_freed_is_forgotten():
    """What is known of a tensor does not depend on the memory that it happens to get, which differs between ranks."""
    weight = torch.ones(4)
    trace = VaryingTrace({id(weight): Value(parameters=frozenset(["weight"]))})
    with trace:
        for _ in range(50):
            torch.zeros(4).add_(torch.ones(4))
            made = weight * 2
            assert trace.value(made).parameters == {"weight"}
            del made


def test_what_is_known_by_an_id_stays_alive(monkeypatch):
    """Doge's attention and MLP are left replicated, which takes their fake parameters out of the copy that runs."""
    alive = []
    run = VaryingCheck.run

    def watched(check):
        run(check)
        living = {id(found) for found in gc.get_objects()}
        alive.append([key in living for key in check.trace.facts])

    monkeypatch.setattr(VaryingCheck, "run", watched)
    spec = completed(build("doge"))
    assert any("is replicated on every rank" in note for note in spec.notes)
    assert alive and all(map(all, alive))
