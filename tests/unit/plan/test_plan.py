"""Plans: where they come from, which wins, what they resolve to on a model, and what is refused. No process group.

Every model here lives on the meta device, which is enough for all of it.
"""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness.models import LORA_7, MODELS, lora
from peft import LoHaConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from hf_automodel_parallel import PlanError, UnsupportedError, register_plan
from hf_automodel_parallel.core.sharding_spec import PARTIAL_GRADIENT, InputHook, OutputHook, ParameterSpec
from hf_automodel_parallel.plan import select as selection
from hf_automodel_parallel.plan.describe import plan_lines
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan.sources import registry as optimized
from hf_automodel_parallel.plan.sources.registry import register_optimized_plan
from hf_automodel_parallel.plan.styles import KNOWN_STYLES, REFUSED_STYLES, check_style
from hf_automodel_parallel.plan.validate import validate

pytestmark = pytest.mark.both_ends  # what models bring along differs between versions of transformers

ATTENTION = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
}
MLP = {
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
ENDS = {"model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}
LLAMA = ATTENTION | MLP | ENDS


def build(name, **overrides):
    """A model of the harness, without any memory."""
    model_type, values = MODELS[name]
    config = AutoConfig.for_model(model_type, **(values | overrides))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def wrap(model, **values):
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **values))


def plan_and_spec(model, tp_plan=None, tp_size=2, order=("hf", "registry", "default")):
    """All of the deciding: select, resolve, validate."""
    plan = select_plan(model, tp_plan, order)
    spec = resolve(model, plan, tp_size)
    validate(model, spec, tp_size)
    return plan, spec


def placements(model, tp_plan=None, **options):
    """Parameter -> placement as text, of all parameters that do not just stay whole."""
    _, spec = plan_and_spec(model, tp_plan, **options)
    return {name: str(parameter) for name, parameter in spec.parameters.items()}


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def llama_placements(llama):
    return placements(llama, LLAMA)


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    """No plan for any class, so that a test here sees the other sources; the real ones: test_optimized_plans.py."""
    monkeypatch.setattr(optimized, "OPTIMIZED_PLANS", {})


@pytest.fixture
def named_plans(monkeypatch):
    """The named plans, put back after the test."""
    monkeypatch.setattr(selection, "NAMED_PLANS", dict(selection.NAMED_PLANS))


# ---- the explicit plan in all its forms ---------------------------------------------------------------------------


def test_explicit_dict(llama):
    """What each style does to the weight; the entry wins over the model's own plan and is complete by itself."""
    plan, spec = plan_and_spec(
        llama, {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"}
    )
    assert plan.origin == "explicit"
    assert spec.parameters == {
        f"model.layers.{layer}.mlp.{module}.weight": ParameterSpec(dim)
        for layer in range(2)
        for module, dim in (("up_proj", 0), ("down_proj", 1))
    }
    assert spec.modules["model.layers.1.mlp.up_proj"].input is InputHook.COPY_TO_TP
    assert spec.modules["model.layers.1.mlp.down_proj"].output is OutputHook.REDUCE_FROM_TP


def test_explicit_plan_wins_over_the_models_own(llama):
    assert select_plan(llama).origin == "hf"
    assert select_plan(llama, MLP).entries.keys() == MLP.keys()


def without_argument():
    return LLAMA


def with_model(model):
    assert model.config.model_type == "llama"
    return LLAMA


def with_other_name(network):
    return with_model(network)


def with_optional_model(model=None):
    return with_model(model)


def with_option(heads=None, *, model_is_large=False):
    assert heads is None
    return LLAMA


def with_choice(kind, model):
    return with_model(model) if kind == "llama" else {}


class PlanObject:
    """A plan with parameters of its own."""

    plan = LLAMA

    def __call__(self, model):
        return with_model(model)

    def method(self):
        return self.plan

    @staticmethod
    def static(model):
        return with_model(model)


CALLABLES = {
    "without_argument": without_argument,
    "with_model": with_model,
    "with_other_name": with_other_name,
    "with_optional_model": with_optional_model,
    "with_option": with_option,
    "lambda": lambda: LLAMA,
    "lambda_with_model": lambda m: with_model(m),
    "lambda_with_anything": lambda *args, **kwargs: LLAMA,
    "partial": functools.partial(with_choice, "llama"),
    "partial_by_keyword": functools.partial(with_choice, kind="llama"),
    "required_keyword": lambda *, model: with_model(model),
    "complete_partial": functools.partial(
        with_choice, "llama", SimpleNamespace(config=SimpleNamespace(model_type="llama"))
    ),
    "callable_object": PlanObject(),
    "bound_method": PlanObject().method,
    "static_method": PlanObject.static,
}


@pytest.mark.parametrize("name", CALLABLES)
def test_callable_plans(llama, llama_placements, name):
    """Called with the model if it takes one, else with nothing."""
    assert placements(llama, CALLABLES[name]) == llama_placements


def test_callable_gets_the_model_without_peft(llama_placements):
    """A plan is written for the Hugging Face model, whatever adapter is around it."""
    seen = []

    def plan(model):
        seen.append(type(model))
        return LLAMA

    plan_and_spec(wrap(build("llama"), target_modules=["q_proj"]), plan)
    assert seen == [LlamaForCausalLM]


def too_many(model, other):
    return LLAMA


def required_keyword(*, heads):
    return LLAMA


@pytest.mark.parametrize("function, names", [(too_many, "model.*other"), (required_keyword, "heads")])
def test_callable_that_cannot_be_called(llama, function, names):
    with pytest.raises(PlanError, match=f"required parameters.*{names}"):
        select_plan(llama, function)


@pytest.mark.parametrize("result", [None, [("model.layers.*.mlp.up_proj", "colwise")], "llama"])
def test_callable_that_returns_no_dict(llama, result):
    with pytest.raises(PlanError, match=r"must be or return a dict"):
        select_plan(llama, lambda: result)


PLAN_MODULE = f"""
from types import SimpleNamespace

LLAMA = {LLAMA!r}


def llama(model):
    return LLAMA


def nothing_needed():
    return LLAMA


group = SimpleNamespace(inner=LLAMA)
number = 3
"""


@pytest.fixture
def plan_module(tmp_path, monkeypatch):
    """An importable package `my_plans` with the module `dense`, another that cannot be imported, and one with a bug."""
    package = tmp_path / "my_plans"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "dense.py").write_text(PLAN_MODULE)
    (package / "broken.py").write_text("LLAMA = {\n")
    (package / "failing.py").write_text("raise RuntimeError('no such accelerator')\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "my_plans.dense:LLAMA",
        "my_plans.dense.LLAMA",
        "my_plans.dense:llama",
        "my_plans.dense.llama",
        "my_plans.dense:nothing_needed",
        "my_plans.dense:group.inner",
    ],
)
def test_import_path(llama, llama_placements, plan_module, path):
    plan, spec = plan_and_spec(llama, path)
    assert {name: str(parameter) for name, parameter in spec.parameters.items()} == llama_placements
    assert all(path in entry.source for entry in plan.entries.values())


