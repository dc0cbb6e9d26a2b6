"""Models without a plan of their own: what the ranks run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import full_grads
from harness.models import make_batches
from harness.training import data_rank, trainable
from peft import LoraConfig, get_peft_model
from sweep.tiny import build, vocabulary

from hf_automodel_parallel import AutoParallelismConfig


def built(model_type: str, adapter: bool, **overrides: Any) -> torch.nn.Module:
    model = build(model_type, **overrides)
    if not adapter:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        return get_peft_model(model, config)


def batches(model: torch.nn.Module, parts: int) -> list[dict[str, torch.Tensor]]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return make_batches(parts, 4 // parts, 16, vocabulary(inner), seed=3)


def derived_gradients(
    model_type: str,
    sizes: dict[str, int],
    adapter: bool = False,
    dp_size: int = 1,
    overrides: dict[str, Any] | None = None,
) -> tuple[float, dict[str, torch.Tensor | None], dict[str, float]]:
    """Loss and gradients of one step through ``Accelerator.prepare``, and each parameter's share on this tp rank."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = built(model_type, adapter, **(overrides or {}))
    mine = batches(model, dp_size)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    loss = model(**mine[data_rank(accelerator)]).loss
    accelerator.backward(loss)
    total = loss.detach().clone()
    dist.all_reduce(total)
    shares = {n: p.to_local().numel() / max(p.numel(), 1) for n, p in model.named_parameters()}
    return total.item() / dist.get_world_size(), full_grads(model), shares
