"""The table of optimised plans, how it is looked up, and what happens where a plan does not fit. No process group."""

import copy
from types import SimpleNamespace

import pytest
import torch
from harness.decilm import DeciLMForCausalLM
from harness.models import MODELS
from harness.planned_models import CONFIGS, REGISTRY_FIRST, adapted, build_family
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Mistral3Config, Qwen3ForCausalLM
from transformers import Mistral3ForConditionalGeneration as Mistral3

from hf_automodel_parallel import PlanError, register_optimized_plan
from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.core.model_view import pattern_regex
from hf_automodel_parallel.core.sharding_spec import PARTIAL_GRADIENT
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan.sources import registry as optimized
from hf_automodel_parallel.plan.sources.families import FAMILIES, KINDS, LLAMA_NEMOTRON_SUPER_TP_PLAN_NAME
from hf_automodel_parallel.plan.sources.registry import OPTIMIZED_PLANS, PARALLELIZE_FUNCTIONS
from hf_automodel_parallel.plan.validate import validate

pytestmark = pytest.mark.both_ends  # the classes differ between versions of transformers

DEFAULT_ORDER = ("hf", "registry", "default")


def built(name, cls=None, **overrides):
    """A model of a family, or of ``cls`` with the family's config, without memory."""
    with torch.device("meta"):
        model = build_family(name, **overrides)
        return model if cls is None else cls(model.config)


def of_the_harness(name, **overrides):
    model_type, values = MODELS[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(values | overrides)))


def spec_of(model, plan, tp_size=2):
    spec = resolve(model, plan, tp_size)
    validate(model, spec, tp_size)
    return spec


@pytest.fixture
def registry(monkeypatch):
    """The registry, put back after the test."""
    monkeypatch.setattr(optimized, "OPTIMIZED_PLANS", dict(optimized.OPTIMIZED_PLANS))
    return optimized.OPTIMIZED_PLANS


# ---- the table ----------------------------------------------------------------------------------------------------


def test_table_and_test_models_are_of_the_same_classes():
    assert FAMILIES.keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_no_dead_keys(name):
    """Every key matches a module or parameter, in every mode, and there is a head and an embedding among them."""
    model = built(name)
    plan = FAMILIES[name](model)
    names = [n for n, _ in (*model.named_modules(), *model.named_parameters())]
    assert [key for key in plan if not any(map(pattern_regex(key).fullmatch, names))] == []
    assert plan[FAMILIES[name].head] == "colwise_gather_output"
    assert plan[f"{FAMILIES[name].text}.embed_tokens"] == "embedding_rowwise"


def test_every_entry_of_every_kind_is_used_by_a_class():
    used = {kind: set() for kind in KINDS}
    for name, family in FAMILIES.items():
        if family.kind in KINDS:
            used[family.kind] |= {key.removeprefix(f"{family.text}.") for key in FAMILIES[name](built(name))}
    assert [f"{kind}: {key}" for kind, entries in KINDS.items() for key in entries if key not in used[kind]] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_wins_when_asked_for_first(name):
    """With and without adapters; the layers are found, the plan fits them, head norms have a partial gradient."""
    model = built(name)
    plan = select_plan(model, None, REGISTRY_FIRST)
    assert (plan.origin, plan.notes) == ("registry", ())
    assert {entry.source for entry in plan.entries.values()} == {f"registry: {name}"}
    spec = spec_of(model, plan)
    assert spec.unmatched == []
    norms = [
        n for n, _ in model.named_parameters() if n.split(".")[-2] in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
    ]
    assert [n for n in norms if spec.parameters[n] != PARTIAL_GRADIENT] == []
    layers = {type(layer).__name__ for layer in find_structure(model).layers}
    assert any("DecoderLayer" in layer for layer in layers)
    with torch.device("meta"):
        wrapped = adapted(name)
    assert select_plan(wrapped, None, REGISTRY_FIRST).entries == plan.entries


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_own_plan_comes_first_by_default(name):
    """DeciLM has none, and Falcon-H1's own plan names the embedding and the head, but no layer."""
    expected = "registry" if name in ("DeciLMForCausalLM", "FalconH1ForCausalLM") else "hf"
    assert select_plan(built(name), None, DEFAULT_ORDER).origin == expected


@pytest.mark.parametrize(
    "name", ["Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration", "DeciLMForCausalLM"]
)
def test_heads_of_composite_and_heterogeneous_models_are_checked(name):
    model = built(name)
    with pytest.raises(
        PlanError, match=r"num_\w+_heads=\d does not divide by tp_size=8|and 4 heads for tp_size=8 ranks"
    ):
        spec_of(model, select_plan(model, None, REGISTRY_FIRST), tp_size=8)