@pytest.mark.parametrize(
    "path, reason",
    [
        ("lama", "neither a named plan.*llama.*nor an import path"),
        ("", "neither a named plan"),
        ("my_plans.missing:LLAMA", "No module named 'my_plans.missing'"),
        ("my_plans.dense:missing", "no attribute 'missing'"),
        ("my_plans.dense.missing", "no attribute 'missing'"),
        ("my_plans.dense:", "nor an import path"),
        (":LLAMA", "nor an import path"),
        (".dense:LLAMA", "Importing it failed"),
        ("my_plans.broken:LLAMA", "Importing it failed"),
        ("my_plans.failing:LLAMA", "Importing it failed: no such accelerator"),
        ("my_plans.dense:number", "must be or return a dict"),
    ],
)
def test_import_path_that_leads_nowhere(llama, plan_module, path, reason):
    """One kind of error, with the reason, whatever goes wrong in the user's module."""
    with pytest.raises(PlanError, match=f"(?s){reason}"):
        select_plan(llama, path)


def test_named_plan(llama, llama_placements):
    assert placements(llama, "llama") == llama_placements


def test_register_plan(llama, llama_placements, named_plans):
    register_plan("mine", LLAMA)
    register_plan("mine_too", with_model)
    assert placements(llama, "mine") == placements(llama, "mine_too") == llama_placements
    with pytest.raises(PlanError, match="'mine' is already registered"):
        register_plan("mine", MLP)
    with pytest.raises(PlanError, match="'llama' is already registered"):
        register_plan("llama", MLP)
    for name in ("my.plan", "my:plan", "", "1st"):
        with pytest.raises(PlanError, match="plain identifier"):
            register_plan(name, MLP)
    with pytest.raises(PlanError, match="mine"):  # the message lists what there is
        select_plan(llama, "other")


class OwnColwise(ColwiseParallel):
    """A subclass, whose code only torch's engine can run."""


def test_a_subclass_of_a_torch_style_is_taken_as_it_is(llama):
    """It runs on torch's own engine, and may stand beside style names. (Torch's own styles:
    tests/unit/plan/test_torch_styles.py.)
    """
    column = OwnColwise()
    _, spec = plan_and_spec(llama, ATTENTION | {"model.layers.*.mlp.up_proj": column})
    assert spec.modules["model.layers.0.mlp.up_proj"].native_style is column
    assert not any("mlp" in name for name in spec.parameters)
    assert spec.parameters["model.layers.0.self_attn.o_proj.weight"] == ParameterSpec(1)


def test_a_style_of_ones_own_on_an_adapter_is_refused():
    model = wrap(build("llama"), target_modules=["up_proj"])
    with pytest.raises(PlanError, match=r"up_proj carries a PEFT adapter.*OwnColwise"):
        plan_and_spec(model, {"model.layers.*.mlp.up_proj": OwnColwise()})


def test_style_that_a_user_registered_with_transformers(llama, monkeypatch):
    class MyStyle:
        pass

    style = MyStyle()
    monkeypatch.setitem(ALL_PARALLEL_STYLES, "my_style", style)
    _, spec = plan_and_spec(llama, {"model.layers.*.mlp.up_proj": "my_style"})
    assert spec.modules["model.layers.0.mlp.up_proj"].native_style is style


def test_peft_prefix_in_a_key_is_understood():
    """Someone who copies names from a wrapped model's `named_modules` is not punished for it."""
    model = wrap(build("llama"), target_modules=["q_proj"])
    prefixed = {f"base_model.model.{key}": style for key, style in LLAMA.items()}
    assert placements(model, prefixed) == placements(model, LLAMA)


def test_the_more_precise_pattern_wins(llama):
    """Whatever the order of the entries: `layers.0` before `layers.*`."""
    general, precise = "model.layers.*.mlp.up_proj", "model.layers.0.mlp.up_proj"
    for plan in ({general: "colwise", precise: "replicate"}, {precise: "replicate", general: "colwise"}):
        assert placements(llama, plan) == {"model.layers.1.mlp.up_proj.weight": "Shard(0)"}


