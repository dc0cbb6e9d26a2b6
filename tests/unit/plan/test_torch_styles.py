"""Style names and torch styles, both ways. No process group: models are on the meta device."""

import copy

import pytest
import torch
from harness.models import MODELS
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)
from transformers import AutoConfig, AutoModelForCausalLM

from hf_automodel_parallel import PlanError, UnsupportedError
from hf_automodel_parallel.core.model_structure import find_layers
from hf_automodel_parallel.parallelizer.torch_plans import (
    NamedStyle,
    get_hf_tp_shard_plan,
    get_parallel_plan,
    translate_to_torch_parallel_style,
)
from hf_automodel_parallel.plan.analysis.varying_check import complete
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan.sources.huggingface import huggingface_plan
from hf_automodel_parallel.plan.styles import KNOWN_STYLES, REFUSED_STYLES
from hf_automodel_parallel.plan.torch_styles import _style_name, check_sequence_layouts

pytestmark = pytest.mark.both_ends

UP, DOWN, Q, OUT = (
    f"model.layers.*.{name}" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj")
)


def build(name, **overrides):
    model_type, values = MODELS[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(values | overrides)))


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def spec_of(model, plan):
    return resolve(model, select_plan(model, plan), 2)


def reads_as(model, styles, names):
    """The torch plan resolves to the same as the plan of names."""
    got, want = spec_of(model, styles), spec_of(model, names)
    assert (got.parameters, got.modules) == (want.parameters, want.modules)


SUMMED = "replicated_with_grad_allreduce"  # has no torch style: None, as in the reference


@pytest.mark.parametrize("style", sorted({*KNOWN_STYLES, "sequence_parallel"} - {SUMMED}))
def test_every_name_has_a_torch_style_of_its_own(style):
    first, second = translate_to_torch_parallel_style(style), translate_to_torch_parallel_style(style)
    assert isinstance(first, ParallelStyle) and type(first) is type(second) and first is not second


@pytest.mark.parametrize("name", sorted(MODELS))
def test_translated_plans_resolve_to_the_same(name):
    """From names to torch styles and back, for every model with a plan of its own. Without the entries that torch has
    no style for, the partial gradients are found in the run on fake tensors.
    """
    model = build(name)
    plan = select_plan(model, plan_order=("hf",)) if huggingface_plan(model) else None
    if plan is None:
        assert name in ("gpt2", "gptj")  # gptj has none in the oldest transformers
        with pytest.raises(AssertionError, match="Hugging Face tp plan is not supported"):
            get_hf_tp_shard_plan(model)
        return
    want = resolve(model, plan, 2)
    unused = {entry.pattern for entry in want.unmatched}
    translated = get_hf_tp_shard_plan(model)
    summed = {key for key, entry in plan.entries.items() if entry.style == SUMMED}
    assert translated.keys() == plan.entries.keys() - summed
    got = spec_of(model, {key: style for key, style in translated.items() if key not in unused})
    if summed:
        for spec in (got, want):
            complete(model, spec, find_layers(model), 2, strict=True)
    assert (got.parameters, got.modules) == (want.parameters, want.modules)


@pytest.mark.parametrize("style", [None, 3, ColwiseParallel()])
def test_a_style_that_is_no_string(style):
    for error in (AssertionError, ValueError):
        with pytest.raises(error, match="must be a string"):
            translate_to_torch_parallel_style(style)


@pytest.mark.parametrize("style", ["columnwise", *REFUSED_STYLES])
def test_unknown_and_refused_names(style):
    if style == "sequence_parallel":
        return
    with pytest.raises(ValueError, match=style):
        translate_to_torch_parallel_style(style)
    with pytest.raises(ValueError, match=style):
        NamedStyle(style)


