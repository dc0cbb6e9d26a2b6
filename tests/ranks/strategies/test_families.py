"""The strategies of model families: each on the real class of its library, against one process, through both doors."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.pool import expect_error, run_distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hf_automodel_parallel.activation_checkpointing import is_checkpointed
from hf_automodel_parallel.plan.sources.registry import optimized_plan
from hf_automodel_parallel.strategies.families.bagel import (
    BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS,
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
from ranks.strategies.families import batches_for, build, kept_in_float32, one_process, parallelized, prepared

DOORS = {"prepare": prepared, "parallelize": parallelized}
LORA = {"adapter": True}

CELLS: list[tuple[str, str, str, dict[str, Any], dict[str, Any]]] = [
    ("nemotron_h", "fsdp2", "parallelize", {}, {}),
    ("nemotron_h", "tp2", "prepare", {}, {}),
    ("nemotron_h", "tp2_fsdp2", "parallelize", {}, {"activation_checkpointing": True}),
    ("nemotron_h", "tp2_fsdp2", "prepare", LORA, {}),
    ("qwen3_5_text", "fsdp2", "prepare", {}, {"activation_checkpointing": "full"}),
    ("qwen3_5_text", "tp2", "prepare", LORA, {}),
    ("qwen3_5_text", "tp2_fsdp2", "parallelize", {}, {}),
    ("deepseek_v4", "fsdp2", "parallelize", LORA, {}),
    ("deepseek_v4", "tp2", "parallelize", {}, {}),
    ("deepseek_v4", "tp2_fsdp2", "prepare", {}, {"activation_checkpointing": "full"}),
    ("wan", "fsdp2", "prepare", {}, {}),
    ("wan", "tp2_fsdp2", "parallelize", {}, {"activation_checkpointing": True}),
    ("wan", "tp2_fsdp2", "prepare", LORA, {}),
    ("wan_image", "tp2", "prepare", {}, {}),
    ("hunyuan_video", "fsdp2", "parallelize", {}, {}),  # checkpointed: the default
    ("hunyuan_video", "tp2_fsdp2", "prepare", {}, {}),
    ("hunyuan_video", "tp2_fsdp2", "parallelize", LORA, {"activation_checkpointing": False}),
]


def label(cell):
    family, mesh, door, arguments, options = cell
    return "-".join([family, mesh, door, *arguments, *options])


def check(family: str, mesh: str, door: str, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    world, sizes, dp_size = MESHES[mesh]
    loss, gradients = run_distributed(world, DOORS[door], family, sizes, dp_size, arguments, **options)[0][:2]
    want_loss, want = one_process(build(family, **arguments), batches_for(family, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


@pytest.mark.parametrize("cell", CELLS, ids=label)
def test_gradients_equal_one_process(cell):
    check(*cell)


@pytest.mark.parametrize("door", ["prepare", "parallelize"])
@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_defect_12_the_video_transformers_run_under_tensor_parallelism(family, door):
    check(family, "tp2", door, {}, {})


# ---- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["nemotron_h", "deepseek_v4", "wan"])
def test_what_is_stored_in_float32_among_bfloat16_computes_in_float32(family):
    _check_bfloat16(family)


def test_defect_17_a_float32_parameter_owned_by_a_bfloat16_module():
    """``A_log`` of Qwen3.5's gated delta nets, beside the projections."""
    _check_bfloat16("qwen3_5_text")


def _check_bfloat16(family: str) -> None:
    """Without tensor parallelism nothing rounds in another order, so one process in the same dtypes is the
    reference.
    """
    arguments = {"dtype": torch.bfloat16}
    world, sizes, dp_size = MESHES["fsdp2"]
    loss, gradients, seen = run_distributed(world, parallelized, family, sizes, dp_size, arguments, policy=None)[0]
    reference = build(family, **arguments)
    stored = {name: parameter.dtype for name, parameter in reference.named_parameters()}
    assert set(stored.values()) == {torch.float32, torch.bfloat16}
    assert seen.items() <= stored.items() and set(seen.values()) == set(stored.values())
    assert {n: g.dtype for n, g in gradients.items() if g is not None}.items() <= stored.items()
    batches = batches_for(family, dp_size)
    if family == "wan":  # as its pipeline calls it
        batches = [
            {k: v if k in ("timestep", "target") else v.to(torch.bfloat16) for k, v in batch.items()}
            for batch in batches
        ]
    want_loss, want = one_process(reference, batches)
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want, rtol=1e-2, atol_of_total=1e-4)


