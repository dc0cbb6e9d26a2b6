"""Which adapters are replicated over the data-parallel ranks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from harness.models import build_model, lora
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.errors import ConfigError
from hf_automodel_parallel.fsdp import adapter_placement
from hf_automodel_parallel.fsdp.adapter_placement import adapters_over_dp
from hf_automodel_parallel.fsdp.options import ShardingOptions

ALL = {"target_modules": "all-linear"}


def chosen(model: nn.Module, asked: str = "replicated", ranks: int = 2, **options: Any) -> set[str]:
    return set(adapters_over_dp(model, find_structure(model), ShardingOptions(**options), asked, ranks))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "adapter",
    [ALL, ALL | {"use_dora": True}, ALL | {"bias": "all"}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}],
    ids=str,
)
def test_all_that_lora_trains(adapter):
    model = lora(build_model("llama", mlp_bias=True), **adapter)
    assert chosen(model) == trained(model)


def test_by_property():
    """IA3's vectors and trained norms are adapters, too; a layer that trains more than it freezes has none."""
    model = get_peft_model(build_model("llama"), IA3Config(task_type="CAUSAL_LM"))
    assert chosen(model) == trained(model) != set()
    model = build_model("llama").requires_grad_(False)
    model.model.layers[0].input_layernorm.requires_grad_(True)
    model.model.layers[1].requires_grad_(True).self_attn.q_proj.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert chosen(model) == {"model.layers.0.input_layernorm.weight"}


def test_full_copies_stay_sharded_and_frozen_adapters_go_with_the_others():
    model = lora(build_model("llama"), **ALL, modules_to_save=["lm_head", "post_attention_layernorm"])
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=2))
    adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert any(".other." in name for name in adapters) and any("modules_to_save" in name for name in trained(model))
    assert chosen(model) == adapters


def test_auto_takes_few_small_ones(monkeypatch):
    large = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model = lora(build_model("llama", **large), **ALL)
    assert chosen(model, "auto") == trained(model)
    assert chosen(model, "auto", ranks=1) == chosen(model, "sharded") == set()
    assert chosen(model, "auto", offload_policy=CPUOffloadPolicy()) == set()
    monkeypatch.setattr(
        adapter_placement, "_MOST_ELEMENTS", sum(model.get_parameter(n).numel() for n in trained(model))
    )
    assert chosen(model, "auto") == trained(model)
    assert chosen(lora(build_model("llama", **large), **ALL, r=9), "auto") == set()
    monkeypatch.undo()
    assert chosen(lora(build_model("llama", **large), **ALL, r=64), "auto") == set()


def test_refused():
    model = lora(build_model("llama"), **ALL)
    with pytest.raises(ConfigError, match="replicated' with CPU offload: .* different devices"):
        chosen(model, offload_policy=CPUOffloadPolicy())
    with pytest.raises(ConfigError, match="replicated' with min_num_params"):
        chosen(model, minimum_unit_size=100)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no adapters"):
        chosen(build_model("llama"))
    assert chosen(build_model("llama"), ranks=1) == set()
    with pytest.raises(ConfigError, match="adapters_over_dp='all': give one of sharded, replicated, auto"):
        AutoParallelismConfig(adapters_over_dp="all")
    with pytest.raises(ConfigError, match="adapters_over_dp='replicated' is an option of backend='fsdp2' alone"):
        AutoParallelismConfig(adapters_over_dp="replicated", backend="megatron_fsdp", dp_shard_size=2)
