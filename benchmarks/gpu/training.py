"""Fine-tuning with the stock Trainer, with and without our config: tokens/s, TFLOP/s, MFU, memory.

Weights are random, tokens too; the model is in bf16 throughout. The clock runs from the end of the first step to the
end of the last. With one step only it runs over its micro-batches, without the first ones and without the last, which
brings what is done once: states of the optimizer and of the collectives. The device is synchronised at both ends.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from . import device as machine
from . import models


class RandomTokens(Dataset):
    """Sequences of random tokens, the same in every run."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        self.rows, self.length, self.vocabulary = rows, length, vocabulary

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self.vocabulary, (self.length,), generator=generator)
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """When each step, and the last micro-batch that warms up, has ended on the device."""

    def __init__(self, device: torch.device, warm_up: int, accumulation: int, steps: int) -> None:
        self.device, self.warm_up, self.accumulation, self.steps = device, warm_up, accumulation, steps
        self.substeps = 0
        self.begin = self.end = self.after_step = 0.0

    def _start(self) -> None:
        self.begin = self._now()
        machine.reset_peak(self.device)

    def _now(self) -> float:
        machine.synchronize(self.device)
        return time.perf_counter()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.substeps += 1  # the last micro-batch of a step is not one of them
        if self.steps == 1 and self.substeps == self.warm_up:
            self._start()
        elif self.steps == 1 and self.substeps == self.accumulation - 1:
            self.end = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.steps > 1:
            self._start()
        elif state.global_step == self.steps:
            self.after_step = self._now()
            self.end = self.end or self.after_step


class Fill(TrainerCallback):
    """Random numbers for a model that was loaded from empty files, when it is sharded."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        models.fill_with_random_numbers(model, int(os.environ.get("RANK", "0")))


def run_case(case: dict[str, Any], device: str) -> dict[str, Any]:
    """Train on this rank.

    Args:
        case: model, tiny, method, peer ("stock" or "ours"), config (of ours), optimizer, checkpointing, compile,
            micro_batch, accumulation, sequence, steps, warm_up, data_ranks, streamed, peak_tflops.
    """
    where = machine.this_device(device)
    if case["streamed"]:
        with tempfile.TemporaryDirectory() as folder:
            return _train(case, where, _streamed(case, Path(folder)), [Fill()])
    return _train(case, where, models.build(case["model"], torch.bfloat16, where, case["tiny"]), [])


def _streamed(case: dict[str, Any], directory: Path) -> nn.Module:
    """A model whose weights are read shard by shard, from files that each rank writes for itself: they are holes."""
    from transformers import AutoModelForCausalLM

    import hf_automodel_parallel

    models.write_empty_checkpoint(case["model"], directory, case["tiny"])
    model = hf_automodel_parallel.from_pretrained(AutoModelForCausalLM, str(directory), dtype=torch.bfloat16)
    return model


def _train(
    case: dict[str, Any], where: torch.device, model: nn.Module, callbacks: list[TrainerCallback]
) -> dict[str, Any]:
    if case["method"] == "lora":
        torch.manual_seed(1)
        model = models.with_lora(model)
    sequence, steps, ranks = case["sequence"], case["steps"], case["data_ranks"]
    flops = models.flops_per_token(model, sequence)
    batch = case["micro_batch"] * case["accumulation"] * ranks
    clock = Clock(where, case["warm_up"], case["accumulation"], steps)
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model=model,
            args=arguments_of(case, where, output),
            train_dataset=RandomTokens(batch * steps, sequence, model.config.vocab_size),
            callbacks=[clock, *callbacks],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if steps > 1:
        tokens = batch * sequence * (steps - 1)
    else:
        tokens = case["micro_batch"] * ranks * sequence * (case["accumulation"] - 1 - case["warm_up"])
    devices = dist.get_world_size() if dist.is_initialized() else 1
    return figures(tokens, clock.end - clock.begin, devices, flops, case["peak_tflops"]) | {
        **machine.peak_memory(where),
        "first_optimizer_step_seconds": round(clock.after_step - clock.end, 3) if steps == 1 else None,
        "losses": losses,
        "backend": dist.get_backend() if dist.is_initialized() else "none",
    }


def arguments_of(case: dict[str, Any], where: torch.device, output: str) -> TrainingArguments:
    """Arguments of the Trainer: stock ones, and our config if it is ours."""
    options: dict[str, Any] = {}
    if case["peer"] == "ours":
        from hf_automodel_parallel import AutoParallelismConfig

        config = dict(case["config"])
        if case["checkpointing"]:
            config["activation_checkpointing"] = "full"
        if case["compile"]:
            config["compile"] = True
        # The audit runs once, in the first step; it is not what a step costs.
        options["parallelism_config"] = AutoParallelismConfig(audit="off", **config)
    else:
        options["gradient_checkpointing"] = case["checkpointing"]
        options["torch_compile"] = case["compile"]
        if case["checkpointing"]:
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return TrainingArguments(
        output,
        max_steps=case["steps"],
        per_device_train_batch_size=case["micro_batch"],
        gradient_accumulation_steps=case["accumulation"],
        optim={"adamw": "adamw_torch_fused", "sgd": "sgd"}[case["optimizer"]],
        learning_rate=1e-5,
        seed=0,
        **machine.quiet_trainer(where),
        **options,
    )


def figures(tokens: int, seconds: float, devices: int, flops: float, peak: float | None) -> dict[str, Any]:
    """Speed of one device.

    Args:
        tokens: of all devices.
        flops: for one token.
        peak: TFLOP/s of one device, None if unknown.
    """
    speed = tokens / seconds / devices
    tflops = speed * flops / 1e12
    return {
        "tokens_per_s_per_gpu": round(speed, 1),
        "tflops_per_gpu": round(tflops, 2) if tflops >= 1 else tflops,
        "mfu": None if peak is None else round(tflops / peak, 4),
        "measured_seconds": round(seconds, 3),
        "measured_tokens": tokens,
        "flops_per_token": flops,
    }
