"""Loss parallelism: which head qualifies, what is refused, memory of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness.models import build_model, lora

from hf_automodel_parallel import AutoParallelismConfig, ConfigError, PlanError
from hf_automodel_parallel.core.sharding_spec import OutputHook
from hf_automodel_parallel.plan.loss_parallel import keep_logits_sharded
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.tensor_parallel.vocab_parallel.cross_entropy import Vocabulary
from hf_automodel_parallel.tensor_parallel.vocab_parallel.logits import shard_logits


def peak_of_logits(dtype: torch.dtype, sharded: bool, chunk_rows: int | None) -> int:
    """Bytes at the peak of head, loss and backward on a fake tp group of four, where nothing but logits is large."""
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers.loss.loss_utils import ForCausalLMLoss

    from hf_automodel_parallel.tensor_parallel.collectives import gather_from_tp

    rows, hidden, classes = 256, 8, 8192
    hidden_states = torch.randn(1, rows, hidden, dtype=dtype)
    weight = torch.randn(classes // 4, hidden, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, classes // 4, (1, rows))
    group = dist.group.WORLD
    tracker = MemTracker()
    tracker.track_external(hidden_states, weight, labels)
    with tracker:
        logits = F.linear(hidden_states, weight)
        logits = (
            shard_logits(logits, Vocabulary(group, 0, 4, chunk_rows))
            if sharded
            else gather_from_tp(logits, group, 0, 4)
        )
        ForCausalLMLoss(logits, labels, classes).backward()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"]


@pytest.fixture
def fake_world():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_take_a_fraction_of_the_memory(fake_world, dtype):
    gathered = peak_of_logits(dtype, False, None)
    whole, chunked = (peak_of_logits(dtype, True, rows) for rows in (10**6, 16))
    assert gathered > 3 * 256 * 8192 * 4  # three copies in float32: the comparison is with something
    assert whole <= 0.3 * gathered
    bound = 256 * 2048 * (2 * dtype.itemsize)  # the slice and its gradient; of a chunk, two copies in float32
    assert bound < chunked <= 1.2 * bound + 2 * 16 * 2048 * 4 < whole


def planned(model: torch.nn.Module, size: int = 2, **options: Any) -> Any:
    spec = resolve(model, select_plan(model), size)
    keep_logits_sharded(model, spec, **options)
    return spec


def test_the_head_is_found_where_it_is_sharded_over_the_vocabulary():
    for model in (
        build_model("llama"),
        lora(build_model("llama_tied")),
        lora(build_model("llama"), modules_to_save=["lm_head"]),
    ):
        spec = planned(model)
        kept = [name for name, module in spec.modules.items() if module.output is OutputHook.SHARDED_LOGITS]
        assert kept and all("lm_head" in name for name in kept)
        assert not any(module.output is OutputHook.GATHER for name, module in spec.modules.items() if "lm_head" in name)
        assert any("logits stay sharded" in note for note in spec.notes)
    spec = planned(build_model("llama"), wanted=False)
    assert not any(module.output is OutputHook.SHARDED_LOGITS for module in spec.modules.values())


def test_ranks_compare_where_logits_stay_sharded_but_not_the_rows_of_a_chunk():
    kept, chunked, gathered = (
        planned(build_model("llama"), **options) for options in ({}, {"chunk_rows": 8}, {"wanted": False})
    )
    assert kept.parameters == gathered.parameters and kept.described() != gathered.described()
    assert kept.modules != chunked.modules and kept.described() == chunked.described()


def test_an_odd_vocabulary_falls_back_with_a_note_and_is_refused_when_required():
    model = build_model("llama_odd_vocab")
    assert any("lm_head is not sharded over the vocabulary" in note for note in planned(model).notes)
    with pytest.raises(
        PlanError, match="loss_parallel=True cannot be honoured: lm_head is not sharded .*tp_size that divides"
    ):
        planned(model, wanted=True)
    with pytest.raises(PlanError, match="loss_chunk_size=8 cannot be honoured"):
        planned(model, chunk_rows=8)


def test_a_model_without_an_output_projection_is_refused_when_required():
    model = build_model("llama").model
    planned(model)
    with pytest.raises(PlanError, match="LlamaModel has no output projection"):
        planned(model, wanted=True)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"loss_parallel": "yes"}, "loss_parallel='yes'"),
        ({"loss_chunk_size": 0}, "loss_chunk_size=0"),
        ({"loss_chunk_size": True}, "loss_chunk_size=True"),
        ({"loss_chunk_size": 8, "loss_parallel": False}, "loss_chunk_size=8 .*loss_parallel=False"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        AutoParallelismConfig(tp_size=2, **values)


@pytest.mark.parametrize("values", [{"loss_parallel": True}, {"loss_chunk_size": 8}])
def test_a_tp_axis_is_needed(values):
    config = AutoParallelismConfig(dp_shard_size=2, **values)
    with pytest.raises(ConfigError, match=f"{next(iter(values))}=.* with tp_size=1 has no effect: the vocabulary"):
        config.resolve_sizes(2)
    AutoParallelismConfig(tp_size=2, **values).resolve_sizes(2)