def test_parameters_can_be_named(llama):
    """A key may name a parameter, too; its dimension is counted from the end."""
    plan = {"model.layers.*.mlp.up_proj.weight": "colwise", "model.norm.weight": "replicated_with_grad_allreduce"}
    _, spec = plan_and_spec(llama, plan)
    assert spec.parameters["model.norm.weight"] == PARTIAL_GRADIENT
    assert spec.parameters["model.layers.0.mlp.up_proj.weight"] == ParameterSpec(0)
    assert "model.layers.0.mlp.up_proj" not in spec.modules


# ---- what is refused in an explicit plan --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", ["model.layers.*.mlp.up_prj", "layers.*.mlp.up_proj", "model.layer.*", "lm_head.*.weight"]
)
def test_key_that_matches_nothing(llama, missing):
    """A typing error would leave a layer whole and everything else right, so that nobody would see it."""
    with pytest.raises(PlanError) as caught:
        plan_and_spec(llama, LLAMA | {missing: "colwise"})
    assert repr(missing) in str(caught.value) and "no module or parameter" in str(caught.value)
    assert "q_proj" not in str(caught.value), "entries that match are not accused"


def test_plan_of_another_model(llama):
    """Loud, also where it comes from the class: with the ends alone nearly everything would stay whole."""
    plan = {"transformer.h.*.attn.c_attn": "colwise", "transformer.h.*.attn.c_proj": "rowwise"}
    with pytest.raises(
        PlanError, match=r"'transformer\.h\.\*\.attn\.c_attn', 'transformer.*match no module or parameter"
    ):
        plan_and_spec(llama, plan)
    with pytest.raises(PlanError, match=r"hf: its _tp_plan names no layer that the model has, only transformer\.h"):
        plan_and_spec(custom_model(_tp_plan=plan))


def test_empty_plan(llama):
    for plan in ({}, lambda: {}):
        with pytest.raises(PlanError, match="is empty"):
            select_plan(llama, plan)


@pytest.mark.parametrize("key", ["", 3, None, ("model", "layers")])
def test_key_that_is_no_path(llama, key):
    with pytest.raises(PlanError, match="keys are dotted module or parameter paths"):
        select_plan(llama, {key: "colwise"})


@pytest.mark.parametrize("style", ["columnwise", "ColwiseParallel", "", "COLWISE"])
def test_unknown_style(llama, style):
    """Names the entry, the style, and what there is."""
    with pytest.raises(PlanError, match=f"'lm_head' has the unknown style '{style}'.*Known styles: colwise, "):
        select_plan(llama, {"lm_head": style})


@pytest.mark.parametrize("style", [None, 0, ColwiseParallel, nn.Linear(1, 1), ["colwise"]])
def test_style_of_a_wrong_type(llama, style):
    """The class instead of an object of it is the likely mistake."""
    with pytest.raises(PlanError, match=r"'lm_head' has the style .* of type .*give a style name or"):
        select_plan(llama, {"lm_head": style})


@pytest.mark.parametrize(
    "key, style, message",
    [
        ("model.norm", "colwise", "shards linear layers, but model.norm is a LlamaRMSNorm"),
        ("model.embed_tokens", "rowwise", "shards linear layers, but model.embed_tokens is a Embedding"),
        ("lm_head", "embedding_rowwise", "shards an nn.Embedding, but lm_head is a Linear"),
        ("model.norm.weight", "embedding_rowwise", "names a parameter, to which the style 'embedding_rowwise' cannot"),
        ("model.layers.*.mlp", "mla_kv_a_proj", "needs qk_rope_head_dim"),
    ],
)
def test_style_that_does_not_fit_the_layer(llama, key, style, message):
    with pytest.raises(PlanError, match=message):
        plan_and_spec(llama, {key: style})


@pytest.mark.parametrize("field, value", [("max_norm", 1.0), ("scale_grad_by_freq", True)])
def test_table_that_depends_on_all_tokens(llama, field, value):
    setattr(llama.model.embed_tokens, field, value)
    try:
        with pytest.raises(PlanError, match=f"model.embed_tokens has {field}.*leave it out of the plan"):
            plan_and_spec(llama, {"model.embed_tokens": "embedding_rowwise"})
    finally:
        setattr(llama.model.embed_tokens, field, None if field == "max_norm" else False)


def test_a_parametrized_head_is_replicated():
    """Its weight is computed from parameters that no plan names; a plan of the user's that names it is refused."""
    model = build("llama")
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    _, spec = plan_and_spec(model)
    assert "lm_head" not in spec.modules and not any(name.startswith("lm_head") for name in spec.parameters)
    assert any("lm_head has a parametrization" in note for note in spec.notes)
    with pytest.raises(PlanError, match=r"lm_head has a parametrization .* leave the entry 'lm_head' out of the plan"):
        plan_and_spec(model, {"lm_head": "colwise_gather_output"})


def test_ends_that_a_plan_of_the_class_does_not_fit_are_replicated():
    model = build("llama")
    model.model.embed_tokens.scale_grad_by_freq = True
    model.lm_head = nn.AdaptiveLogSoftmaxWithLoss(64, 128, [32])
    _, spec = plan_and_spec(model, order=("default",))
    assert not {"lm_head", "model.embed_tokens"} & spec.modules.keys()
    assert any("model.embed_tokens has scale_grad_by_freq=True" in note for note in spec.notes)
    assert any("lm_head is a AdaptiveLogSoftmaxWithLoss" in note for note in spec.notes)


