"""What code written for the reference's module relies on, beside signatures: answers for plain modules and stand-ins,
and the first words of errors. No process group; nothing here is a transformers model unless its class is needed.
"""

from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from hf_automodel_parallel import parallelizer
from hf_automodel_parallel.parallelizer import (
    PARALLELIZATION_STRATEGIES,
    DefaultParallelizationStrategy,
    apply_fsdp2_sharding_recursively,
    get_hf_tp_shard_plan,
    get_model_layer_groups,
    get_parallelization_strategy,
    translate_to_torch_parallel_style,
    validate_tp_mesh,
)

pytestmark = pytest.mark.core


class Layer(nn.Module):
    """No forward and no parameters of its own, as mocks of layers are written."""

    def __init__(self, **heads):
        super().__init__()
        self.mlp = nn.Linear(2, 2)
        self.self_attn = nn.Module()
        vars(self.self_attn).update(heads)


def tree(**paths):
    """Modules at dotted paths (with __ for dots): a number of layers, or a module."""
    root = nn.Module()
    for path, value in paths.items():
        *owners, last = path.split("__")
        module = root
        for owner in owners:
            if not hasattr(module, owner):
                setattr(module, owner, nn.Module())
            module = getattr(module, owner)
        setattr(module, last, nn.ModuleList([Layer() for _ in range(value)]) if isinstance(value, int) else value)
    return root


# ---- the registry --------------------------------------------------------------------------------------------------


def test_a_test_that_patches_the_registry_restores_it():
    names = list(PARALLELIZATION_STRATEGIES)
    own = DefaultParallelizationStrategy()
    with patch.dict(PARALLELIZATION_STRATEGIES, {"Mine": own}):
        assert PARALLELIZATION_STRATEGIES["Mine"] is own
    assert sorted(PARALLELIZATION_STRATEGIES) == sorted(names)
    with patch.dict(PARALLELIZATION_STRATEGIES, {"Mine": own}, clear=True):
        assert dict(PARALLELIZATION_STRATEGIES) == {"Mine": own}
    assert sorted(PARALLELIZATION_STRATEGIES) == sorted(names)
    assert not PARALLELIZATION_STRATEGIES._registered, "what was looked up lazily still is"


def test_stand_ins_get_a_strategy_by_their_class():
    stand_in = type("Mine", (), {"named_children": lambda self: iter(())})()
    own = DefaultParallelizationStrategy()
    with patch.dict(PARALLELIZATION_STRATEGIES, {"Mine": own}):
        assert get_parallelization_strategy(stand_in) is own
    assert get_parallelization_strategy(MagicMock()) is parallelizer._DEFAULT_STRATEGY


# ---- head counts ---------------------------------------------------------------------------------------------------


def with_heads(path="model__layers", config=None, **heads):
    layers = nn.ModuleList([Layer(**({"num_heads": 64, "num_key_value_heads": 8} | heads)) for _ in range(2)])
    model = tree(**{path: layers})
    model.config = SimpleNamespace(**(config or {"num_attention_heads": 64, "num_key_value_heads": 8}))
    return model, layers


