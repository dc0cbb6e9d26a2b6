"""``save_state`` and ``load_state`` of Accelerate continue a run exactly."""

from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.compare import assert_same_tensors, full_parameters
from harness.meshes import run_on_mesh
from harness.training import LORA, batches_for, build, data_rank, trainable

from ranks.accelerate.jobs import make_accelerator, make_schedule


def train_and_save(
    sizes: dict[str, int], dp_size: int, name: str, adapter: Any, kind: str, directory: str, resume: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, learning rates and parameters of steps 3 and 4 of 4; a resumed run starts from other weights."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    accelerator = make_accelerator(sizes, fsdp_plugin=plugin)
    model = build(name, adapter and adapter | {"seed": 7 if resume else 1}, seed=0 if adapter or not resume else 7)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, make_schedule(optimizer, False))
    history = []
    if resume:
        accelerator.load_state(directory)
    for step in range(2 if resume else 0, 4):
        if step == 2 and not resume:
            accelerator.save_state(directory)
        batch = batches_for(model, dp_size, seed=30 + step)[data_rank(accelerator)]
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step >= 2:
            history += [loss.item(), schedule.get_last_lr()[0]]
    return history, full_parameters(model)


@pytest.mark.core_cases("llama_tied-full-full_state_dict")
@pytest.mark.parametrize(
    "name, adapter, kind",
    [
        ("llama", LORA, "SHARDED_STATE_DICT"),
        ("llama_tied", None, "FULL_STATE_DICT"),
        ("phi3", None, "SHARDED_STATE_DICT"),
        ("phi3", LORA, "FULL_STATE_DICT"),
    ],
    ids=lambda value: "lora" if isinstance(value, dict) else "full" if value is None else value.lower(),
)
def test_save_state_and_load_state_continue_exactly(name, adapter, kind, tmp_path):
    """Every bit (same mesh)."""
    saved = run_on_mesh("tp2_fsdp2", train_and_save, name, adapter, kind, str(tmp_path), False)
    resumed = run_on_mesh("tp2_fsdp2", train_and_save, name, adapter, kind, str(tmp_path), True)
    for (want_history, want), (history, parameters) in zip(saved, resumed, strict=True):
        assert history == want_history
        assert_same_tensors(parameters, want, rtol=0, atol=0)