def test_a_callers_dict_is_not_changed(llama):
    """It may be a module's constant, used again for the next model."""
    plan = copy.deepcopy(LLAMA | {"base_model.model.model.norm": "replicate"})
    before = copy.deepcopy(plan)
    for tp_plan in (plan, lambda: plan):
        plan_and_spec(llama, tp_plan)
        assert plan == before


def test_the_models_own_plans_are_not_changed():
    model = build("llama_odd_vocab")
    before = copy.deepcopy((type(model)._tp_plan, model._tp_plan, type(model.config).base_model_tp_plan))
    plan_and_spec(model)
    assert before == (type(model)._tp_plan, model._tp_plan, type(model.config).base_model_tp_plan)


def test_every_style_of_transformers_is_known_or_refused_with_a_reason():
    """A style that a new version brings must not be taken for one that the user registered."""
    assert len(ALL_PARALLEL_STYLES.keys()) >= 15
    for style in ALL_PARALLEL_STYLES.keys():
        if style in KNOWN_STYLES:
            check_style("some.layer", style)
            continue
        assert style in REFUSED_STYLES, f"{style!r} of this transformers is neither known nor refused"
        with pytest.raises(PlanError, match=f"'some.layer' has the style '{style}'. .{{30,}}"):
            check_style("some.layer", style)


def test_refused_style_in_an_explicit_plan(llama):
    with pytest.raises(PlanError, match=r"'model.norm' has the style 'sequence_parallel'.*remove the entry"):
        select_plan(llama, LLAMA | {"model.norm": "sequence_parallel"})


# ---- the plan that the model brings along -------------------------------------------------------------------------


def sources(model):
    return {pattern: entry.source for pattern, entry in select_plan(model).entries.items()}


def test_plan_of_class_and_config(llama):
    """The two halves of a causal model's plan, and the embedding that older versions leave out."""
    found = sources(llama)
    assert found["lm_head"] == "class LlamaForCausalLM"
    assert found["model.layers.*.self_attn.q_proj"] == "LlamaConfig.base_model_tp_plan"
    assert found.keys() == LLAMA.keys()
    assert {pattern: entry.style for pattern, entry in select_plan(llama).entries.items()} == LLAMA


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gpt2", "gptj", "llama_odd_heads")])
def test_models_with_a_plan_of_their_own(name):
    """Every dense and every mixture-of-experts model of the harness is sharded in its layers and at both ends."""
    model = build(name)
    plan, spec = plan_and_spec(model)
    assert plan.origin == "hf"
    for layer in ("model.layers.0.self_attn", "model.layers.1.mlp", "model.embed_tokens", "lm_head"):
        assert any(parameter.startswith(layer) for parameter in spec.parameters), layer


def composite(kind):
    text = MODELS["llama"][1]
    with torch.device("meta"):
        if kind == "llava":
            from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

            vision = CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            )
            return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**text), vision_config=vision))
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text | rope, vision_config=vision))


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "lora"])
def test_plan_of_a_model_inside_a_composite_model(kind, adapter):
    """The text model's plan is found in its own config and prefixed by its place; the vision tower stays whole."""
    model = composite(kind)
    found = sources(model)
    layer = "model.language_model.layers.*"
    assert found[f"{layer}.self_attn.q_proj"].endswith("base_model_tp_plan")
    has_plan_for_head = "lm_head" in (type(model)._tp_plan or {})  # from transformers 5.18 on
    assert found.get("lm_head", "").startswith("class ") == has_plan_for_head
    if adapter:
        model = wrap(model, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    result = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in placements(model).items()
    }
    assert result["model.language_model.layers.1.self_attn.q_proj.weight"] == "Shard(0)"
    assert result["model.language_model.layers.1.mlp.down_proj.weight"] == "Shard(1)"
    assert result["model.language_model.embed_tokens.weight"] == "Shard(0)"
    assert result.get("lm_head.weight") == ("Shard(0)" if has_plan_for_head else None)
    assert not any("visi" in name for name in result)
    assert adapter == ("model.language_model.layers.1.self_attn.q_proj.lora_A.default.weight" in result)


def test_plan_on_the_instance_wins():
    """What a user sets on the very object is more deliberate than what its class says."""
    model = build("llama")
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.down_proj": "rowwise_split_input", "lm_head": "replicate"}
    plan, spec = plan_and_spec(model)
    assert plan.entries["lm_head"].source == "instance of LlamaForCausalLM"
    assert "lm_head.weight" not in spec.parameters or spec.parameters["lm_head.weight"].dim is None
    assert spec.modules["model.layers.0.mlp.down_proj"].input is InputHook.SCATTER


def test_plan_on_the_instance_of_an_inner_model():
    """The outer model's plan repeats what the inner one said when it was built; that is not a second opinion."""
    model = build("llama")
    model.model._tp_plan = {**model.model._tp_plan, "layers.*.mlp.down_proj": "rowwise_split_input"}
    _, spec = plan_and_spec(model)
    assert spec.modules["model.layers.0.mlp.down_proj"].input is InputHook.SCATTER


def test_the_outermost_instance_wins():
    """It is the object that the user holds."""
    model = build("llama")
    model.model._tp_plan = {**model.model._tp_plan, "layers.*.mlp.down_proj": "rowwise_split_input"}
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.down_proj": "colwise_gather_output"}
    _, spec = plan_and_spec(model)
    assert spec.modules["model.layers.0.mlp.down_proj"].output is OutputHook.GATHER


def test_plan_in_the_config_object_wins_over_its_class():
    model = custom_model({"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"})
    assert placements(model).keys() == {
        f"model.layers.{layer}.mlp.{module}.weight" for layer in range(2) for module in ("up_proj", "down_proj")
    } | {"model.embed_tokens.weight"}