LAYOUTS = {
    "column, output whole": ({UP: ColwiseParallel(output_layouts=Replicate())}, {UP: "colwise_gather_output"}),
    "row, input whole": ({DOWN: RowwiseParallel(input_layouts=Replicate())}, {DOWN: "rowwise_split_input"}),
    "pair": ({UP: ColwiseParallel(), DOWN: RowwiseParallel()}, {UP: "colwise", DOWN: "rowwise"}),
    "pair through DTensors": (
        {UP: ColwiseParallel(use_local_output=False), DOWN: RowwiseParallel(use_local_output=False)},
        {UP: "colwise", DOWN: "rowwise"},
    ),
    "grouped heads through DTensors": (
        {key: ColwiseParallel(use_local_output=False) for key in (Q, Q.replace("q_", "k_"))} | {OUT: RowwiseParallel()},
        {Q: "colwise", Q.replace("q_", "k_"): "colwise", OUT: "rowwise"},
    ),
    "DTensor without a partner": ({UP: ColwiseParallel(use_local_output=False)}, {UP: "colwise_gather_output"}),
    "head": (
        {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)},
        {"lm_head": "colwise_gather_output"},
    ),
    "embedding": (
        {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())},
        {"model.embed_tokens": "embedding_rowwise"},
    ),
    "embedding by columns": (
        {"model.embed_tokens": ColwiseParallel(output_layouts=Replicate())},
        {"model.embed_tokens": "embedding_colwise"},
    ),
    "parameter": ({UP + ".weight": ColwiseParallel()}, {UP + ".weight": "colwise"}),
    "sum of outputs": (
        {"model.layers.*.mlp": PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())},
        {"model.layers.*.mlp": "all_reduce"},
    ),
    "along the sequence": (
        {
            "model.norm": SequenceParallel(),
            "model.layers.*.mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
            UP: ColwiseParallel(input_layouts=Shard(1)),
            DOWN: RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        },
        {"model.norm": "replicate", "model.layers.*.mlp": "replicate", UP: "colwise", DOWN: "rowwise"},
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_are_read_as_names(llama, case):
    reads_as(llama, *LAYOUTS[case])


def test_packed_projections_behind_a_dtensor_stay_whole():
    """Gate and up in one matrix: a rank's slice of it is not what its slice of the next layer needs."""
    styles = {UP.replace("up_", "gate_up_"): ColwiseParallel(use_local_output=False), DOWN: RowwiseParallel()}
    reads_as(build("phi3"), styles, dict(zip(styles, ("colwise_gather_output", "rowwise_split_input"), strict=True)))


def test_adapters_work_and_the_plan_says_what_was_read(llama):
    with torch.device("meta"):
        model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["up_proj", "lm_head"]))
    styles = {UP: ColwiseParallel(), DOWN: RowwiseParallel(), "lm_head": ColwiseParallel(output_layouts=Replicate())}
    reads_as(model, styles, {UP: "colwise", DOWN: "rowwise", "lm_head": "colwise_gather_output"})
    assert f"{UP}: ColwiseParallel is read as 'colwise'." in spec_of(model, styles).notes


@pytest.mark.parametrize(
    "key, style",
    [
        (UP, ColwiseParallel(input_layouts=Shard(0))),
        (UP, ColwiseParallel(output_layouts=Shard(1))),
        (DOWN, RowwiseParallel(output_layouts=Shard(-1))),
        ("model.norm", SequenceParallel(sequence_dim=0)),
        ("model.norm", PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0))),
    ],
)
def test_layouts_without_a_name_run_on_torchs_engine(llama, key, style):
    assert next(m.native_style for m in spec_of(llama, {key: style}).modules.values()) is style


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"model.norm": ColwiseParallel()}, "model.norm is a LlamaRMSNorm"),
        ({"model.embed_tokens": RowwiseParallel()}, r"Use RowwiseParallel\(input_layouts=Replicate\(\)\)"),
        ({UP + ".weight": SequenceParallel()}, "for modules"),
        (
            {
                "model.layers.*.mlp": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Shard(-1)),
                UP: "colwise",
            },
            "hand DTensors to model.layers.0.mlp.up_proj",
        ),
    ],
)
def test_torch_styles_that_cannot_be_right(llama, plan, message):
    with pytest.raises(PlanError, match=message):
        spec_of(llama, plan)


def test_layouts_along_the_sequence_are_not_dropped_silently(llama):
    for style in (SequenceParallel(), RowwiseParallel(output_layouts=Shard(1))):
        plan = select_plan(llama, {DOWN: style})
        check_sequence_layouts(plan, sequence_parallel=True)
        with pytest.raises(PlanError, match="sequence_parallel=False"):
            check_sequence_layouts(plan, sequence_parallel=False)
    check_sequence_layouts(select_plan(llama, {DOWN: RowwiseParallel()}), sequence_parallel=False)