def test_tied_ends_are_planned_alike():
    for name in ("Qwen2ForCausalLM", "Gemma3ForConditionalGeneration"):
        model = built(name)
        model.tie_weights()
        assert model.lm_head.weight is model.get_input_embeddings().weight
        spec = spec_of(model, select_plan(model, None, REGISTRY_FIRST))
        assert spec.parameters["lm_head.weight"] == spec.parameters[f"{FAMILIES[name].text}.embed_tokens.weight"]


def test_phi3_needs_fewer_gathered_activations_than_its_own_plan():
    model = built("Phi3ForCausalLM")

    def gathered(order):
        modules = spec_of(model, select_plan(model, None, order)).modules
        return sum(m.output.value == "gather" for m in modules.values())

    assert gathered(REGISTRY_FIRST) < gathered(DEFAULT_ORDER)


# ---- looking up ---------------------------------------------------------------------------------------------------


def test_found_through_the_bases_of_a_class():
    """A clone with a mixin, under another name, in another module."""

    class Mixin:
        pass

    clone = type("MyClone", (Mixin, Qwen3ForCausalLM), {"__module__": "transformers_modules.abc123.modeling"})
    plan = select_plan(built("Qwen3ForCausalLM", clone), None, REGISTRY_FIRST)
    assert plan.origin == "registry"
    assert {entry.source for entry in plan.entries.values()} == {"registry: Qwen3ForCausalLM"}


