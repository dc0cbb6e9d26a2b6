"""The callback ParallelMetrics: every batch counts once, on every mesh, with the operations of one process."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from harness.models import build_model, lora
from harness.pool import run_distributed
from harness.training import _Rows, batches_for
from transformers import Trainer, TrainingArguments

from hf_automodel_parallel import AutoParallelismConfig, ConfigError, ParallelMetrics
from hf_automodel_parallel.planner.explain import explain
from hf_automodel_parallel.trainer_plugin import metrics as metrics_module
from hf_automodel_parallel.trainer_plugin.metrics import flops_per_token

STEPS, ROWS, LENGTH = 2, 4, 16


def logged(
    sizes: dict[str, int], ranks: int, directory: str, plan: str | None = None
) -> tuple[list[dict[str, float]], float]:
    """The logs of a training with the callback, and the operations of a token."""
    model = build_model("llama")
    (batch,) = batches_for(model, 1, rows=ROWS * STEPS)
    args = TrainingArguments(
        output_dir=directory,
        use_cpu=True,
        per_device_train_batch_size=ROWS // ranks,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        parallelism_config=AutoParallelismConfig(**sizes),
    )
    metrics = ParallelMetrics(peak_tflops=1e-3, plan=plan)
    seconds: list[float] = []
    measured = metrics.measured

    def timed() -> dict[str, float]:
        seconds.append(metrics._seconds)
        return measured()

    metrics.measured = timed  # type: ignore[method-assign]
    trainer = Trainer(model, args, train_dataset=_Rows([batch]), callbacks=[metrics])
    trainer.train()
    logs = [entry | {"seconds": s} for entry, s in zip(trainer.state.log_history, seconds, strict=False)]
    return logs, flops_per_token(trainer.model) or 0.0


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize(
    ("sizes", "data_ranks"),
    [({"tp_size": 2}, 1), ({"dp_shard_size": 2}, 2), ({"cp_size": 2}, 1)],
    ids=["tp2", "fsdp2", "cp2"],
)
def test_each_batch_counts_once(sizes, data_ranks, tmp_path):
    results = run_distributed(2, logged, sizes, data_ranks, str(tmp_path))
    expected = flops_per_token(build_model("llama"))
    for logs, flops in results:
        assert flops == expected and len(logs) == STEPS
    logs = results[0][0]
    # All ranks log the same; the time is that of the slowest rank.
    assert [{**e, "seconds": 0} for e in logs] == [{**e, "seconds": 0} for e in results[1][0]]
    for step, entry in enumerate(logs):
        slowest = max(result[0][step]["seconds"] for result in results)
        assert entry["tokens_per_second"] == pytest.approx(ROWS * LENGTH / slowest, rel=1e-3)
        assert entry["tokens_per_second_per_device"] == pytest.approx(entry["tokens_per_second"] / 2, rel=1e-3)
        teraflops = entry["tokens_per_second_per_device"] * expected / 1e12
        assert entry["tflops_per_device"] == pytest.approx(teraflops, rel=1e-3)
        assert entry["mfu"] == pytest.approx(teraflops / 1e-3, rel=1e-3)
        assert 0 <= entry["data_wait_seconds"] < slowest and entry["peak_memory_gib"] > 0.1


def test_operations_of_a_token():
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 8))
    assert flops_per_token(model) == 6 * (24 + 48)
    model[2].requires_grad_(False)
    assert flops_per_token(model) == 6 * 24 + 4 * 48
    adapted = lora(build_model("llama"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    frozen = sum(p.numel() for n, p in adapted.named_parameters() if not p.requires_grad and p.ndim > 1)
    table = adapted.get_input_embeddings().weight.numel()
    assert flops_per_token(adapted) == 6 * trained + 4 * (frozen - table)


def test_operations_of_a_token_with_a_tied_head():
    """The head's product counts, and no other table's: it is no matrix product."""
    model = build_model("llama_tied")
    model.positions = torch.nn.Embedding(8, 4)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "positions" not in n)
    assert model.config.tie_word_embeddings and flops_per_token(model) == 6 * matrices
    model.config.is_encoder_decoder = True
    assert flops_per_token(model) is None


def trainer_without_config(directory: str) -> Trainer:
    args: Any = TrainingArguments(output_dir=directory, use_cpu=True, max_steps=1, report_to=[], disable_tqdm=True)
    model = build_model("llama")
    return Trainer(model, args, train_dataset=_Rows(batches_for(model, 1)), callbacks=[ParallelMetrics()])


def train_without_config(directory: str) -> str:
    try:
        trainer_without_config(directory).train()
    except ConfigError as error:
        return str(error)
    return ""


def test_without_a_config(tmp_path):
    messages = run_distributed(2, train_without_config, str(tmp_path))
    assert all("measures a model that AutoParallelismConfig parallelises" in message for message in messages)


def train_beside_a_plan(directory: str) -> tuple[str, str]:
    """The line of a run with the plan of its mesh, and the error with one of another."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_module, "tell", lambda _, line: lines.append(line))
        logged({"tp_size": 2}, 1, directory, plan=f"{directory}/tp2.json")
    try:
        logged({"tp_size": 2}, 1, directory, plan=f"{directory}/tp4.json")
    except ConfigError as error:
        return lines[0], str(error)
    return lines[0], ""


def test_beside_a_plan(tmp_path):
    """What ``plan`` said of parameters and AdamW's state is what the ranks hold."""
    build_model("llama").config.save_pretrained(tmp_path)
    fields = {"batch": ROWS, "sequence": LENGTH, "dtype": "fp32"}
    found = explain(str(tmp_path / "config.json"), {"tp_size": 2}, **fields).to_dict()
    (tmp_path / "tp2.json").write_text(json.dumps(found))
    (tmp_path / "tp4.json").write_text(json.dumps({**found, "sizes": {**found["sizes"], "tp": 4}}))
    pattern = "memory beside tp2.json: parameters (.+), said (.+); optimizer state (.+), said (.+)"
    for line, error in run_distributed(2, train_beside_a_plan, str(tmp_path), timeout=240):
        held = re.fullmatch(pattern, line)
        assert held is not None and held[1] == held[2] and held[3] == held[4], line
        assert "is of the mesh" in error and "'tp': 4" in error


def test_a_file_that_is_no_plan(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    for name in ("plan.json", "none.json"):
        with pytest.raises(ConfigError, match="is no file of hf-automodel-parallel plan --json"):
            ParallelMetrics(plan=tmp_path / name)


def test_in_one_process(tmp_path):
    trainer = trainer_without_config(str(tmp_path))
    with pytest.warns(UserWarning, match="one process"):
        trainer.train()
    assert "tokens_per_second" not in trainer.state.log_history[0]