def test_named_styles_say_what_torch_cannot_do():
    with pytest.raises(UnsupportedError, match="packed_colwise"):
        NamedStyle("packed_colwise")._apply(nn.Linear(2, 2), None)
    assert NamedStyle("packed_colwise") == NamedStyle("packed_colwise") != NamedStyle("packed_rowwise")
    assert copy.deepcopy(NamedStyle("replicate")) == NamedStyle("replicate")


# ---- _get_parallel_plan -------------------------------------------------------------------------------------------


def layout(style):
    return type(style), style.input_layouts, style.output_layouts, style.use_local_output


def test_sequence_parallelism_is_derived(llama):
    plan = get_parallel_plan(llama, sequence_parallel=True, tp_size=2)
    norms = {key for key, style in plan.items() if type(style) is SequenceParallel}
    assert norms == {"model.norm", "model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm"}
    sequence, whole, features = (Shard(1),), (Replicate(),), (Shard(-1),)
    assert layout(plan["model.embed_tokens"]) == (RowwiseParallel, whole, sequence, False)
    assert layout(plan[Q]) == (ColwiseParallel, sequence, features, True)
    assert layout(plan[DOWN]) == (RowwiseParallel, features, sequence, False)
    assert layout(plan["lm_head"]) == (ColwiseParallel, sequence, whole, True)


@pytest.mark.parametrize("name", ["mixtral", "gemma3n"])
def test_sequence_parallelism_that_cannot_be_derived_is_refused(name):
    with pytest.raises(UnsupportedError, match="sequence_parallel=True"):
        get_parallel_plan(build(name), sequence_parallel=True, tp_size=2)


def test_order_of_sources(llama, monkeypatch):
    from hf_automodel_parallel.plan.sources import registry as optimized

    monkeypatch.setattr(optimized, "OPTIMIZED_PLANS", {})
    given = {UP: ColwiseParallel()}
    assert get_parallel_plan(llama, tp_shard_plan=given, tp_size=2) is given
    assert get_parallel_plan(llama, tp_size=2).keys() == get_hf_tp_shard_plan(llama).keys()
    assert get_parallel_plan(llama, tp_shard_plan="llama", tp_size=2).keys() == get_hf_tp_shard_plan(llama).keys()
    optimized.OPTIMIZED_PLANS["LlamaForCausalLM"] = lambda model: {"lm_head": "colwise_rep"}
    assert list(get_parallel_plan(llama, tp_size=2)) == ["lm_head"]

    def fails(model):
        raise RuntimeError("not this config")

    optimized.OPTIMIZED_PLANS["LlamaForCausalLM"] = fails
    assert get_parallel_plan(llama, tp_size=2).keys() == get_hf_tp_shard_plan(llama).keys()


def test_a_model_without_a_usable_plan():
    gpt2 = build("gpt2")
    with pytest.raises(ValueError, match="Note: "):
        get_parallel_plan(gpt2, tp_size=2)
    assert "lm_head" in get_parallel_plan(gpt2, tp_size=1)
    with pytest.raises(ValueError, match="nowhere"):
        get_parallel_plan(gpt2, tp_shard_plan="nowhere.plan", tp_size=1)


def test_custom_code_is_told_why_its_plan_was_not_used():
    custom = type(
        "Custom", (nn.Module,), {"__module__": "transformers_modules.x", "_tp_plan": {"layers.*.up": "new_style"}}
    )
    model = custom()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].up = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"custom-code class Custom.*Note: .*new_style"):
        get_parallel_plan(model, tp_size=2)
    get_parallel_plan(model, tp_size=1)


def test_a_subclass_is_not_taken_for_the_name_that_it_carries():
    """It may apply itself in another way, so it runs on torch's engine."""

    class Own(NamedStyle):
        pass

    class Columns(ColwiseParallel):
        style_name = "colwise"

    assert _style_name(NamedStyle("colwise")) == "colwise"
    assert _style_name(Own("colwise")) is None and _style_name(Columns()) is None
