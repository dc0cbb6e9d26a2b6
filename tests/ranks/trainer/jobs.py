"""The stock Trainer on tiny data, in order, and one process that does what it does."""

from typing import Any

import torch
from harness.models import make_batches
from harness.training import trainable
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    Trainer,
    TrainingArguments,
)

from hf_automodel_parallel import AutoParallelismConfig


class Rows(Dataset):
    def __init__(self, rows: int, vocabulary: int, seed: int) -> None:
        (batch,) = make_batches(1, rows, 16, vocabulary, seed)
        self.rows = [{key: tensor[i] for key, tensor in batch.items()} for i in range(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def batch(self, start: int = 0, stop: int | None = None) -> dict[str, torch.Tensor]:
        chosen = self.rows[start:stop]
        return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}


class InOrder(Trainer):
    """Only the order of the data is fixed; everything else is stock."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def arguments(directory: str, sizes: dict[str, int], dp_size: int, **options: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": directory,
        "use_cpu": True,
        "per_device_train_batch_size": 4 // dp_size,
        "per_device_eval_batch_size": 4 // dp_size,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "parallelism_config": AutoParallelismConfig(**sizes),
    }
    return TrainingArguments(**values | options)


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def history(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[list[dict]]) -> list[float]:
    """Losses of one process whose gradients are clipped at 1, as Trainer does."""
    losses = []
    for batches in steps:
        optimizer.zero_grad()
        loss = sum(model(**batch, use_cache=False).loss for batch in batches) / len(batches)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses
