"""Vision-language models with images in their batches: both towers, on every rank or only on some."""

from __future__ import annotations

from typing import Any

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.pool import expect_error, run_distributed
from harness.vision_language import first_gradients, one_process, saved_and_counted

#: data-parallel rank -> micro-batch -> row -> number of images
EVERYWHERE = [[[1, 2]], [[2, 0]]]
ON_ONE_RANK = [[[1, 2]], [[0, 0]]]
#: accumulated micro-batches: images on one rank, on none, on the other
NOW_AND_THEN = [[[1, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [2, 1]]]

CHECKPOINTED = {"activation_checkpointing": "full"}
CELLS: list[tuple[str, str, str, list, dict[str, Any], dict[str, Any]]] = [
    ("llava", "tp2_fsdp2", "full", ON_ONE_RANK, {}, {}),
    ("qwen2_5_vl", "tp2_fsdp2", "lora", ON_ONE_RANK, CHECKPOINTED, {}),
    ("qwen2_5_vl", "tp2_fsdp2", "lora_all", EVERYWHERE, {}, {"odd_ranks": {"videos": True}}),
    ("qwen3_vl", "tp2_fsdp2", "full", NOW_AND_THEN, {}, {}),
    ("gemma3", "tp2_fsdp2", "frozen", ON_ONE_RANK, {}, {"own_checkpointing": True}),
    ("mistral3", "tp2_fsdp2", "full", EVERYWHERE, CHECKPOINTED, {"odd_ranks": {"large": True}}),
    ("llama4", "tp2_fsdp2", "full", ON_ONE_RANK, {}, {}),
    ("idefics3", "tp2_fsdp2", "lora", EVERYWHERE, {"towers": "layers"}, {}),
    ("internvl", "tp2_fsdp2", "frozen", ON_ONE_RANK, {"towers": "replicated"}, {}),
    ("llava", "tp2", "lora", EVERYWHERE[:1], {}, {}),
    ("qwen2_vl", "tp2", "frozen", EVERYWHERE[:1], {}, {"own_checkpointing": True}),
    ("qwen3_vl", "tp2", "lora_all", EVERYWHERE[:1], {}, {}),
    ("gemma3", "tp2", "full", EVERYWHERE[:1], {"sequence_parallel": True}, {}),
    ("smolvlm", "tp2", "lora", EVERYWHERE[:1], {"sequence_parallel": True}, {}),
    ("paligemma", "tp2", "full", EVERYWHERE[:1], {}, {}),
    ("llava_next", "fsdp2", "lora_all", ON_ONE_RANK, {}, {}),
    ("qwen2_5_vl", "fsdp2", "full", EVERYWHERE, {"towers": "layers"}, {}),
]


def label(cell) -> str:
    name, mesh, how, images, config, _ = cell
    where = "one_rank" if images is ON_ONE_RANK else "now_and_then" if images is NOW_AND_THEN else "everywhere"
    return "-".join([name, mesh, how, where, *(f"{k}={v}" for k, v in config.items())])


@pytest.mark.core_cases(
    "llava-tp2_fsdp2-full-one_rank", "qwen2_vl-tp2-frozen-everywhere", "qwen2_5_vl-fsdp2-full-everywhere-towers=layers"
)
@pytest.mark.parametrize("cell", CELLS, ids=label)
def test_gradients_equal_one_process(cell):
    name, mesh, how, images, config, arguments = cell
    world, sizes, _ = MESHES[mesh]
    loss, gradients = run_distributed(world, first_gradients, name, sizes | config, images, how, **arguments)[0]
    want_loss, want = one_process(name, images, how, arguments.get("odd_ranks"))
    assert any(gradient is not None for gradient in want.values())
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.core
def test_layers_as_units_need_images_on_all_ranks():
    """Otherwise one rank waits in the gathering of a layer that the other never runs."""
    message = "towers='layers': .* run model.visual and others the language layers .* towers='root'"
    sizes = {"dp_shard_size": 2, "towers": "layers"}
    expect_error(2, first_gradients, "qwen2_5_vl", sizes, ON_ONE_RANK, match=message, within=60.0)


# ---- what it costs, and what is left whole -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["full", "frozen", "lora"])
def test_agreeing_on_gradients_costs_one_small_all_reduce_of_a_backward(how):
    """None if nothing is trained in the root; of Llava the projector is, when only the tower is frozen."""
    for _, equal, reductions in run_distributed(2, saved_and_counted, "llava", {"dp_shard_size": 2}, how):
        assert equal and reductions == ([0, 0] if how == "lora" else [1, 1])


def test_a_replicated_tower_is_gathered_by_nobody_and_saved():
    replicated, root = (
        run_distributed(2, saved_and_counted, "llava", {"dp_shard_size": 2, "towers": towers}, "lora")
        for towers in ("replicated", "root")
    )
    for (whole, equal, _), (none, _, _) in zip(replicated, root, strict=True):
        assert equal and none == [] and whole and all("vision_tower" in name for name in whole)