FLOAT32_PARTS = ("attn_hc", "ffn_hc", "hc_head", "lm_head", "sinks", "compressor")


@pytest.mark.parametrize("family", ["deepseek_v4", "wan", "hunyuan_video"])
def test_default_policy_over_float32_storage(family):
    """bfloat16 for compute, except for what the family keeps; gradients in the dtype of the storage."""
    world, sizes, dp_size = MESHES["tp2"]
    loss, gradients, seen = run_distributed(world, parallelized, family, sizes, dp_size, policy=None)[0]
    model = build(family)
    kept = kept_in_float32(model, family)
    if family == "deepseek_v4":
        kept |= {name for name in seen if not set(FLOAT32_PARTS).isdisjoint(name.split("."))}
    assert {name for name, dtype in seen.items() if dtype == torch.float32} == kept
    assert {dtype for name, dtype in seen.items() if name not in kept} == {torch.bfloat16}
    assert {g.dtype for g in gradients.values() if g is not None} == {torch.float32}
    assert loss == pytest.approx(one_process(model, batches_for(family, dp_size))[0], rel=1e-2)


def test_nemotron_h_without_a_policy_computes_as_stored():
    world, sizes, dp_size = MESHES["tp2"]
    seen = run_distributed(world, parallelized, "nemotron_h", sizes, dp_size, policy=None)[0][2]
    assert set(seen.values()) == {torch.float32}


def test_float32_parts_under_autocast():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(2, 8).to(torch.bfloat16)
    want = layer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(InOwnDtype(layer, keep_output=True)(x), want)
        assert torch.equal(InOwnDtype(layer, keep_output=False)(x), want.to(torch.bfloat16))
        assert not torch.equal(layer(x).float(), want)


# ---- arguments ---------------------------------------------------------------------------------------------------


def refused(family: str, axes: dict[str, int], **options: Any) -> None:
    arguments = options.pop("arguments", {})
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    model = build(family, **arguments)
    change = options.pop("change", None)
    if change == "fuse":
        model.fuse_qkv_projections()
    elif change == "norm":
        model.blocks[1].attn2.norm_q = nn.LayerNorm(48)
    get_parallelization_strategy(model).parallelize(model, mesh, **options)


