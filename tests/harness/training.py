"""Training steps that the ranks run: first gradients, five steps of an Accelerate loop, five of the Trainer.

Every function here is sent to the worker pool by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

from harness.compare import full_grads, mean_over_ranks
from harness.models import build_model, lora, make_batches
from hf_automodel_parallel import AutoParallelismConfig

SEQUENCE = 16
LORA = {"target_modules": "all-linear"}


def build(name: str, adapter: dict[str, Any] | None = None, **overrides: Any) -> torch.nn.Module:
    """The model of a cell; `adapter` holds LoRA overrides, or is None for full fine-tuning."""
    model = build_model(name, **overrides)
    return model if adapter is None else lora(model, **adapter)


def batches_for(model: torch.nn.Module, parts: int, rows: int = 4, seed: int = 3, ragged: Any = False) -> list[dict]:
    """`parts` micro-batches of equal size that together are the batch."""
    return make_batches(parts, rows // parts, SEQUENCE, model.config.vocab_size, seed, ragged)


def data_rank(accelerator: Accelerator) -> int:
    """This rank's place among the data-parallel ranks."""
    return dist.get_rank() // accelerator.parallelism_config.non_data_parallel_size


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def first_gradients(
    name: str,
    sizes: dict[str, int],
    adapter: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    dp_size: int = 1,
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Loss and gradients of one step at the initial weights, through a plain Accelerate loop."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build(name, adapter, **(overrides or {}))
    batches = batches_for(model, dp_size)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    loss = model(**batches[data_rank(accelerator)], use_cache=False).loss
    accelerator.backward(loss)
    return mean_over_ranks(loss), full_grads(model)


def five_steps_accelerate(
    name: str,
    sizes: dict[str, int],
    adapter: dict[str, Any] | None = None,
    dp_size: int = 1,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
    optimizer: str = "adamw",
) -> list[dict[str, float]]:
    """Losses and gradient norms of five optimizer steps of a plain Accelerate loop."""
    set_seed(0)
    accelerator = Accelerator(
        parallelism_config=AutoParallelismConfig(**sizes), gradient_accumulation_steps=accumulation
    )
    model = build(name, adapter)
    steps = [batches_for(model, dp_size * accumulation, rows=8, seed=10 + step) for step in range(5)]
    choices = {"adamw": {}, "fused": {"fused": True}, "foreach": {"foreach": True}, "forloop": {"foreach": False}}
    stepper = torch.optim.AdamW(trainable(model), lr=1e-3, weight_decay=0.0, **choices[optimizer])
    model, stepper = accelerator.prepare(model, stepper)
    mine = data_rank(accelerator)
    history = []
    for batches in steps:
        total, norm = torch.zeros(()), None
        for micro in range(accumulation):
            with accelerator.accumulate(model):
                loss = model(**batches[micro * dp_size + mine], use_cache=False).loss
                accelerator.backward(loss)
                total += loss.detach()
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
                stepper.step()
                stepper.zero_grad()
        dist.all_reduce(total)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        history.append({"loss": total.item() / (dist.get_world_size() * accumulation), "grad_norm": norm.item()})
    return history


class _Rows(torch.utils.data.Dataset):
    """The rows of consecutive batches, in the order in which one process would read them."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self.rows = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def five_steps_trainer(
    name: str,
    sizes: dict[str, int],
    adapter: dict[str, Any] | None = None,
    dp_size: int = 1,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
    ragged: Any = False,
    optim: str = "adamw_torch",
    output_dir: str = "unused",
    **arguments: Any,
) -> list[dict[str, float]]:
    """Losses and gradient norms that the stock Trainer logs in five optimizer steps."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        """Only the order of the data is fixed; everything else is stock."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    model = build(name, adapter)
    rows = 8
    steps = [
        batch for step in range(5) for batch in batches_for(model, accumulation, rows * accumulation, 10 + step, ragged)
    ]
    args = TrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=rows // dp_size,
        gradient_accumulation_steps=accumulation,
        max_steps=5,
        max_grad_norm=max_grad_norm,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim=optim,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        parallelism_config=AutoParallelismConfig(**sizes),
        **{"save_strategy": "no", **arguments},
    )
    trainer = InOrder(model, args, train_dataset=_Rows(steps))
    trainer.train()
    return [
        {"loss": entry["loss"], "grad_norm": entry["grad_norm"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
