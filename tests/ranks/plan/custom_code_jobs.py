"""A model whose code is loaded from its directory: what the ranks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from harness.compare import full_grads, mean_over_ranks
from harness.models import make_batches, randomize
from harness.training import data_rank
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_automodel_parallel import AutoParallelismConfig

DIRECTORY = Path(__file__).parents[2] / "packages" / "custom_code"


def custom(name: str) -> torch.nn.Module:
    """The class ``name`` of the directory's code, with random values."""
    config = AutoConfig.from_pretrained(DIRECTORY, trust_remote_code=True)
    cls = get_class_from_dynamic_module(f"modeling_small.{name}", str(DIRECTORY))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        randomize(model)
    return model


def batches(parts: int) -> list[dict[str, torch.Tensor]]:
    return make_batches(parts, 4 // parts, 16, 128, seed=3)


def custom_gradients(
    name: str, sizes: dict[str, int], dp_size: int
) -> tuple[float, dict[str, torch.Tensor | None], list[str]]:
    """Loss and gradients through ``Accelerator.prepare``, and the names of the parameters that tp has sharded."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = custom(name)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    loss = model(**batches(dp_size)[data_rank(accelerator)]).loss
    accelerator.backward(loss)
    sharded = [n for n, p in model.named_parameters() if p.placements[-1].is_shard()]
    return mean_over_ranks(loss), full_grads(model), sharded


def prepare_untriable(sizes: dict[str, Any]) -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = custom("UntriableForCausalLM")
    accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
