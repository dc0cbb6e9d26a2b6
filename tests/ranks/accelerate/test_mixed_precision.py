"""Mixed precision of Accelerate: what is computed in bfloat16 and what stays float32."""

from typing import Any

import pytest
import torch
from harness.compare import assert_losses_equal
from harness.meshes import MESHES, each_mesh, run_on_mesh
from harness.oracle import train_steps
from harness.training import LORA, batches_for, build, data_rank, trainable

from ranks.accelerate.jobs import make_accelerator


def train_in_bf16(sizes: dict[str, int], dp_size: int, dtype: torch.dtype, adapter: Any) -> dict[str, Any]:
    accelerator = make_accelerator(sizes, mixed_precision="bf16")
    model = build("qwen3", adapter).to(dtype)
    seen = {}
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    losses = []
    for step in range(2):
        batch = batches_for(model, dp_size, seed=10 + step)[data_rank(accelerator)]
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        if step == 0:
            seen["gradients"] = {p.grad.dtype for p in trainable(model)}
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return seen | {
        "losses": [accelerator.gather_for_metrics(loss).mean().item() for loss in losses],
        "trainable": {p.dtype for p in model.parameters() if p.requires_grad},
        "frozen": {p.dtype for p in model.parameters() if not p.requires_grad},
        "state": {v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "step"},
    }


@pytest.mark.core_cases("tp2-full-float32_model", "fsdp2-lora-bfloat16_model", "tp2_fsdp2-full-bfloat16_model")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32_model", "bfloat16_model"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@each_mesh
def test_bf16_mixed_precision_keeps_trainable_parameters_in_float32(mesh, adapter, dtype):
    """Computed in bfloat16, gradients reduced, clipped and applied in float32; frozen weights stay as they were
    loaded.
    """
    reference = build("qwen3", adapter)
    steps = [batches_for(reference, MESHES[mesh][2], seed=10 + step) for step in range(2)]
    want = [step["loss"] for step in train_steps(reference, steps, lr=1e-2, max_grad_norm=1.0)]
    for result in run_on_mesh(mesh, train_in_bf16, dtype, adapter):
        assert result["trainable"] == result["gradients"] == result["state"] == {torch.float32}
        assert result["frozen"] == (set() if adapter is None else {dtype})
        assert_losses_equal(result["losses"], want, rtol=2e-2)
