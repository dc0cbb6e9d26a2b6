"""Sequence parallelism is derived by looking at what runs, not at names: no processes, no values."""

from typing import Any

import pytest
import torch
from harness.models import build_model, lora
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.core.sharding_spec import ON_SEQUENCE_SHARDS, PARTIAL_GRADIENT, OutputHook, ShardingSpec
from hf_automodel_parallel.errors import UnsupportedError
from hf_automodel_parallel.plan.analysis.sequence_parallel import carry_over, derive
from hf_automodel_parallel.plan.analysis.token_locality import FEATURES, TokenLocalityTrace, TokensMix
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan

ORDER = ("hf", "registry", "default")


def derived(model: nn.Module, tp_size: int = 2, plan: Any = None) -> ShardingSpec:
    spec = resolve(model, select_plan(model, plan, ORDER), tp_size)
    derive(model, spec, find_structure(model).layers)
    return spec


def meta_model(model_type: str, **values: Any) -> nn.Module:
    config = AutoConfig.for_model(model_type, **values)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def scatters(spec: ShardingSpec) -> set[str]:
    return {name for name, module in spec.modules.items() if module.output is OutputHook.REDUCE_SCATTER_SEQUENCE}


def test_a_llama_layer():
    model = build_model("llama", num_hidden_layers=1)
    before = {name: (id(p), p.device, p.requires_grad) for name, p in model.named_parameters()}
    spec = derived(model)
    layer = "model.layers.0"
    assert spec.sequence.layers == (layer,) and spec.sequence.stack == "model" and spec.sequence.tail == "model.norm"
    assert {name: (b.gathers, b.scatters) for name, b in spec.sequence.blocks.items()} == {
        f"{layer}.self_attn": (True, False),
        f"{layer}.mlp": (True, False),
    }
    assert scatters(spec) == {f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj"}
    norms = {f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"}
    assert spec.sequence.on_shards == norms
    assert {name for name, s in spec.parameters.items() if s == ON_SEQUENCE_SHARDS} == {
        f"{name}.weight" for name in norms
    }
    assert before == {name: (id(p), p.device, p.requires_grad) for name, p in model.named_parameters()}, "only read"


def test_head_norms_work_on_the_whole_sequence_and_keep_their_meaning():
    """Qwen3's q_norm is partial because heads are sharded; OLMo2's is complete because its projections are gathered."""
    qwen3, olmo2 = derived(build_model("qwen3")), derived(build_model("olmo2"))
    norm = "model.layers.0.self_attn.q_norm"
    assert qwen3.parameters[f"{norm}.weight"] == PARTIAL_GRADIENT and f"{norm}.weight" not in olmo2.parameters
    for spec in (qwen3, olmo2):
        assert norm not in spec.sequence.on_shards


def test_routers_and_experts_stay_as_they_are():
    spec = derived(build_model("qwen3_moe"))
    block = spec.sequence.blocks["model.layers.0.mlp"]
    assert (block.gathers, block.scatters) == (True, True)
    assert not any("mlp" in name for name in (*scatters(spec), *spec.sequence.on_shards))


def test_mixers_that_are_replicated_get_the_whole_sequence():
    """Decided by the convolution in it: a module that does not treat each token apart."""
    spec = derived(meta_model("falcon_h1", num_hidden_layers=2))
    mixer = "model.layers.0.mamba"
    assert (spec.sequence.blocks[mixer].gathers, spec.sequence.blocks[mixer].scatters) == (True, True)
    assert not any(name.startswith(mixer) for name in spec.sequence.on_shards)
    assert any(note.startswith(f"{mixer} gets") and "convolution" in note for note in spec.notes)


def test_without_a_norm_with_parameters_the_end_is_the_last_layer():
    spec = derived(meta_model("olmo", num_hidden_layers=2))
    assert spec.sequence.tail == "model.layers.1"


def test_layers_that_training_leaves_out_are_seen():
    """LayerDrop would leave out most of them in most runs."""
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"out_proj": "rowwise"}
    plan = {f"model.decoder.layers.*.self_attn.{name}": style for name, style in attention.items()}
    spec = derived(meta_model("opt", num_hidden_layers=2, layerdrop=0.99), plan=plan)
    assert len(spec.sequence.layers) == 2 and spec.sequence.tail == "model.decoder.final_layer_norm"


def test_flat_tokens_are_split_by_row():
    spec = derived(meta_model("llama4_text", num_hidden_layers=2))
    assert spec.sequence.blocks["model.layers.0.feed_forward"].scatters


@pytest.mark.parametrize(
    "model_type, values, match",
    [
        (
            "gemma4_text",
            {"num_hidden_layers": 2},
            r"model\.layers\.0 \(Gemma4TextDecoderLayer\) cannot work on a sequence shard",
        ),
        ("deepseek_v4", {"num_hidden_layers": 2}, r"model\.layers\.0 \(DeepseekV4DecoderLayer\) is not a hidden state"),
    ],
)
def test_refused_by_name(model_type, values, match):
    with pytest.raises(UnsupportedError, match=match):
        derived(meta_model(model_type, **values))


class Shift(nn.Module):
    """Looks harmless: same shape out as in. Token by token it is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.roll(x, 1, dims=1)


def test_a_layer_that_shifts_tokens_outside_of_blocks_is_refused():
    model = build_model("llama")
    kind = type(model.model.layers[0])

    class Shifting(kind):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.roll(super().forward(*args, **kwargs), 1, dims=1)

    Shifting.__name__ = kind.__name__  # found by this name
    model.model.layers[0].__class__ = Shifting
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0 .*roll"):
        derived(model)


def test_a_module_that_shifts_tokens_gets_the_whole_sequence():
    model = build_model("llama")
    model.model.layers[0].input_layernorm = nn.Sequential(model.model.layers[0].input_layernorm, Shift())
    spec = derived(model)
    block = spec.sequence.blocks["model.layers.0.input_layernorm"]
    assert (block.gathers, block.scatters) == (True, True)
    assert "model.layers.0.input_layernorm.0.weight" not in spec.parameters, "complete on every rank"


def test_blocks_that_write_into_their_input_are_known():
    """What a block writes into a whole sequence is not seen on the share; where somebody reads that afterwards, it is
    refused.
    """
    blocks = derived(meta_model("mixtral", num_hidden_layers=1, router_jitter_noise=0.1)).sequence.blocks
    assert {name: block.mutates_input for name, block in blocks.items()} == {
        "model.layers.0.self_attn": False,
        "model.layers.0.mlp": True,
    }
    model = build_model("llama")
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = lambda x: x  # the residual reads the input of the MLP
    mlp = model.model.layers[0].mlp
    kind = type(mlp)

    class Writing(kind):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.view(-1, x.shape[-1]).mul_(2).view(x.shape))

    mlp.__class__ = Writing
    with pytest.raises(
        UnsupportedError, match=r"model\.layers\.0 .*a block has changed its input in place, which is read again here"
    ):
        derived(model)


def test_a_forward_that_was_replaced_by_a_function_is_seen():
    """Its function reads the parameters of the model itself, not of the copy that runs."""
    model = build_model("llama")
    norm = model.model.layers[1].input_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * 1.0
    assert derived(model).parameters["model.layers.1.input_layernorm.weight"] == ON_SEQUENCE_SHARDS


@pytest.mark.parametrize("path", ["self_attn", "mlp", "mlp.down_proj"])
def test_a_block_of_two_layers_is_refused_by_name(path):
    """Its boundaries know the length and the gathered inputs of one layer."""
    model = build_model("llama")
    owner, _, name = f"model.layers.1.{path}".rpartition(".")
    setattr(model.get_submodule(owner), name, model.get_submodule(f"model.layers.0.{path}"))
    with pytest.raises(
        UnsupportedError, match=rf"layers\.0\.{path}.* is one module in model\.layers\.0 and model\.layers\.1"
    ):
        derived(model)


def test_all_copies_of_a_norm_and_adapters_added_later_follow():
    model = lora(build_model("llama"), target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    spec = derived(model)
    prefix = "base_model.model.model.layers.0.input_layernorm"
    assert spec.parameters[f"{prefix}.original_module.weight"] == ON_SEQUENCE_SHARDS
    assert spec.parameters[f"{prefix}.modules_to_save.default.weight"] == ON_SEQUENCE_SHARDS
    new = ShardingSpec()
    late = "base_model.model.model.norm.lora_A.late.weight"
    carry_over(spec, new, [late, "base_model.model.lm_head.lora_A.late.weight"])
    assert new.sequence is spec.sequence and new.parameters == {late: ON_SEQUENCE_SHARDS}


def test_a_second_adapter_on_a_layer_that_works_on_shares_follows_the_first():
    """Its name begins neither with the first adapter's nor with the layer's below, but with that of the wrapper."""
    model = lora(build_model("llama"), target_modules=["up_proj"])
    plan = {"model.layers.*.self_attn.q_proj": "colwise", "model.layers.*.self_attn.k_proj": "colwise"}
    plan |= {"model.layers.*.self_attn.v_proj": "colwise", "model.layers.*.self_attn.o_proj": "rowwise"}
    spec = derived(model, plan=plan)
    new = ShardingSpec()
    late = "base_model.model.model.layers.0.mlp.up_proj.lora_A.late.weight"
    carry_over(spec, new, [late, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.late.weight"])
    assert new.parameters == {late: ON_SEQUENCE_SHARDS}


# ---- the trace
# -----------------------------------------------------------------------------------------------------------

SHARE, WHOLE = 1009, 61


def trace(function: Any, *shapes: tuple[int, ...]) -> TokenLocalityTrace:
    mode = TokenLocalityTrace(SHARE, WHOLE, {})
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    with torch.no_grad(), mode:
        function(*inputs)
    return mode


X = (2, SHARE, 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nn.functional.layer_norm(x, (8,)),
        lambda x: x.softmax(-1),
        lambda x: x.view(-1, 8).mean(1),
        lambda x: x @ torch.empty(8, 4, device="meta"),
        lambda x: torch.cat([x, x], -1).transpose(1, 2).contiguous(),
        lambda x: nn.functional.dropout(x, 0.5, True) * x.sigmoid(),
        lambda x: x.topk(2, -1),
    ],
)
def test_operators_that_keep_tokens_apart(function):
    trace(function, X)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(1),
        lambda x: x.mean(),
        lambda x: x.mean(1),
        lambda x: x[:, 1:],
        lambda x: x[:, -1],
        lambda x: x.cumsum(1),
        lambda x: x.flip(1),
        lambda x: x.roll(1, 1),
        lambda x: x @ x.transpose(1, 2),
        lambda x: x.transpose(1, 2) @ x,
        lambda x: nn.functional.pad(x, (0, 0, 1, 0)),
        lambda x: nn.functional.layer_norm(x, (SHARE, 8)),
        lambda x: torch.cat([x, x], 1)[:, ::2].sort(1),
        lambda x: nn.functional.conv1d(x.transpose(1, 2), torch.empty(8, 8, 3, device="meta"), padding=1),
        lambda x: x[..., 0] * torch.empty(2, WHOLE, 1, device="meta"),
    ],
)
def test_operators_that_do_not(function):
    with pytest.raises(TokensMix):
        trace(function, X)


def test_labels_follow_activations():
    mode = TokenLocalityTrace(SHARE, WHOLE, {})
    with mode:
        x = torch.empty(2, WHOLE, 8, device="meta")
        mode.label(x, [FEATURES])
        assert FEATURES in mode.labels_of((x * 2).transpose(1, 2))
        assert FEATURES not in mode.labels_of(torch.empty(2, WHOLE, 8, device="meta"))