def test_entries_that_this_config_does_not_use_are_listed():
    """A model's own plan names variants of its layers; that is no mistake, but it is said."""
    plan, spec = plan_and_spec(build("qwen3_moe"))
    assert "model.layers.*.mlp.down_proj" in [entry.pattern for entry in spec.unmatched]
    assert any("not used by this config: model.layers.*.mlp.down_proj" in line for line in plan_lines(plan, spec))


def test_plan_lines_say_every_decision(llama):
    lines = plan_lines(*plan_and_spec(llama))
    assert len(lines) == len(LLAMA)
    assert "plan (hf): model.layers.*.mlp.down_proj -> rowwise x2, Shard(1) [LlamaConfig.base_model_tp_plan]" in lines


# ---- PEFT ---------------------------------------------------------------------------------------------------------


ADAPTERS = {
    "all_linear": {"target_modules": "all-linear"},
    "seven": {"target_modules": LORA_7},
    "queries": {"target_modules": ["q_proj"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "saved_norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
}


@pytest.mark.parametrize(
    "name, adapter",
    [(name, adapter) for name in ("llama", "qwen3", "llama_odd_vocab") for adapter in ADAPTERS]
    + [(name, "all_linear") for name in ("phi3", "gemma3", "mixtral", "qwen3_moe")],
)
def test_an_adapter_changes_no_placement(name, adapter):
    """The wrapped model resolves to the same places as the plain one, in parameters and at the boundaries."""
    values = ADAPTERS[adapter]
    plain_parameters, plain_modules = _places(build(name), "")
    model = wrap(build(name), **values)
    parameters, modules = _places(model, "base_model.model.")
    assert {n: p for n, p in parameters.items() if "lora_" not in n} == plain_parameters
    assert modules == plain_modules
    # and every factor of an adapter on a sharded layer has a place itself
    for parameter, _ in model.named_parameters():
        layer, _, factor = parameter.removeprefix("base_model.model.").partition(".lora_")
        if factor and "embedding" not in factor and f"{layer}.weight" in plain_parameters:
            assert f"{layer}.lora_{factor}" in parameters, parameter


def _places(model, prefix):
    """Placements and boundaries by plain names; the copies that PEFT makes of a module count as the module."""
    plan, spec = plan_and_spec(model)

    def short(name):
        name = name.removeprefix(prefix).replace(".base_layer", "")
        return name.replace(".original_module", "").replace(".modules_to_save.default", "")

    parameters, modules = {}, {}
    for name, value in spec.parameters.items():
        if "lora_" in name:  # one layer may carry several
            parameters[name.removeprefix(prefix)] = str(value)
            continue
        assert parameters.setdefault(short(name), str(value)) == str(value), name
    for name, value in spec.modules.items():
        assert modules.setdefault(short(name), (value.input, value.output)) == (value.input, value.output), name
    return parameters, modules


def test_factors_of_an_adapter_follow_their_layer():
    """B with the sharded outputs, A with the sharded inputs; the other one is whole and its gradient a sum."""
    result = placements(wrap(build("llama"), target_modules=["q_proj", "o_proj"]))
    layer = "base_model.model.model.layers.0.self_attn"
    assert result[f"{layer}.q_proj.lora_A.default.weight"] == str(PARTIAL_GRADIENT)
    assert result[f"{layer}.q_proj.lora_B.default.weight"] == "Shard(0)"
    assert result[f"{layer}.o_proj.lora_A.default.weight"] == "Shard(1)"
    assert result[f"{layer}.o_proj.lora_B.default.weight"] == str(PARTIAL_GRADIENT)


def test_several_adapters_on_one_layer():
    model = wrap(build("llama"), target_modules=["q_proj"])
    with torch.device("meta"):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj", "v_proj"]))
    result = placements(model)
    layer = "base_model.model.model.layers.1.self_attn"
    for part in ("q_proj.lora_B.default", "q_proj.lora_B.second", "v_proj.lora_B.second"):
        assert result[f"{layer}.{part}.weight"] == "Shard(0)"


def test_explicit_plan_on_a_wrapped_model(llama, llama_placements):
    """Keys do not mention the adapter."""
    result = placements(wrap(build("llama"), target_modules="all-linear"), LLAMA)
    base = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in result.items() if "lora" not in n
    }
    assert base == llama_placements


def test_prompt_tuning_leaves_the_base_model_as_it_is(llama_placements):
    """It gives the embedding a second name; a second boundary on that one module would shift the token ids twice."""
    with torch.device("meta"):
        model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert model.word_embeddings is model.base_model.model.embed_tokens
    _, spec = plan_and_spec(model)
    result = {name.removeprefix("base_model."): str(place) for name, place in spec.parameters.items()}
    assert result == llama_placements | {"word_embeddings.weight": "Shard(0)"}
    objects = [id(model.get_submodule(name)) for name in spec.modules]
    assert len(objects) == len(set(objects))


def test_module_with_two_names():
    """Both names match the plan, but there is one module to put a boundary on."""
    model = build("llama")
    model.model.layers[1] = model.model.layers[0]
    _, spec = plan_and_spec(model)
    objects = [id(model.get_submodule(name)) for name in spec.modules]
    assert len(objects) == len(set(objects))
    assert spec.parameters["model.layers.0.mlp.up_proj.weight"] == spec.parameters["model.layers.1.mlp.up_proj.weight"]
    model.model.output = model.lm_head
    for plan in (ENDS, ENDS | {"model.output": ENDS["lm_head"]}, {"model.output": ENDS["lm_head"]}):
        _, spec = plan_and_spec(model, plan)
        assert ("lm_head" in spec.modules) != ("model.output" in spec.modules)
        assert spec.parameters["lm_head.weight"] == spec.parameters["model.output.weight"] == ParameterSpec(0)
    with pytest.raises(
        PlanError, match=r"model\.output and lm_head are one module|lm_head and model\.output are one module"
    ):
        plan_and_spec(model, ENDS | {"model.output": "replicate"})


def test_prefix_tuning_is_refused_by_name():
    """It hands keys and values of all heads to layers that hold only some."""
    with torch.device("meta"):
        model = get_peft_model(build("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedError, match=r"PREFIX_TUNING.*tp_size=1"):
        plan_and_spec(model)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"target_modules": ["embed_tokens"], "use_dora": True},
            "embed_tokens uses the LoRA variant DoraEmbeddingVariant",
        ),
        ({"target_modules": ["q_proj"], "init_lora_weights": "mica"}, "q_proj uses the LoRA variant MiCA"),
    ],
    ids=["dora_embedding", "mica"],
)
def test_adapters_that_are_not_supported_are_refused_by_name(values, message):
    from harness.models import build_model

    # PEFT computes with the weights, so they have to be there.
    wrapped = get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, **values))
    with pytest.raises(UnsupportedError, match=message) as caught:
        plan_and_spec(wrapped)
    assert "tp_size=1" in str(caught.value)


