"""Modality encoders: placements, layers and the option ``towers``."""

from __future__ import annotations

import pytest
from harness.vision_language import FAMILIES, build, trained_as
from torch import nn

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.errors import ConfigError, UnsupportedError
from hf_automodel_parallel.fsdp.encoder_placement import placement
from hf_automodel_parallel.fsdp.options import ShardingOptions
from hf_automodel_parallel.plan.analysis.sequence_parallel import derive
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan


def asked(model: nn.Module, towers: str | None, layer_classes: list[str] | None = None) -> str | None:
    return placement(model, find_structure(model, layer_classes), ShardingOptions(towers=towers), layer_classes)


def test_placements_that_the_model_does_not_have():
    model = build("llava")
    assert asked(model, None) == "root" and asked(model, "layers") == "layers"
    assert asked(model, None, ["LlamaDecoderLayer"]) == "root"
    assert asked(model, None, ["LlamaDecoderLayer", "CLIPEncoderLayer"]) == "layers"
    with pytest.raises(ConfigError, match="no parameter of the modality encoders is frozen"):
        asked(model, "replicated")
    with pytest.raises(ConfigError, match="towers='root': LlamaModel has no modality encoder"):
        asked(model.model.language_model, "root")


def test_sequence_parallelism_where_images_enter_between_the_layers():
    """Qwen3-VL adds features of the vision tower to the hidden states of its first layers."""
    model = build("qwen3_vl")
    spec = resolve(model, select_plan(model), 2)
    with pytest.raises(UnsupportedError, match="language_model .Qwen3VLTextModel. takes deepstack_visual_embeds"):
        derive(model, spec, find_structure(model).layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_both_towers_and_the_plan_of_the_language_part(name):
    model = trained_as(name, "lora_all")
    structure, spec = find_structure(model), resolve(model, select_plan(model), 2)
    assert len(structure.towers) == 1 and len(structure.tower_layers) == 2 and len(structure.main_layers) == 2
    names = {module: key for key, module in model.named_modules()}
    main = [names[layer] for layer in structure.main_layers]
    sharded = {key for key in spec.modules if key.startswith(tuple(f"{layer}." for layer in main))}
    in_tower = any(key.startswith(f"{names[structure.towers[0]]}.") for key in spec.modules)
    assert sharded and in_tower == bool(model.config.vision_config.base_model_tp_plan)  # Llama4 has one for its tower
    assert {key.split(".")[-1] for key in sharded} >= {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    assert [key.endswith("lm_head") for key in map(names.get, structure.head)] == [False, True]
    assert names[structure.head[0]].startswith(names[structure.embedding].removesuffix("embed_tokens"))


def test_the_option_is_read_and_checked():
    assert AutoParallelismConfig.parse("tp=2,towers=layers").towers == "layers"
    assert AutoParallelismConfig(tp_size=2).towers is None
    with pytest.raises(ConfigError, match="towers='tower': give one of root, layers, replicated"):
        AutoParallelismConfig(tp_size=2, towers="tower")