NAS = {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"]}

#: case -> (model, layers), and heads, key/value heads and groups of one of two ranks
COUNTS = {
    "plain": (with_heads(), (32, 4, None)),
    "inner language model": (with_heads("language_model__layers"), (32, 4, None)),
    "composite": (
        with_heads(
            "model__language_model__layers", {"text_config": SimpleNamespace(num_attention_heads=64)}, num_heads=64
        ),
        (32, 4, None),
    ),
    "groups": (
        with_heads(config={"num_attention_heads": 64, "num_key_value_heads": None}, num_key_value_groups=8),
        (32, 4, 8),
    ),
    "no groups": (with_heads(config={"num_attention_heads": 64, "num_key_value_heads": None}), (32, 32, None)),
    "nemotron-nas": (
        with_heads(
            config=NAS | {"num_attention_heads": 64, "num_key_value_heads": None, "block_configs": [1, 2]},
            num_key_value_heads=16,
            num_key_value_groups=4,
        ),
        (32, 8, 4),
    ),
}


@pytest.mark.parametrize("case", COUNTS)
def test_head_counts_of_plain_modules(case):
    (model, layers), want = COUNTS[case]
    before = dict(vars(model.config))
    for _ in range(2):
        parallelizer._update_attention_head_counts_for_tp(model, 2)
        for layer in layers:
            found = vars(layer.self_attn)
            assert (found["num_heads"], found["num_key_value_heads"], found.get("num_key_value_groups")) == want
    assert vars(model.config) == before


def test_head_counts_of_the_language_model_alone():
    model, layers = with_heads("model__language_model__layers")
    model.model.vision_tower = nn.Module()
    model.model.vision_tower.blocks = nn.ModuleList([Layer(num_heads=6) for _ in range(4)])
    parallelizer._update_attention_head_counts_for_tp(model, 4)
    assert {layer.self_attn.num_heads for layer in layers} == {16}
    assert {layer.self_attn.num_heads for layer in model.model.vision_tower.blocks} == {6}


def test_head_counts_of_something_else():
    for model in (nn.Module(), SimpleNamespace(config=SimpleNamespace(num_attention_heads=8)), MagicMock()):
        parallelizer._update_attention_head_counts_for_tp(model, 2)


# ---- layers --------------------------------------------------------------------------------------------------------

#: class -> its layers as the reference finds them, language model first. Instances are made without __init__.
TOWERS = {
    "Gemma3ForConditionalGeneration": {
        "model__language_model__layers": 3,
        "model__vision_tower__vision_model__encoder__layers": 5,
    },
    "Qwen2VLForConditionalGeneration": {"model__language_model__layers": 3, "model__visual__blocks": 5},
    "Qwen2_5_VLForConditionalGeneration": {"language_model__layers": 3, "visual__blocks": 5},
    "SmolVLMForConditionalGeneration": {"model__text_model__layers": 3, "model__vision_model__encoder__layers": 5},
    "LlavaForConditionalGeneration": {
        "model__language_model__layers": 3,
        "model__vision_tower__vision_model__encoder__layers": 5,
    },
    "Llama4ForConditionalGeneration": {"language_model__model__layers": 3, "vision_model__model__layers": 5},
    "Mistral3ForConditionalGeneration": {
        "model__language_model__layers": 3,
        "model__vision_tower__transformer__layers": 5,
    },
    "GPT2LMHeadModel": {"transformer__h": 3},
    # by name alone
    "Mistral3FP8VLMForConditionalGeneration": {
        "model__language_model__layers": 3,
        "model__vision_tower__transformer__layers": 5,
    },
    "BagelForUnifiedMultimodal": {
        "model__language_model__model__layers": 3,
        "model__vit_model__vision_model__encoder__layers": 5,
    },
    "NemotronHForCausalLM": {"backbone__layers": 3},
    "Qwen2AudioForConditionalGeneration": {"language_model__model__layers": 3, "audio_tower__layers": 5},
}


@pytest.mark.parametrize("by_name", [False, True], ids=["class", "name"])
def test_layers_of_mocks_of_known_classes(by_name):
    found, want = {}, {}
    for name, paths in TOWERS.items():
        cls = None if by_name else getattr(transformers, name, None)
        model = tree(**paths)
        model.__class__ = cls or type(name, (nn.Module,), {})
        containers = [model.get_submodule(path.replace("__", ".")) for path in paths]
        want[name] = [layer for container in containers for layer in container]
        found[name] = parallelizer._extract_model_layers(model)
        groups = ["language", *(["audio" if "Audio" in name else "vision"] if len(paths) > 1 else [])]
        assert list(get_model_layer_groups(model)) == groups, name
    assert found == want


def test_dicts_of_a_pipeline_stage_are_layers_and_named_ones_are_not():
    layers = [Layer(), Layer()]
    model = tree(transformer__h=nn.ModuleDict({"0": layers[0], "7": layers[1]}))
    model.adapters = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("default", "second", "third")})
    assert parallelizer._extract_model_layers(model) == layers
    del model.transformer
    with pytest.raises(ValueError, match="no ModuleList or ModuleDict found"):
        parallelizer._extract_model_layers(model)


