"""The strategies of model families, without ranks: layers, plans, signatures."""

from __future__ import annotations

import inspect

import pytest
import torch
from ranks.strategies.families import (
    BagelForUnifiedMultimodal,
    Block,
    build,
)
from torch import nn

from hf_automodel_parallel.activation_checkpointing import is_checkpointed
from hf_automodel_parallel.plan.sources.registry import optimized_plan
from hf_automodel_parallel.strategies.families.bagel import (
    apply_bagel_full_layer_activation_checkpointing,
)
from hf_automodel_parallel.strategies.families.deepseek_v4 import DeepseekV4ParallelizationStrategy, InOwnDtype
from hf_automodel_parallel.strategies.families.nemotron_h import nemotronh_decoder_blocks
from hf_automodel_parallel.strategies.families.video import head_sharded_attentions
from hf_automodel_parallel.strategies.registry import (
    BUILT_IN,
    PARALLELIZATION_STRATEGIES,
    get_parallelization_strategy,
)


def test_float32_parts_under_autocast():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(2, 8).to(torch.bfloat16)
    want = layer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(InOwnDtype(layer, keep_output=True).wrap(layer.forward)(x), want)
        assert torch.equal(InOwnDtype(layer, keep_output=False).wrap(layer.forward)(x), want.to(torch.bfloat16))
        assert not torch.equal(layer(x).float(), want)


REFERENCE_ARGUMENTS = [
    *("model", "device_mesh", "mp_policy", "offload_policy", "sequence_parallel", "activation_checkpointing"),
    *("tp_shard_plan", "dp_replicate_mesh_name", "dp_shard_cp_mesh_name", "tp_mesh_name"),
]


@pytest.mark.parametrize("name", BUILT_IN)
def test_arguments_have_the_order_of_the_reference_api(name):
    method = PARALLELIZATION_STRATEGIES[name].parallelize
    arguments = list(inspect.signature(method).parameters)
    if name.startswith(("Qwen", "Deepseek")):
        assert arguments == ["model", "device_mesh", "dp_shard_cp_mesh_name", "kwargs"]
        return
    assert arguments[:10] == REFERENCE_ARGUMENTS
    assert inspect.signature(method).parameters["activation_checkpointing"].default is name.startswith("Hunyuan")


def test_attention_of_video_models_is_sharded_by_heads():
    from hf_automodel_parallel.plan.resolve import resolve
    from hf_automodel_parallel.plan.select import select_plan

    for family, expected in (("wan", 4), ("hunyuan_video", 3)):
        model = build(family)
        assert len(list(head_sharded_attentions(model, resolve(model, select_plan(model), 2)))) == expected


class OwnCode(nn.Module):
    """Nemotron-H as in the checkpoint's own code: a backbone, and an attention that counts its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        attention = nn.Module()
        attention.q_proj, attention.num_heads = nn.Linear(4, 4), 2
        self.backbone.layers = nn.ModuleDict({"0": nn.Module(), "1": nn.Module()})
        self.backbone.layers["0"].mixer = attention


def test_nemotron_h_of_both_sources():
    model = build("nemotron_h")
    container, blocks = nemotronh_decoder_blocks(model)
    assert container is model.model.layers and blocks == list(model.model.layers)
    assert "model.layers.*.mixer.q_proj" in optimized_plan(model)
    own = type("NemotronHForCausalLM", (OwnCode,), {})()
    container, blocks = nemotronh_decoder_blocks(own)
    assert container is own.backbone.layers and blocks == list(container.values())
    plan = optimized_plan(own)
    assert "backbone.layers.*.mixer.up_proj" in plan
    assert not any("q_proj" in pattern for pattern in plan), "its forward reshapes to heads that a rank does not have"


def test_subclasses_share_the_strategy_of_their_base():
    model = build("deepseek_v4")
    model.__class__ = type("Tuned", (type(model),), {})
    assert type(get_parallelization_strategy(model)) is DeepseekV4ParallelizationStrategy


def test_bagel_checkpoints_whole_layers_of_both_towers(caplog):
    model = BagelForUnifiedMultimodal()
    assert apply_bagel_full_layer_activation_checkpointing(model)
    assert apply_bagel_full_layer_activation_checkpointing(model), "the layers are checkpointed"
    model(torch.randn(2, 8, requires_grad=True)).backward()
    assert [m.calls for m in model.modules() if isinstance(m, Block)] == [2] * 5, "recomputed once, not twice"
    assert not caplog.records
    partial = BagelForUnifiedMultimodal(vision=False)
    assert apply_bagel_full_layer_activation_checkpointing(partial)
    assert "model.vit_model.vision_model.encoder.layers" in caplog.text
    other = nn.Sequential(Block())
    assert not apply_bagel_full_layer_activation_checkpointing(other) and not is_checkpointed(other[0])
