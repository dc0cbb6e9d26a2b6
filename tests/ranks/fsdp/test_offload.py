"""What is kept on the CPU: parameters and optimizer state (cpu_offload), what checkpoints save (activation offload)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from torch.distributed.fsdp import CPUOffloadPolicy

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel import activation_checkpointing as checkpointing


def step(
    sizes: dict[str, int],
    dp_size: int,
    adapter: Any,
    plugin_options: dict[str, Any],
    config: dict[str, Any] | None = None,
) -> tuple[float, dict[str, torch.Tensor | None], int]:
    """Loss and gradients of one step, and how often something was saved on the CPU."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT", **plugin_options
    )
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **(config or {})), fsdp_plugin=plugin)
    model = build("llama", adapter)
    batch = batches_for(model, dp_size)[data_rank(accelerator)]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    offloads = []
    original = checkpointing.save_on_cpu
    checkpointing.save_on_cpu = lambda **o: offloads.append(o) or original(**o)  # type: ignore[assignment]
    try:
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
    finally:
        checkpointing.save_on_cpu = original
    gradients = full_grads(model)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return mean_over_ranks(loss), gradients, len(offloads)


CELLS = [
    ("tp2_fsdp2", LORA, {"cpu_offload": True}, {}, 0),
    ("tp2_fsdp2", None, {"cpu_offload": CPUOffloadPolicy(pin_memory=False)}, {}, 0),
    ("tp2_fsdp2", None, {"activation_checkpointing": True, "activation_checkpointing_offload": True}, {}, 2),
    (
        "fsdp2",
        LORA,
        {"activation_checkpointing": True, "activation_checkpointing_offload": True},
        {"compile": "aot_eager"},
        2,
    ),
]


@pytest.mark.core_cases("tp2_fsdp2-cpu_offload-lora", "fsdp2-activation_checkpointing_offload-lora")
@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda c: "-".join((c[0], list(c[2])[-1], "full" if c[1] is None else "lora"))
)
def test_offloading_changes_no_gradient(cell):
    mesh, adapter, plugin, config, offloads = cell
    world, sizes, dp_size = MESHES[mesh]
    loss, gradients, count = run_distributed(world, step, sizes, dp_size, adapter, plugin, config)[0]
    reference = build("llama", adapter)
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    assert count == offloads  # one per layer