def test_light_stand_ins():
    """Objects with attributes or `named_children` alone, and a mesh that is a mock."""
    layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    children = type("Children", (), {"named_children": lambda self: iter([("decoder", layers)])})()
    attributes = SimpleNamespace(model=SimpleNamespace(layers=layers))
    for stand_in in (children, attributes):
        assert parallelizer._extract_model_layers(stand_in) == list(layers)
    assert parallelizer._find_largest_module_list(children) is layers
    assert parallelizer._get_module_by_fqn(attributes, "model.layers") is layers
    assert parallelizer._get_module_by_fqn(attributes, "model.nothing") is None
    calls = []
    apply_fsdp2_sharding_recursively(
        children,
        MagicMock(spec=DeviceMesh),
        None,
        fully_shard_fn=lambda unit, **options: calls.append((unit, options["reshard_after_forward"])),
    )
    assert calls == [(layers[0], True), (layers[1], True), (layers[2], False)]
    empty = type("Empty", (), {"named_children": lambda self: iter(())})()
    apply_fsdp2_sharding_recursively(empty, MagicMock(spec=DeviceMesh), None)
    validate_tp_mesh(object(), MagicMock(size=MagicMock(return_value=4)))


# ---- plans ---------------------------------------------------------------------------------------------------------


def planned(plan, tied=False, path="model__layers"):
    model = tree(**{path: 2})
    model.config = SimpleNamespace(tie_word_embeddings=tied)
    model._tp_plan = plan
    return get_hf_tp_shard_plan(model)


def layout(style):
    return type(style), style.input_layouts, style.output_layouts, style.use_local_output


def test_the_embedding_is_added_if_it_is_not_tied():
    added = planned({"model.layers.*.mlp": "colwise"})["model.embed_tokens"]
    assert layout(added) == (RowwiseParallel, (Replicate(),), (Replicate(),), True)
    assert planned({"model.layers.*.mlp": "colwise"}, tied=True).keys() == {"model.layers.*.mlp"}
    inner = planned({"a": "colwise"}, path="model__language_model__layers")
    assert "model.language_model.embed_tokens" in inner
    assert type(planned({"model.embed_tokens": "colwise"})["model.embed_tokens"]) is ColwiseParallel


@pytest.mark.parametrize("style", ["colwise_rep", "colwise_gather_output"])
def test_a_gathered_head_keeps_its_sharded_output(style):
    plan = planned({"lm_head": style, "language_model.lm_head": style, "other": style})
    for name in ("lm_head", "language_model.lm_head"):
        assert layout(plan[name]) == (ColwiseParallel, (Replicate(),), (Shard(-1),), False)
    assert layout(plan["other"]) == (ColwiseParallel, (Replicate(),), (Replicate(),), True)


def test_entries_without_a_torch_style_are_skipped(caplog):
    assert translate_to_torch_parallel_style("replicated_with_grad_allreduce") is None
    entries = {"a": "colwise", "q_norm": "replicated_with_grad_allreduce"}
    experts = {"router": "ep_router", "up": "local_colwise", "down": "local_rowwise", "experts": "gather"}
    assert planned(entries, tied=True).keys() == {"a"}
    assert not caplog.records
    assert planned(entries | experts, tied=True).keys() == {"a"}
    assert "the experts are replicated: router, up, down, experts" in caplog.text


def test_errors_begin_as_the_reference_says_it():
    with pytest.raises(AssertionError, match="^Hugging Face tp plan is not supported for Module"):
        planned({})
    for call in (
        lambda: translate_to_torch_parallel_style("columns"),
        lambda: planned({"a": "columns"}),
    ):
        with pytest.raises(ValueError, match="^Unknown parallel style: 'columns'"):
            call()
