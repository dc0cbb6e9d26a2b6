"""Learning rate schedulers advance as in stock data parallelism, once for each data-parallel rank."""

import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from harness.meshes import MESHES, each_mesh, run_on_mesh
from harness.pool import run_distributed
from harness.training import build
from torch import nn
from transformers import get_scheduler

from ranks.accelerate.jobs import CYCLE, make_accelerator, make_schedule

#: name -> (steps of accumulation, split_batches, one-cycle instead of linear)
RATES = {
    "plain": (1, False, False),
    "accumulation": (3, False, False),
    "split_batches": (1, True, False),
    "split_batches_accumulation": (2, True, False),
    "one_cycle": (1, False, True),
}
MICRO_STEPS = 8


def measured_rates(sizes: dict[str, int] | None, dp_size: int) -> dict[str, list[float]]:
    """The learning rate after each micro-batch, for every variant; `sizes` is None for Accelerate without this
    package.
    """
    rates = {}
    for name, (accumulation, split, one_cycle) in RATES.items():
        options = {
            "gradient_accumulation_steps": accumulation,
            "dataloader_config": DataLoaderConfiguration(split_batches=split),
        }
        accelerator = Accelerator(**options) if sizes is None else make_accelerator(sizes, **options)
        model: nn.Module = nn.Linear(2, 2) if sizes is None else build("llama", num_hidden_layers=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, make_schedule(optimizer, one_cycle))
        rates[name] = []
        for _ in range(MICRO_STEPS):
            with accelerator.accumulate(model):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            rates[name].append(schedule.get_last_lr()[0])
    return rates


def rates_by_hand(dp_size: int) -> dict[str, list[float]]:
    """`dp_size` processes of stock Accelerate: each optimizer step advances the schedule once per process.

    With `split_batches` once, because the batch is then the script's own; and never beyond the end of a cycle.
    """
    rates = {}
    for name, (accumulation, split, one_cycle) in RATES.items():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        schedule = make_schedule(optimizer, one_cycle)
        rates[name], advanced = [], 0
        for micro in range(1, MICRO_STEPS + 1):
            for _ in range((1 if split else dp_size) if micro % accumulation == 0 else 0):
                if not one_cycle or advanced < CYCLE:
                    schedule.step()
                    advanced += 1
            rates[name].append(schedule.get_last_lr()[0])
    return rates


@pytest.mark.core
@each_mesh
def test_scheduler_advances_once_per_data_parallel_rank(mesh):
    """Stock steps once per *process*; the ranks of a tp group share one batch, so it would run tp times too fast."""
    want = rates_by_hand(MESHES[mesh][2])
    for got in run_on_mesh(mesh, measured_rates):
        for name, rates in want.items():
            assert got[name] == pytest.approx(rates), name


def test_rates_by_hand_are_those_of_two_stock_processes():
    assert run_distributed(2, measured_rates, None, 2)[0] == {
        name: pytest.approx(rates) for name, rates in rates_by_hand(2).items()
    }


def warnings_of_a_schedule(length: int, warmup: int = 0) -> list[str]:
    """What two steps of a linear schedule of transformers say."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    accelerator = make_accelerator({"tp_size": 2})
    model = build("llama", num_hidden_layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=length)
    _, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    logger = logging.getLogger("hf_automodel_parallel.accelerate_plugin.data_loaders")
    logger.addHandler(handler)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    logger.removeHandler(handler)
    return said


def test_a_schedule_that_may_be_too_long_says_when_it_ends():
    """Scripts multiply its length by the number of processes; under tp that is more than the ranks that share data."""
    first, second = run_distributed(2, warnings_of_a_schedule, 12)
    assert len(first) == 1 and not second
    assert "ends after 12 optimizer steps" in first[0] and "meant to be 6 optimizer steps" in first[0]
    assert run_distributed(2, warnings_of_a_schedule, 13) == [[], []]
    # Scripts of transformers multiply the warm-up, but not a length that follows from the number of epochs.
    first, second = run_distributed(2, warnings_of_a_schedule, 13, 4)
    assert len(first) == 1 and not second
    assert "has warmed up after 4 optimizer steps" in first[0] and "meant to be 2 optimizer steps" in first[0]