def test_another_peft_method_is_refused_by_name():
    with torch.device("meta"):
        model = get_peft_model(build("llama"), LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match=r"is PEFT's LOHA, which is not available.*tp_size=1"):
        plan_and_spec(model)


def test_unsupported_adapter_on_a_layer_that_is_not_sharded():
    """Only what is sharded has to be understood."""
    with torch.device("meta"):
        model = build("llama")
    model = get_peft_model(model.to_empty(device="cpu"), LoraConfig(target_modules=["embed_tokens"], use_dora=True))
    assert placements(model, MLP).keys() == {
        f"base_model.model.model.layers.{i}.mlp.{m}.weight"
        for i in range(2)
        for m in ("gate_proj", "up_proj", "down_proj")
    }


# ---- models without a plan ----------------------------------------------------------------------------------------


def custom_class(**attributes):
    """A class as `trust_remote_code=True` makes it: a Llama, but transformers knows no plan for it."""
    values = {"__module__": "transformers_modules.someone.modeling_custom", "_tp_plan": {}, **attributes}
    return type("CustomForCausalLM", (LlamaForCausalLM,), values)


def custom_model(plan_of_config=None, **attributes):
    config = AutoConfig.for_model("llama", **MODELS["llama"][1])
    config.base_model_tp_plan = plan_of_config
    with torch.device("meta"):
        model = custom_class(**attributes)(config)
    return model


def assert_three_remedies(message):
    for remedy in ("(1) pass tp_plan=", "(2) give the model class a _tp_plan", "(3) use tp_size=1"):
        assert remedy in message


def test_custom_code_without_a_plan_is_refused_with_three_remedies():
    """Its layers have the usual names, but what the code does with them nobody knows: no default plan for it."""
    with pytest.raises(
        PlanError, match="no tensor-parallel plan for the custom-code class CustomForCausalLM"
    ) as caught:
        select_plan(custom_model())
    assert_three_remedies(str(caught.value))
    assert "default: not used for custom code" in str(caught.value)


@pytest.mark.parametrize("place", ["class", "config", "instance", "explicit"])
def test_custom_code_with_a_plan_is_used(place, llama_placements):
    """The remedies that the message offers do help."""
    plan, tp_plan = None, None
    if place == "class":
        model = custom_model(_tp_plan=LLAMA)
    elif place == "config":
        model = custom_model({key.removeprefix("model."): style for key, style in (ATTENTION | MLP).items()})
    else:
        model = custom_model()
    if place == "instance":
        model._tp_plan = LLAMA
    if place == "explicit":
        tp_plan = LLAMA
    plan, spec = plan_and_spec(model, tp_plan)
    assert plan.origin == ("explicit" if tp_plan else "hf")
    result = {name: str(parameter) for name, parameter in spec.parameters.items()}
    assert result.items() <= llama_placements.items()
    assert result["model.layers.0.self_attn.q_proj.weight"] == "Shard(0)"


def test_gpt2_has_no_plan():
    """No plan in transformers, other names, and a fused query-key-value projection: all sources say why not."""
    with pytest.raises(PlanError, match="no tensor-parallel plan for the class GPT2LMHeadModel") as caught:
        select_plan(build("gpt2"))
    message = str(caught.value)
    assert_three_remedies(message)
    for reason in (
        "hf: the model has no _tp_plan",
        "registry: no optimised plan",
        "default: no module has the usual names",
    ):
        assert reason in message


@pytest.mark.parametrize("order", [("hf",), ("hf", "registry", "default")])
def test_plan_that_names_only_the_head_is_none(order):
    """Many classes inherit {"lm_head": ...}; with it alone tensor parallelism would shard no layer."""
    model = custom_model(_tp_plan={"lm_head": "colwise_gather_output"})
    with pytest.raises(PlanError, match="hf: its _tp_plan names no layer that the model has, only lm_head"):
        select_plan(model, None, order)


