"""Options of `TrainingArguments` that touch data, saving or preparing: what one process does, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.compare import full_parameters
from harness.pool import expect_error, run_distributed
from harness.training import _Rows, batches_for, build
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.accelerate_plugin.prepared import prepared
from hf_automodel_parallel.checkpoint.manifest import MANIFEST

TP2_FSDP2 = {"tp_size": 2, "dp_shard_size": 2}
LORA: dict[str, Any] = {}
ROWS = 4
STEPS = 4
LENGTH = 23
#: Rows of five whole batches: two ranks do not fill up the last one, and an epoch ends within an accumulation.
EVEN_LENGTH = 20


class Texts(Dataset):
    """Rows of different lengths, padded to one."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(4, 17, (rows,), generator=generator).tolist()
        self.tokens = torch.randint(3, 128, (rows, 16), generator=generator)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        there = torch.arange(16) < self.lengths[index]
        tokens = torch.where(there, self.tokens[index], 0)
        labels = torch.where(there, tokens, -100)
        return {"input_ids": tokens, "labels": labels, "attention_mask": there.long()}


#: name -> options of both runs, of one process and of tp2 x fsdp2
OPTIONS: dict[str, dict[str, Any]] = {
    "shuffled": {"torch_empty_cache_steps": 1, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "length": EVEN_LENGTH},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "split_batches": {"accelerator_config": {"split_batches": True}},
    "uneven": {
        "accelerator_config": {"even_batches": True},
        "dataloader_drop_last": True,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
    },
}


def arguments(directory: str, sizes: dict[str, int] | None, ranks: int, **options: Any) -> TrainingArguments:
    config = options.get("accelerator_config") or {}
    rows = ROWS if config.get("split_batches") else ROWS // ranks
    values: dict[str, Any] = {
        "output_dir": directory,
        "use_cpu": True,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "parallelism_config": None if sizes is None else AutoParallelismConfig(**sizes),
    }
    return TrainingArguments(**values | options)


def make(
    sizes: Any,
    ranks: int,
    directory: str,
    adapter: Any = None,
    cls: type = Trainer,
    length: int = LENGTH,
    **options: Any,
) -> Trainer:
    args = arguments(directory, sizes, ranks, **options)
    return cls(build("llama", adapter), args, train_dataset=Texts(length, 1), eval_dataset=Texts(6, 2))


def history(sizes: dict[str, int] | None, ranks: int, directory: str, **options: Any) -> list[list[float]]:
    trainer = make(sizes, ranks, directory, **options)
    trainer.train()
    return [
        [entry[key] for key in ("loss", "grad_norm", "eval_loss", "learning_rate") if key in entry]
        for entry in trainer.state.log_history
    ]


def histories(sizes: dict[str, int] | None, ranks: int, directory: str) -> dict[str, list[list[float]]]:
    return {name: history(sizes, ranks, f"{directory}/{name}", **options) for name, options in OPTIONS.items()}


def alone(job: Any, *args: Any) -> Any:
    """The same Trainer without us: the only rank of its world."""
    assert dist.get_world_size() == 1
    return job(None, 1, *args)


def test_options_give_the_history_of_one_process(tmp_path):
    want = run_distributed(1, alone, histories, str(tmp_path / "one"), timeout=240)[0]
    for got in run_distributed(4, histories, TP2_FSDP2, 2, str(tmp_path / "four"), timeout=280):
        for name, history in want.items():
            assert len(got[name]) == len(history) >= STEPS, name
            for step, (values, wanted) in enumerate(zip(got[name], history, strict=True)):
                assert values == pytest.approx(wanted, rel=1e-4), (name, step, got[name], history)


def filled_up(sizes: dict[str, int] | None, directory: str) -> list[list[float]]:
    return history(sizes, 2, directory, gradient_accumulation_steps=2)


@pytest.mark.core
def test_last_batch_is_filled_up_as_in_data_parallel(tmp_path):
    """The third step has the last rows; what Accelerate repeats for two ranks has no counterpart in one process."""
    assert LENGTH % ROWS
    want = run_distributed(2, filled_up, None, str(tmp_path / "two"))[0]
    assert len(want) >= STEPS
    for got in run_distributed(4, filled_up, TP2_FSDP2, str(tmp_path / "four")):
        assert got == [pytest.approx(values, rel=1e-4) for values in want]


# ---- saving --------------------------------------------------------------------------------------------------------

#: The metric that decides: the second evaluation is the best one.
METRICS = {2: 3.0, 4: 1.0, 6: 2.0}


