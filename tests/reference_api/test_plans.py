"""Plans, styles and configs as NeMo AutoModel's parallelizer takes them, where that gets them wrong: its defects
(docs/reference_api.md lists them) are none here. On the meta device, without ranks.
"""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import transformers
from ranks.plan.test_torch_plans import llama_plan
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from hf_automodel_parallel import AutoParallelismConfig, ConfigError, PlanError
from hf_automodel_parallel.core.model_structure import model_layers
from hf_automodel_parallel.parallelizer.torch_plans import (
    get_hf_tp_shard_plan,
    get_parallel_plan,
    translate_to_torch_parallel_style,
)
from hf_automodel_parallel.parallelizer.tp_mesh import validate_tp_mesh
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.tensor_parallel.head_counts import update_attention_head_counts_for_tp

pytestmark = pytest.mark.core

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def build(model_type, auto=transformers.AutoModelForCausalLM, **values):
    with torch.device("meta"):
        return auto.from_config(transformers.AutoConfig.for_model(model_type, **values))


def vision_language(model_type, heads=4):
    text = TINY | {"hidden_size": 96, "num_attention_heads": heads, "num_key_value_heads": heads}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "depth": 2, "num_heads": 2, "num_attention_heads": 2}
    return build(
        model_type,
        transformers.AutoModelForImageTextToText,
        text_config=text,
        vision_config=vision | {"intermediate_size": 64},
    )


@pytest.mark.parametrize(
    "model_type, values",
    [
        ("llama", {}),
        ("phi3", {"pad_token_id": None}),
        ("mixtral", {"num_local_experts": 2}),
        ("deepseek_v3", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    ],
)
def test_plans_of_transformers_5_are_understood(model_type, values):
    model = build(model_type, **(TINY | {"num_key_value_heads": 4} | values))
    plan = get_hf_tp_shard_plan(model)
    assert plan.keys() == select_plan(model, plan_order=("hf",)).entries.keys()
    assert get_parallel_plan(model, tp_size=2).keys() == plan.keys()
    assert resolve(model, select_plan(model), 2).parameters


def test_keys_that_match_nothing_are_refused():
    model = build("llama", **TINY)
    plan = llama_plan() | {"model.layers.*.mlp.upproj": ColwiseParallel()}
    with pytest.raises(PlanError, match=r"'model\.layers\.\*\.mlp\.upproj' match no module"):
        resolve(model, select_plan(model, plan), 2)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_composite_configs_are_validated_and_have_layers(model_type):
    model = vision_language(model_type)
    assert len(model_layers(model)) == 4
    validate_tp_mesh(model, SimpleNamespace(size=lambda: 2))
    with pytest.raises(AssertionError, match="num_key_value_heads=3"):
        validate_tp_mesh(vision_language(model_type, heads=3), SimpleNamespace(size=lambda: 2))


def state(plan):
    return {key: (id(style), type(style), copy.deepcopy(vars(style))) for key, style in plan.items()}


def test_styles_are_neither_shared_nor_changed():
    first = translate_to_torch_parallel_style("colwise")
    first.use_local_output = False
    assert translate_to_torch_parallel_style("colwise").use_local_output is True
    model = build("llama", **TINY)
    plan = get_hf_tp_shard_plan(model)
    assert len({id(style) for style in plan.values()}) == len(plan)
    own = llama_plan()
    before = state(own)
    assert get_parallel_plan(model, tp_shard_plan=own, tp_size=2) is own
    resolve(model, select_plan(model, own), 2)
    assert state(own) == before


def test_configs_stay_as_they_are():
    """Head counts of one rank belong to the attentions; `head_dim` is not written anywhere."""
    model = build("gptj", **(TINY | {"rotary_dim": 8}))
    before = copy.deepcopy(model.config.to_dict())
    assert "head_dim" not in before
    update_attention_head_counts_for_tp(model, 2)
    validate_tp_mesh(model, SimpleNamespace(size=lambda: 2))
    get_parallel_plan(model, sequence_parallel=False, tp_size=2)
    assert model.config.to_dict() == before
    assert model.transformer.h[0].attn.num_attention_heads == 2


def test_a_mode_of_checkpointing_that_does_not_exist_is_refused():
    for value in ("of", "ful", "true"):
        with pytest.raises(ConfigError, match="activation_checkpointing"):
            AutoParallelismConfig(activation_checkpointing=value)
    assert AutoParallelismConfig(activation_checkpointing="none").activation_checkpointing in (None, "none")


def of_the_model(model):
    assert isinstance(model, nn.Module)
    return llama_plan()


def with_options(model, head):
    return {"lm_head": head, "model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}


part = functools.partial(with_options, head=ColwiseParallel(output_layouts=Replicate()))


class Callable:
    def __call__(self):
        return llama_plan()


an_object = Callable()


@pytest.mark.parametrize("name", ["llama_plan", "of_the_model", "part", "an_object"])
def test_plans_by_import_path_are_called_as_they_want(name):
    model = build("llama", **TINY)
    plan = get_parallel_plan(model, tp_shard_plan=f"{__name__}.{name}", tp_size=2)
    assert type(plan["lm_head"]) is ColwiseParallel
    assert resolve(model, select_plan(model, plan), 2).parameters["lm_head.weight"].dim == 0