def test_gpt_oss_falls_through_all_sources():
    """Its class names only the head, and its attention has a parameter (sinks) that the default plan does not know."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PlanError, match=r"default: model\.layers\.0\.self_attn\.sinks is a parameter between"):
        select_plan(model, None, ("default",))
    if not config.base_model_tp_plan:
        with pytest.raises(PlanError, match="names no layer that the model has, only lm_head.*self_attn.sinks"):
            select_plan(model)


# ---- registry, default plan, order --------------------------------------------------------------------------------


def test_default_plan_on_a_llama(llama, llama_placements):
    plan, spec = plan_and_spec(llama, order=("default",))
    assert plan.origin == "default"
    assert {name: str(parameter) for name, parameter in spec.parameters.items()} == llama_placements


def test_default_plan_on_a_class_without_a_plan(llama_placements):
    """An own class in an own script, of the usual shape."""
    model = custom_model(__module__="my_project.modeling")
    plan, spec = plan_and_spec(model)
    assert plan.origin == "default"
    assert {name: str(parameter) for name, parameter in spec.parameters.items()} == llama_placements


def test_default_plan_on_a_wrapped_model(llama_placements):
    """Adapters do not count as parameters that the plan does not know."""
    result = placements(wrap(build("llama"), target_modules="all-linear"), order=("default",))
    base = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in result.items() if "lora" not in n
    }
    assert base == llama_placements


@pytest.mark.parametrize(
    "name, reason",
    [
        ("olmo2", r"self_attn\.[qk]_norm\.weight is a parameter between"),
        ("phi3", "has only one half"),
        ("gpt2", "no module has the usual names"),
    ],
)
def test_default_plan_refuses_what_it_cannot_see_to_be_right(name, reason):
    with pytest.raises(PlanError, match=f"default: .*{reason}"):
        select_plan(build(name), None, ("default",))


def test_default_plan_knows_norms_of_one_head():
    """Every head meets the whole norm, so its gradient is partial; transformers' own plan says the same."""
    assert placements(build("qwen3"), order=("default",)) == placements(build("qwen3"), order=("hf",))


def test_default_plan_refuses_a_parameter_of_the_block_itself():
    """For example attention sinks, or a temperature for each head: sharded heads would meet all of its entries."""
    model = custom_model(__module__="my_project.modeling")
    assert select_plan(model).origin == "default"
    model.model.layers[1].self_attn.register_parameter("temperature", nn.Parameter(torch.empty(4, device="meta")))
    with pytest.raises(PlanError, match=r"model\.layers\.1\.self_attn\.temperature is a parameter between"):
        select_plan(model)


def registered(model):
    assert isinstance(model, LlamaForCausalLM)
    return MLP


def test_registry_of_optimised_plans(llama, named_plans):
    """Found by the name of the class or of one of its bases, and used after the model's own plan unless asked for
    first.
    """
    register_optimized_plan("LlamaForCausalLM", registered)
    assert select_plan(llama).origin == "hf"
    assert select_plan(llama, None, ("registry", "hf")).entries.keys() == MLP.keys()
    plan = select_plan(custom_model())
    assert plan.origin == "registry"
    assert {entry.source for entry in plan.entries.values()} == {"registry: LlamaForCausalLM"}
    assert select_plan(wrap(build("llama"), target_modules=["q_proj"]), None, ("registry",)).origin == "registry"


@pytest.mark.parametrize(
    "order, origin",
    [
        (("hf", "registry", "default"), "hf"),
        (("registry", "hf"), "hf"),
        (("default", "hf"), "default"),
        (("registry", "default", "hf"), "default"),
        (("default",), "default"),
    ],
)
def test_plan_order(llama, order, origin):
    """The first source with a usable plan."""
    assert select_plan(llama, None, order).origin == origin


def test_sources_that_were_not_asked_are_not_used(llama):
    with pytest.raises(PlanError, match="registry: no optimised plan is registered for LlamaForCausalLM") as caught:
        select_plan(llama, None, ("registry",))
    assert "hf:" not in str(caught.value)


def test_source_with_a_refused_style_is_passed_over():
    """A plan for expert parallelism in a model's class is no tensor-parallel plan."""
    model = custom_model(
        __module__="my_project.modeling", _tp_plan=LLAMA | {"model.layers.*.mlp": "ep_dispatch_experts"}
    )
    assert select_plan(model).origin == "default"


# ---- sizes, ties, geometry ----------------------------------------------------------------------------------------


def test_key_value_heads_that_do_not_divide():
    """The error names the field of the config, its value, and the head counts that a tp_size must divide."""
    with pytest.raises(PlanError, match=r"num_key_value_heads=3 does not divide by tp_size=2") as caught:
        plan_and_spec(build("llama_odd_heads"))
    assert "num_attention_heads=6" in str(caught.value)


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "lora"])
def test_heads_that_do_not_divide(adapter):
    model = build("llama", num_attention_heads=6, num_key_value_heads=6, hidden_size=96, head_dim=16)
    model = wrap(model, target_modules="all-linear") if adapter else model
    plan_and_spec(model, tp_size=2)
    plan_and_spec(model, tp_size=3, tp_plan=ATTENTION)
    with pytest.raises(PlanError, match=r"num_(attention|key_value)_heads=6 does not divide by tp_size=4"):
        plan_and_spec(model, tp_size=4)


def test_intermediate_size_that_does_not_divide(llama):
    """With the shape and the dimension, so that one sees which number of the config it is."""
    model = build("llama", intermediate_size=126)
    plan_and_spec(model, tp_size=2)
    with pytest.raises(
        PlanError, match=r"mlp\.gate_proj\.weight of shape \(126, 64\).*dimension 0 has 126 entries.*tp_size=4"
    ):
        plan_and_spec(model, MLP, tp_size=4)