def test_key_with_the_module_is_more_precise(registry):
    """The reference's form of a key; the bare name of the same class stays what it is for other classes of that
    name.
    """
    plan = {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"}
    register_optimized_plan("transformers.models.llama.modeling_llama.LlamaForCausalLM", lambda model: plan)
    assert select_plan(built("LlamaForCausalLM"), None, REGISTRY_FIRST).entries.keys() == plan.keys()
    other = type("LlamaForCausalLM", (LlamaForCausalLM,), {})
    assert len(select_plan(built("LlamaForCausalLM", other), None, REGISTRY_FIRST).entries) > 2


def test_mapping_of_the_reference_api(registry):
    """One mapping; its functions take ``sequence_parallel``, also a function of the user's with the reference's
    signature.
    """
    assert PARALLELIZE_FUNCTIONS is OPTIMIZED_PLANS
    model = built("LlamaForCausalLM")
    plan = PARALLELIZE_FUNCTIONS["LlamaForCausalLM"](model, True)
    assert plan == PARALLELIZE_FUNCTIONS["LlamaForCausalLM"](model, sequence_parallel=False)
    plan.clear()
    assert PARALLELIZE_FUNCTIONS["LlamaForCausalLM"](model)

    def theirs(model, sequence_parallel):
        assert sequence_parallel is False
        return {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"}

    register_optimized_plan("LlamaForCausalLM", theirs)
    assert len(select_plan(model, None, REGISTRY_FIRST).entries) == 2


# ---- plans that do not fit ------------------------------------------------------------------------------------------


def assert_passed_over(model, reason, origin="hf", order=REGISTRY_FIRST):
    """The next source's plan is used and the reason is kept with it."""
    plan = select_plan(model, None, order)
    assert plan.origin == origin
    (note,) = [note for note in plan.notes if note.startswith("registry: ")]
    assert reason in note
    assert note in resolve(model, plan, 2).notes
    return plan


def test_decilm_of_another_model_type():
    model = built("DeciLMForCausalLM")
    model.config.model_type = "deci"
    with pytest.raises(PlanError, match="for model_type 'nemotron-nas', not 'deci'"):
        select_plan(model, None, ("registry",))
    model._tp_plan = {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"}
    assert_passed_over(model, "failed with PlanError: the plan is for model_type 'nemotron-nas', not 'deci'")


def test_classifier_without_a_score():
    model = built("Qwen3ForSequenceClassification")
    model.classifier = model.score
    del model.score
    assert_passed_over(model, "the plan names score, which the model does not have")


def test_layers_of_another_kind():
    """A subclass with fused projections, and one with a parameter in the attention that the plan does not know."""
    fused = built("LlamaForCausalLM")
    for layer in fused.model.layers:
        layer.self_attn.qkv_proj = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    assert_passed_over(fused, "names model.layers.*.self_attn.q_proj, which the model does not have")
    sinks = built("LlamaForCausalLM")
    sinks.model.layers[1].self_attn.sinks = nn.Parameter(torch.empty(4, device="meta"))
    assert_passed_over(sinks, "model.layers.1.self_attn.sinks is a parameter between sharded projections")


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, AttributeError, PlanError])
def test_function_that_raises(registry, error):
    def function(model):
        raise error("not this one")

    register_optimized_plan("LlamaForCausalLM", function)
    model = built("LlamaForCausalLM")
    assert_passed_over(model, f"failed with {error.__name__}: not this one")
    with pytest.raises(PlanError, match=f"Note: registry: .*{error.__name__}: not this one"):
        select_plan(model, None, ("registry",))


def test_experts_are_never_left_whole():
    """A mixture of experts has a class of its own, or a plan of ours that does not fit; HF's plan shards its
    experts.
    """
    plan = select_plan(of_the_harness("qwen3_moe"), None, REGISTRY_FIRST)
    assert plan.origin == "hf"
    text = MODELS["mixtral"][1] | {"model_type": "mixtral"}
    vision = CONFIGS["Mistral3ForConditionalGeneration"][1]["vision_config"]
    with torch.device("meta"):
        model = Mistral3(Mistral3Config(text_config=text, vision_config=vision))
    plan = assert_passed_over(model, "names model.language_model.layers.*.mlp.gate_proj")
    experts = [n for n, _ in model.named_parameters() if ".experts." in n]
    spec = spec_of(model, plan)
    assert experts and all(spec.parameters[n].dim is not None for n in experts)


# ---- heads that a module counts itself ------------------------------------------------------------------------------


def test_counts_of_heads_become_local():
    model = built("DeciLMForCausalLM")
    spec = spec_of(model, select_plan(model, None, REGISTRY_FIRST))
    assert spec.head_counts == {
        "model.layers.0.self_attn": {"num_heads": 2, "num_key_value_heads": 1},
        "model.layers.3.self_attn": {"num_heads": 2, "num_key_value_heads": 2},
    }
    assert isinstance(model, DeciLMForCausalLM) and model.model.layers[0].self_attn.num_heads == 4  # only read so far


def test_counts_of_heads_are_left_alone_under_the_models_own_plan():
    model = built("LlamaForCausalLM")
    model.model.layers[0].self_attn.num_heads = 4
    assert spec_of(model, select_plan(model)).head_counts == {}
    assert spec_of(model, select_plan(model, None, REGISTRY_FIRST)).head_counts == {
        "model.layers.0.self_attn": {"num_heads": 2}
    }


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DeciLMForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_plan_of_llama_nemotron_super(name):
    model = built(name)
    plan = select_plan(model, LLAMA_NEMOTRON_SUPER_TP_PLAN_NAME)
    assert plan.origin == "explicit"
    assert {p: e.style for p, e in plan.entries.items()} == FAMILIES[name](model)
    spec_of(model, plan)


def test_plan_of_llama_nemotron_super_on_a_model_that_it_does_not_fit():
    with pytest.raises(
        PlanError, match="tp_plan='llama_nemotron_super_tp_plan' does not fit GPT2LMHeadModel: .*embed_tokens"
    ):
        select_plan(of_the_harness("gpt2"), LLAMA_NEMOTRON_SUPER_TP_PLAN_NAME)


@pytest.mark.parametrize("where", ["model_type", "architectures", "class"])
def test_nemotron_flash_keeps_its_head_whole(where):
    """Whatever the source of the plan, and without touching the caller's dict."""
    cls = type("NemotronFlashForCausalLM", (LlamaForCausalLM,), {}) if where == "class" else None
    model = built("LlamaForCausalLM", cls)
    if where != "class":
        values = {"model_type": "nemotron_flash", "architectures": ["NemotronFlashForCausalLM"]}
        model.config = SimpleNamespace(**{where: values[where]})
    given = FAMILIES["LlamaForCausalLM"](model)
    kept = copy.deepcopy(given)
    for plan in (select_plan(model, given), select_plan(model, None, ("registry",))):
        assert plan.entries.keys() == kept.keys() - {"lm_head"}
        assert (
            any("lm_head: left out of the plan" in note for note in resolve(model, plan, 2).notes) or where != "class"
        )
        assert any("lm_head: left out of the plan" in note for note in plan.notes)
    assert given == kept


def test_folders_above_a_model_say_nothing_of_it():
    model = built("LlamaForCausalLM")
    model.config.name_or_path = "/runs/nemotron-flash-against-llama/checkpoint-3"
    assert "lm_head" in select_plan(model, None, ("registry",)).entries
