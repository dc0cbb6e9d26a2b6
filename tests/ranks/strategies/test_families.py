"""The strategies of model families: each on the real class of its library, against one process, through both doors."""

from __future__ import annotations

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

from hf_automodel_parallel.strategies.registry import (
    get_parallelization_strategy,
)
from ranks.strategies.families import (
    BagelForUnifiedMultimodal,
    Block,
    batches_for,
    build,
    kept_in_float32,
    one_process,
    parallelized,
    prepared,
)

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


@pytest.mark.core_cases(
    "nemotron_h-tp2-prepare",
    "qwen3_5_text-tp2_fsdp2-parallelize",
    "deepseek_v4-fsdp2-parallelize-adapter",
    "wan-fsdp2-prepare",
    "hunyuan_video-tp2_fsdp2-prepare",
)
@pytest.mark.parametrize("cell", CELLS, ids=label)
def test_gradients_equal_one_process(cell):
    check(*cell)


@pytest.mark.parametrize("door", ["prepare", "parallelize"])
@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_the_video_transformers_run_under_tensor_parallelism(family, door):
    check(family, "tp2", door, {}, {})


# ---- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["nemotron_h", "deepseek_v4", "wan"])
def test_what_is_stored_in_float32_among_bfloat16_computes_in_float32(family):
    _check_bfloat16(family)


def test_a_float32_parameter_owned_by_a_bfloat16_module():
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


@pytest.mark.core_cases("nemotron_h-cp", "wan-heads")
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
        # Dynamo adds names with two underscores to the modules that it compiles, and takes them away later.
        members = [(name, key, value) for name in names for key, value in vars(sys.modules[name]).items()]
        return {(name, key): id(value) for name, key, value in members if not key.startswith("__")}

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


def test_no_module_global_is_swapped():
    assert run_distributed(2, globals_while_sharding) == [[], []]


# ---- BAGEL -------------------------------------------------------------------------------------------------------


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


@pytest.mark.core
def test_bagel_is_sharded_by_the_layers_of_both_towers():
    gradients, units, calls = run_distributed(2, bagel)[0]
    reference = BagelForUnifiedMultimodal()
    for part in torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)):
        (reference(part) / 2).backward()
    assert_gradients_equal(gradients, {n: p.grad for n, p in reference.named_parameters()})
    assert units == 6 and calls == [2] * 5
