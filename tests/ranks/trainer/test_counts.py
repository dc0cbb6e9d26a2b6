"""What the Trainer scales or counts by the number of processes: losses, tokens, floating-point operations."""

from __future__ import annotations

from typing import Any

import pytest
from harness.meshes import MESHES
from harness.pool import run_distributed
from harness.training import _Rows
from parity.cells import Cell
from transformers import Trainer, TrainingArguments

from hf_automodel_parallel import AutoParallelismConfig

#: Models that ignore `num_items_in_batch`, and one that divides by it.
CELLS = [Cell("bert/masked", plan="head"), Cell("bert/sequence", plan="head"), Cell("llama")]
STEPS = 2


class WithPenalty(Trainer):
    """A loss of which a part is divided by the number of items, and a part is not."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        hook = model.register_forward_hook(add_penalty)
        try:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        finally:
            hook.remove()


def add_penalty(module: Any, args: Any, output: Any) -> Any:
    output["loss"] = output["loss"] + output["logits"].float().square().mean() * 1e-2
    return output


def histories(sizes: dict[str, int] | None, ranks: int, directory: str) -> dict[str, list[dict[str, float]]]:
    """What is logged, and what the state counts, by cell."""
    found = {}
    for cell in CELLS:
        model = cell.build()
        (batches,) = cell.batches(model, 1)
        rows = len(batches[0]["input_ids"])
        args = TrainingArguments(
            output_dir=directory,
            use_cpu=True,
            per_device_train_batch_size=rows // ranks,
            per_device_eval_batch_size=rows // ranks,
            max_steps=STEPS,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=STEPS,
            include_num_input_tokens_seen="all",
            report_to=[],
            disable_tqdm=True,
            parallelism_config=None if sizes is None else AutoParallelismConfig(**sizes),
        )
        cls = WithPenalty if cell.model == "llama" else Trainer
        trainer = cls(model, args, train_dataset=_Rows(batches), eval_dataset=_Rows(batches))
        trainer.train()
        keys = ("loss", "grad_norm", "eval_loss", "num_input_tokens_seen", "total_flos")
        found[str(cell)] = [{k: entry[k] for k in keys if k in entry} for entry in trainer.state.log_history]
    return found


def alone(directory: str) -> dict[str, list[dict[str, float]]]:
    return histories(None, 1, directory)


def test_losses_and_counts_are_those_of_one_process(tmp_path):
    world, sizes, ranks = MESHES["tp2_fsdp2"]
    want = run_distributed(1, alone, str(tmp_path / "one"), timeout=200)[0]
    got = run_distributed(world, histories, sizes, ranks, str(tmp_path / "four"), timeout=280)[0]
    for name, entries in want.items():
        assert len(entries) == STEPS + 2
        for entry, wanted in zip(got[name], entries, strict=True):
            assert entry == pytest.approx(wanted, rel=1e-4), (name, got[name], entries)