class Judged(Trainer):
    """Its evaluation is stock, but what it says of the model is fixed."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_loss"] = METRICS[self.state.global_step]
        return metrics


def best(sizes: dict[str, int] | None, ranks: int, directory: str, adapter: Any, strategy: str) -> Any:
    """Checkpoints that are left, and the parameters after the best of them was loaded."""
    options = {
        "save_strategy": strategy,
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "max_steps": 6,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "metric_for_best_model": "eval_loss",
    }
    trainer = make(sizes, ranks, directory, adapter, Judged, **options)
    trainer.train()
    if sizes:
        dist.barrier()  # rank 0 deletes at the end of training, and the others do not wait for it
    kept = sorted(path.name for path in Path(directory).glob("checkpoint-*"))
    parameters = full_parameters(trainer.model)
    loss = Trainer.evaluate(trainer)["eval_loss"]
    return kept, parameters, loss


@pytest.mark.parametrize("adapter, strategy", [(None, "best"), (LORA, "steps")], ids=["full-best", "lora-steps"])
def test_best_model_is_loaded_at_the_end(adapter, strategy, tmp_path):
    want_kept, want, want_loss = run_distributed(1, alone, best, str(tmp_path / "one"), adapter, strategy)[0]
    results = run_distributed(4, best, TP2_FSDP2, 2, str(tmp_path / "four"), adapter, strategy)
    for kept, parameters, loss in results:
        assert kept == want_kept
        assert loss == pytest.approx(want_loss, rel=1e-4)
        for name, tensor in want.items():
            torch.testing.assert_close(
                parameters[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def model_only(sizes: dict[str, int] | None, ranks: int, directory: str) -> list[str]:
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make(sizes, ranks, directory, LORA, **options).train()
    if sizes:
        dist.barrier()
    return sorted(path.name for path in (Path(directory) / "checkpoint-4").iterdir())


def test_save_only_model_writes_the_files_of_one_process(tmp_path):
    """And the manifest, which says that the checkpoint is complete."""
    want = sorted([*run_distributed(1, alone, model_only, str(tmp_path / "one"))[0], MANIFEST])
    assert run_distributed(4, model_only, TP2_FSDP2, 2, str(tmp_path / "four")) == [want] * 4


# ---- preparing again -----------------------------------------------------------------------------------------------


class OutOfMemory(Trainer):
    """Each of its ranks runs out of memory in the middle of a backward, as long as batches are larger than half."""

    limit: int

    def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        if self._train_batch_size > self.limit:
            assert model(**inputs).loss > 0
            raise RuntimeError("CUDA out of memory. (says the test)")
        return super().training_step(model, inputs, *args)


def smaller_batches(sizes: dict[str, int] | None, ranks: int, directory: str) -> list[list[float]]:
    OutOfMemory.limit = ROWS // ranks
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": ROWS // ranks + 1}
    trainer = make(sizes, ranks, directory, LORA, OutOfMemory, **options)
    trainer.train()
    return [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry]


def test_auto_find_batch_size_prepares_again(tmp_path):
    want = run_distributed(1, alone, smaller_batches, str(tmp_path / "one"))[0]
    for got in run_distributed(4, smaller_batches, TP2_FSDP2, 2, str(tmp_path / "four")):
        assert len(got) == len(want) == STEPS
        for values, wanted in zip(got, want, strict=True):
            assert values == pytest.approx(wanted, rel=1e-4), (got, want)


def evaluated_first(sizes: dict[str, int] | None, ranks: int, directory: str, compiled: bool) -> Any:
    """Losses of an evaluation and of the training after it; and what became of another model, that is for evaluation
    alone.
    """
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "torch_compile_mode": "default"}
    trainer = make(sizes, ranks, directory, max_steps=2, **(options if compiled else {}))
    losses = [trainer.evaluate()["eval_loss"]]
    sharded = prepared(trainer.model) is not None
    trainer.train()
    losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    reference = trainer.accelerator.prepare_model(build("llama"), evaluation_mode=True)
    whole = not any(isinstance(p, DTensor) for p in reference.parameters())
    return losses, sharded, type(trainer.model).__name__, whole


def test_an_evaluation_before_a_compiled_training(tmp_path):
    """The Trainer then asks for nothing but compilation of its model, which would leave it whole on each rank."""
    want = run_distributed(1, alone, evaluated_first, str(tmp_path / "one"), False)[0][0]
    for losses, sharded, name, whole in run_distributed(
        2, evaluated_first, {"tp_size": 2}, 1, str(tmp_path / "two"), True, timeout=200
    ):
        assert sharded and whole and "Llama" in name
        assert losses == pytest.approx(want, rel=1e-4)


# ---- refused -------------------------------------------------------------------------------------------------------


def refused(options: dict[str, Any], directory: str) -> None:
    make(TP2_FSDP2, 2, directory, **options).train()


REFUSED = {
    "dispatch_batches": ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    "average_tokens": ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False"),
    "bf16_full_eval": ({"bf16_full_eval": True}, r"bf16_full_eval=True.*Use bf16=True"),
}


@pytest.mark.core
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_on_all_ranks(name, tmp_path):
    options, match = REFUSED[name]
    expect_error(4, refused, options, str(tmp_path), match=match)


def smoothed_loss(output_dir: str, distributed: bool) -> float:
    from transformers import Trainer, TrainingArguments

    model = build("llama")
    args = TrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=1,
        logging_steps=1,
        label_smoothing_factor=0.1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        parallelism_config=AutoParallelismConfig(tp_size=2) if distributed else None,
    )
    trainer = Trainer(model, args, train_dataset=_Rows(batches_for(model, 1)))
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.core
def test_label_smoothing_shifts_labels(tmp_path):
    got = run_distributed(2, smoothed_loss, str(tmp_path), True)[0]
    assert got == pytest.approx(smoothed_loss(str(tmp_path), False), rel=1e-6)