TP2 = {"dp_shard": 1, "tp": 2}
CP2 = {"dp_shard": 1, "cp": 2, "tp": 1}
REFUSED = {
    "nemotron_h-cp": ("nemotron_h", CP2, {}, "NemotronH family: its Mamba mixers"),
    "qwen3_5-cp": ("qwen3_5_text", CP2, {}, "Qwen3_5 family: its gated delta nets"),
    "deepseek_v4-cp": ("deepseek_v4", CP2, {}, "DeepseekV4 family: its compressors"),
    "wan-cp": ("wan", CP2, {}, "Wan family: its sequence arises inside"),
    "hunyuan-cp": ("hunyuan_video", CP2, {}, "Hunyuan family: its sequence arises inside"),
    "nemotron_h-sp": ("nemotron_h", TP2, {"sequence_parallel": True}, "sequence_parallel=True .* NemotronH"),
    "wan-sp": ("wan", TP2, {"sequence_parallel": True}, "sequence_parallel=True .* Wan"),
    "wan-heads": ("wan", TP2, {"arguments": {"num_attention_heads": 3}}, "num_attention_heads=3 .* tp_size=2"),
    "wan-some": ("wan", TP2, {"tp_shard_plan": {"blocks.*.attn1.to_q": "colwise"}}, "not to_k, to_v"),
    "wan-typo": ("wan", TP2, {"tp_shard_plan": {"blocks.*.fnn.net.2": "rowwise"}}, "match no module"),
    "wan-norm": ("wan", TP2, {"change": "norm"}, "norm_q is a LayerNorm"),
    "wan-fused": ("wan", TP2, {"change": "fuse"}, "attn1 has fused projections"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_family_cannot_honour_is_refused(case):
    family, axes, options, match = REFUSED[case]
    expect_error(2, refused, family, axes, **options, match=match)


def custom_plan() -> tuple[float, dict[str, torch.Tensor | None], list[int], list[str]]:
    plan = {"blocks.*.ffn.net.0.proj": "colwise", "blocks.*.ffn.net.2": "rowwise"}
    given = dict(plan)
    model = build("wan")
    loss, gradients, _ = parallelized("wan", {"tp_size": 2}, 1, tp_shard_plan=plan)
    assert plan == given, "the plan of the caller has changed"
    return loss, gradients, [m.heads for m in model.modules() if hasattr(m, "heads")]


def test_a_plan_of_the_user_is_honoured():
    loss, gradients, heads = run_distributed(2, custom_plan)[0]
    want_loss, want = one_process(build("wan"), batches_for("wan", 1))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    assert set(heads) == {4}


def globals_while_sharding() -> list[str]:
    """Names of module globals of the package that differ while the model is sharded."""

    def snapshot() -> dict[tuple[str, str], int]:
        names = [name for name in sys.modules if name.startswith("hf_automodel_parallel")]
        return {(name, key): id(value) for name in names for key, value in vars(sys.modules[name]).items()}

    model = build("qwen3_5_text")
    strategy = get_parallelization_strategy(model)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp"))
    before, changed = snapshot(), []

    def shard(module: nn.Module, **options: Any) -> Any:
        now = snapshot()
        changed.extend(f"{name}.{key}" for (name, key), value in before.items() if now[name, key] != value)
        return fully_shard(module, **options)

    strategy.parallelize(model, mesh, fully_shard_fn=shard)
    return changed


def test_defect_10_no_module_global_is_swapped():
    assert run_distributed(2, globals_while_sharding) == [[], []]


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


# ---- the shape of a family ---------------------------------------------------------------------------------------


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


# ---- BAGEL -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + torch.tanh(self.mlp(x))


def nested(path: str, layers: nn.ModuleList) -> nn.Module:
    for name in reversed(path.split(".")):
        layers, inner = nn.Module(), layers
        layers.add_module(name, inner)
    return layers


class BagelForUnifiedMultimodal(nn.Module):
    """A stand-in with the names of BAGEL's modules; no library has the model."""

    def __init__(self, vision: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        for path in BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS[: 1 + vision]:
            _, tower, rest = path.split(".", 2)
            self.model.add_module(tower, nested(rest, nn.ModuleList(Block() for _ in range(2 + ("vit" in path)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for path in BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS:
            for layer in self.get_submodule(path):
                x = layer(x)
        return x.square().mean()


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


def bagel() -> tuple[dict[str, torch.Tensor], int, list[int]]:
    from harness.compare import full_grads

    model = BagelForUnifiedMultimodal()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    from torch.distributed.fsdp import MixedPrecisionPolicy

    strategy = get_parallelization_strategy(model)
    strategy.parallelize(model, mesh, mp_policy=MixedPrecisionPolicy(), activation_checkpointing=True)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    model(x[torch.distributed.get_rank()]).backward()
    units = sum(isinstance(m, FSDPModule) for m in model.modules())
    return full_grads(model), units, [m.calls for m in model.modules() if isinstance(m, Block)]


def test_bagel_is_sharded_by_the_layers_of_both_towers():
    gradients, units, calls = run_distributed(2, bagel)[0]
    reference = BagelForUnifiedMultimodal()
    for part in torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)):
        (reference(part) / 2).backward()
    assert_gradients_equal(gradients, {n: p.grad for n, p in reference.named_parameters()})
    assert units == 6 and calls == [2] * 5