def test_packed_projection_that_divides_only_as_a_whole():
    """Gate and up lie in one weight; 2 x 66 divides by 4, but each half does not."""
    model = build("phi3", intermediate_size=66)
    plan = {"model.layers.*.mlp.gate_up_proj": "packed_colwise"}
    assert placements(model, plan)["model.layers.0.mlp.gate_up_proj.weight"] == "Shard(0) in 2 blocks"
    with pytest.raises(PlanError, match=r"132 entries packed in 2 blocks, which tp_size=4 does not divide"):
        plan_and_spec(model, plan, tp_size=4)


def test_odd_vocabulary_is_sharded_on_the_other_side_and_says_so():
    model = build("llama_odd_vocab")
    _, spec = plan_and_spec(model)
    assert spec.parameters["lm_head.weight"] == ParameterSpec(1)
    assert spec.parameters["model.embed_tokens.weight"] == ParameterSpec(1)
    assert (
        spec.modules["lm_head"].input is InputHook.SCATTER
        and spec.modules["lm_head"].output is OutputHook.REDUCE_FROM_TP
    )
    assert spec.modules["model.embed_tokens"].output is OutputHook.GATHER
    head, embedding = sorted(spec.notes)
    assert "lm_head: 131 output features do not divide by tp_size=2; sharded on the other side" in head
    assert "dimension 0 (131)" in embedding and "sharded on dimension 1" in embedding


def test_vocabulary_that_divides_on_neither_side_stays_whole():
    model = build("llama", vocab_size=131, hidden_size=66, num_attention_heads=6, num_key_value_heads=6, head_dim=16)
    _, spec = plan_and_spec(model, ENDS, tp_size=4)
    assert not any(parameter.dim is not None for parameter in spec.parameters.values())
    assert sum("replicated" in note for note in spec.notes) == 2


def test_tied_ends_are_planned_alike():
    model = build("llama_tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _, spec = plan_and_spec(model)
    assert spec.parameters["lm_head.weight"] == spec.parameters["model.embed_tokens.weight"] == ParameterSpec(0)


@pytest.mark.parametrize("named", ["lm_head", "model.embed_tokens"])
def test_a_tied_place_that_no_entry_names_follows_the_other(named):
    _, spec = plan_and_spec(build("llama_tied"), MLP | {named: ENDS[named]})
    assert spec.parameters["lm_head.weight"] == spec.parameters["model.embed_tokens.weight"] == ParameterSpec(0)
    assert spec.modules["lm_head"].output is OutputHook.GATHER
    assert spec.modules["model.embed_tokens"].input is InputHook.MASK_IDS
    (note,) = spec.notes
    assert "placed like the parameter it is tied to" in note


def test_conflicting_plans_for_tied_weights():
    """One parameter cannot be sharded in two ways; which entry would win must not be an accident."""
    plan = MLP | {"model.embed_tokens": "embedding_rowwise", "lm_head": "rowwise_split_input"}
    with pytest.raises(
        PlanError, match=r"shared by model\.embed_tokens\.weight, lm_head\.weight.*Shard\(0\), Shard\(1\)"
    ):
        plan_and_spec(build("llama_tied"), plan)


def test_tied_odd_vocabulary_swaps_both_sides():
    _, spec = plan_and_spec(build("llama_tied", vocab_size=131))
    assert spec.parameters["lm_head.weight"] == spec.parameters["model.embed_tokens.weight"] == ParameterSpec(1)


def test_bias_of_a_row_wise_layer_is_added_once():
    """A bias inside each rank's summand would be counted tp times."""
    model = build("llama", attention_bias=True)
    _, spec = plan_and_spec(model)
    layer = "model.layers.0.self_attn"
    assert spec.modules[f"{layer}.o_proj"].deferred_bias == ""
    assert f"{layer}.o_proj.bias" not in spec.parameters
    assert spec.parameters[f"{layer}.q_proj.bias"] == ParameterSpec(0)
    _, spec = plan_and_spec(wrap(model, target_modules=["o_proj"]))
    assert spec.modules[f"base_model.model.{layer}.o_proj"].deferred_bias == "base_layer"


def test_planning_needs_no_process_group_and_no_memory():
    """So that the plan of a large model can be looked at on any machine; nothing of the model is changed."""
    assert not dist.is_initialized()
    model = wrap(build("mixtral"), target_modules="all-linear")
    before = [(name, parameter) for name, parameter in model.named_parameters()]
    modules = dict(model.named_modules())
    plan_and_spec(model, tp_size=2)
    after = list(model.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(a is b and a.device.type == "meta" for (_, a), (_, b) in zip(before, after, strict=True))
    assert modules == dict(model.named_modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not dist.is_initialized()


def test_attention_that_counts_its_heads_itself_gets_no_default_plan():
    """StableLM's attention reshapes to `num_heads`, of which a rank has a part; it would fail in the first forward."""
    config = AutoConfig.for_model("stablelm", **MODELS["llama"][1])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn counts its heads itself \(num_heads\)"):
        select_plan(model)


def test_experts_that_nothing_shards_are_refused():
    """A copy made by modules_to_save has no entries for its weights; summing whole experts would count them tp
    times.
    """
    from hf_automodel_parallel.plan.resolve import resolve
    from hf_automodel_parallel.plan.select import select_plan

    with torch.device("meta"):
        model = lora(build("mixtral"), target_modules=["q_proj"], modules_to_save=["experts"])
    with pytest.raises(UnsupportedError, match="moe_tp_experts.*shards none of its weights"):
        resolve(model, select_plan(model), 2)
