"""What a run says of itself, from stand-ins for what `prepare` leaves: no process group."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from hf_automodel_parallel.accelerate_plugin import run_report
from hf_automodel_parallel.accelerate_plugin.hooks import Hooks, set_hooks
from hf_automodel_parallel.accelerate_plugin.run_report import FirstSteps, _batch, _plan, report
from hf_automodel_parallel.core.output import tell
from hf_automodel_parallel.strategies.default import DefaultParallelizationStrategy
from hf_automodel_parallel.trainer_plugin.extend import TrainerHooks


class Accelerator(SimpleNamespace):
    __hash__ = object.__hash__


def accelerator(**more: Any) -> Accelerator:
    given = {"num_processes": 4, "split_batches": False, "gradient_accumulation_steps": 1, "_dataloaders": []}
    return Accelerator(**{**given, "device": torch.device("cpu"), **more})


def record(strategy: Any = None, **context: Any) -> SimpleNamespace:
    context = {"plan": None, "spec": None, "tp_mesh": None, **context}
    config = SimpleNamespace(data_parallel_size=2, tp_size=2)
    return SimpleNamespace(context=SimpleNamespace(**context), config=config, strategy=strategy)


def loader(size: int) -> DataLoader:
    return DataLoader(range(8), batch_size=size)


# ---- global batch ---------------------------------------------------------------------------------------------------


def test_global_batch_of_the_loaders():
    sharded = DataLoader(range(8), batch_sampler=BatchSampler(SequentialSampler(range(8)), 4, False))
    line = "; global batch 8 = 4 rows x 2 data-parallel ranks (DDP would have 16)"
    assert _batch(accelerator(_dataloaders=[sharded]), record(), [loader(4)]) == line
    assert _batch(accelerator(_dataloaders=[loader(4)]), record(), []) == line


def test_no_global_batch_where_it_is_not_known():
    """Of two loaders with other sizes (training, evaluation) none is taken, nor of one with a sampler of its own."""
    own = DataLoader(range(8), batch_sampler=BatchSampler(SequentialSampler(range(8)), 4, False))
    assert _batch(accelerator(), record(), []) == ""
    assert _batch(accelerator(), record(), [loader(4), loader(8)]) == ""
    assert _batch(accelerator(_dataloaders=[loader(8)]), record(), [loader(4)]) == ""
    assert _batch(accelerator(), record(), [own, loader(4)]) == ""


@pytest.mark.parametrize("changes", [False, True])
def test_no_global_batch_that_the_trainer_changes(changes):
    """`auto_find_batch_size` lowers the size until it fits."""
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=2, auto_find_batch_size=changes)
    trainer = Accelerator(args=args)
    hooks, own = TrainerHooks(), accelerator()
    hooks.attach(trainer)
    set_hooks(own, hooks)
    line = _batch(own, record(), [loader(4)])
    assert line == ("" if changes else line) and ("global batch 16 = 4 rows" in line) is not changes


# ---- plan -----------------------------------------------------------------------------------------------------------


class Own:
    """A strategy with code of its own and no plan."""


def test_plan_of_a_strategy():
    mesh = object()
    assert _plan(record(Own())) == "no tensor parallelism; strategy Own"
    assert _plan(record(DefaultParallelizationStrategy())) == "no tensor parallelism"
    assert _plan(record(Own(), tp_mesh=mesh)) == "tensor parallelism by strategy Own"
    plan, spec = SimpleNamespace(origin="hf"), SimpleNamespace(rows=[("*", "colwise", 2, 0, 0)], notes=[])
    assert _plan(record(Own(), tp_mesh=mesh, plan=plan, spec=spec)).endswith("): 2 colwise; strategy Own")


# ---- steps ----------------------------------------------------------------------------------------------------------


def steps(number: int) -> tuple[FirstSteps, torch.nn.Module]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    first = FirstSteps(accelerator(), record(model=model), optimizer)
    for _ in range(number):
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
    return first, model


def test_second_step_is_told(capsys):
    first, model = steps(3)
    first._at_the_end()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf_automodel_parallel: step 2: ") and " rows/s (" in line and "optimizer state 56 B" in line
    assert not model._forward_pre_hooks


ONE_STEP = """
import test_run_report
test_run_report.steps({number})
"""


@pytest.mark.parametrize("number", [0, 1, 2])
def test_only_step_is_told_at_the_end(number):
    """By Python's exit handlers, when model and optimizer have gone."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_STEP.format(number=number)],
        env={**os.environ, "PYTHONPATH": ":".join([__file__.rpartition("/")[0], *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("hf_automodel_parallel: step")]
    assert len(said) == min(number, 1)
    if number == 1:
        assert (
            "step 1, the only one: " in said[0] and " s since its first forward; optimizer state 56 B, peak" in said[0]
        )


# ---- nothing of it ends a run ---------------------------------------------------------------------------------------


def test_a_report_that_fails_is_a_line(capsys, monkeypatch):
    def broken(model: Any) -> Any:
        raise KeyError("weights")

    monkeypatch.setattr(run_report, "prepared", broken)
    report(accelerator(), (torch.nn.Linear(2, 2),))
    assert capsys.readouterr().err.endswith("no description of this run, because it failed: KeyError: 'weights'\n")
    monkeypatch.setattr(run_report, "state_bytes", broken)
    steps(3)
    assert "KeyError: 'weights'" in capsys.readouterr().err


class Pipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


@pytest.mark.parametrize("stream", ["closed", "pipe"])
def test_a_stream_that_nobody_reads(stream, monkeypatch):
    file = Pipe() if stream == "pipe" else io.StringIO()
    if stream == "closed":
        file.close()
    monkeypatch.setattr(sys, "stderr", file)
    tell(logging.getLogger("hf_automodel_parallel.of_this_test"), "line")


def test_hooks_without_a_trainer_know_no_batch():
    assert Hooks().training_batch() is None and TrainerHooks().training_batch() is None
