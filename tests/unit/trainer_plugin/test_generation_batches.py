"""Trainers that generate their batches see the data-parallel ranks as the processes, while they make a batch."""

from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather
from transformers import Trainer

from hf_automodel_parallel.accelerate_plugin.hooks import Hooks, set_hooks
from hf_automodel_parallel.trainer_plugin.generation_batches import CountsRanksOnce, generates_batches, number_ranks


class Generating(Trainer):
    """Its batch is what it sees. It is on the last of four ranks, tp2 x dp_shard 2; what is gathered is given."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        sizes = {"per_device_train_batch_size": 2, "steps_per_generation": 2, "generation_batch_size": 16}
        self.args = SimpleNamespace(**sizes)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return gather(inputs).tolist(), self.accelerator.process_index, self.accelerator.num_processes

    def get_tp_size(self) -> int:
        return 2

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return self.accelerator.num_processes // self.get_tp_size(), self._prepare_inputs(*args)


class Extended(CountsRanksOnce, Generating):
    pass


class Accelerator:
    state = SimpleNamespace(num_processes=4, process_index=3)
    parallelism_config = SimpleNamespace(data_parallel_size=2)
    is_main_process = True
    num_processes, process_index = 4, 3


def test_each_data_parallel_rank_counts_once(caplog):
    assert generates_batches(Generating) and not generates_batches(Trainer)
    accelerator = Accelerator()
    set_hooks(accelerator, Hooks())
    trainer = Extended(accelerator)
    number_ranks(accelerator, trainer)
    assert trainer.args.generation_batch_size == 8
    assert "generation_batch_size=16 counts all processes; the data-parallel ranks together have 8" in caplog.text
    number_ranks(accelerator, trainer)
    assert trainer.args.generation_batch_size == 8 and len(caplog.records) == 1, "again, for a second Trainer"

    rows, original = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]), gather
    want = ([0, 1, 2, 3], 1, 2)
    assert trainer._prepare_inputs(rows) == want
    assert trainer.compute_loss(rows) == (2, want), "a batch within a loss; tp is divided out in either way"
    assert gather is original and (accelerator.process_index, accelerator.num_processes) == (3, 4)
    assert trainer.get_tp_size() == 2
