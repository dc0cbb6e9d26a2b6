"""Ranks that die, and signals: the job ends in time, and a restart goes on exactly from the last complete
checkpoint.
"""

import argparse
import functools
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.compare import assert_losses_equal
from harness.jobs import Job, start_ranks
from harness.pool import expect_error, run_distributed
from harness.training import _Rows, build, trainable
from harness.training_job import ROWS, FaultyTrainer, Watch, steps_of
from transformers import TrainerCallback, TrainingArguments

from hf_automodel_parallel import AutoParallelismConfig

STEPS = 6
ENDS_WITHIN = 90.0
"""Seconds within which a job that has lost a rank must have ended."""

START = 200.0
"""Seconds for a job to start and to do its few steps, on a machine that does other things too."""

TP2 = ("--sizes", '{"tp_size": 2}')
FSDP2 = ("--sizes", '{"dp_shard_size": 2}', "--data_ranks", 2)


@functools.cache
def one_process(adapter: bool = False, steps: int = STEPS) -> list[float]:
    """Losses of the uninterrupted run, with the plainest loop there is."""
    model = build("llama", {} if adapter else None)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, eps=1e-3, weight_decay=0.0)
    losses = []
    for batch in steps_of(model, steps):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_went_on(results: list[dict], start: int, stop: int = STEPS, adapter: bool = False) -> None:
    """Every rank started after step `start` and had from there the losses of the uninterrupted run."""
    for result in results:
        assert result["started"] == start and result["step"] == stop
        losses = [result["losses"][str(step)] for step in range(start + 1, stop + 1)]
        assert_losses_equal(losses, one_process(adapter)[start:stop], rtol=1e-5)


def assert_died(job: Job, rank: int) -> None:
    """`rank` was killed and the others ended with an error of their own, in time."""
    job.processes[rank].wait(START)
    codes = job.wait(ENDS_WITHIN)
    assert codes[rank] == -signal.SIGKILL, job.output()
    others = [code for index, code in enumerate(codes) if index != rank]
    assert all(code != 0 for code in others), f"{codes}\n{job.output()}"


@pytest.mark.timeout(900)  # four starts, on a machine that may do other things too
def test_a_killed_rank_ends_the_job_and_the_restart_goes_on(tmp_path):
    """Killed between two steps, then while loading, then while saving; each time the next start finds what was
    complete.
    """
    run = functools.partial(start_ranks, 2)
    common = (*TP2, "--output", tmp_path / "out", "--timeout", 60)
    with run(tmp_path / "step", *common, "--die", "1:step:3") as job:
        assert_died(job, 1)
    with run(tmp_path / "load", *common, "--resume", "--die", "0:load:2") as job:
        assert_died(job, 0)
    with run(tmp_path / "save", *common, "--resume", "--die", "1:save:4") as job:
        assert_died(job, 1)
    with run(tmp_path / "end", *common, "--resume") as job:
        assert_went_on(job.results(START), start=2)


@pytest.mark.timeout(600)
def test_sigterm_leaves_one_checkpoint_of_all_ranks(tmp_path):
    """The Trainer's `enable_jit_checkpoint`: one rank gets the signal steps before the other, both save after one
    step.
    """
    common = (*FSDP2, "--adapter", "--output", tmp_path / "out", "--save_steps", 1000)
    options = ("--options", '{"enable_jit_checkpoint": true}')
    directory = tmp_path / "signal"
    with start_ranks(2, directory, *common, *options, "--wait_at", 2) as job:
        job.wait_for("reached0", "reached1", seconds=START)
        job.processes[1].send_signal(signal.SIGTERM)
        # The Trainer waits 3 s before it takes a signal seriously.
        time.sleep(4)
        (directory / "go").touch()
        results = job.results(ENDS_WITHIN)
    assert_went_on(results, start=0, stop=3, adapter=True)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not list((tmp_path / "out").rglob("*incomplete*"))
    with start_ranks(2, tmp_path / "again", *common, "--resume") as job:
        assert_went_on(job.results(START), start=3, adapter=True)


# ---- disks ---------------------------------------------------------------------------------------------------------


class Spoil(TrainerCallback):
    """In front of the second checkpoint something happens to the disk."""

    def __init__(self, kind: str, ranks: tuple[int, ...]) -> None:
        self.kind, self.ranks = kind, ranks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 4:
            return
        if self.kind == "no_space" and dist.get_rank() in self.ranks:
            # A file may grow to this many bytes and no further, as on a disk that is full then. The file that takes the
            # output of this process may have more already.
            with open(os.devnull, "w") as nowhere:
                for stream in (1, 2):
                    os.dup2(nowhere.fileno(), stream)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        elif self.kind == "read_only" and dist.get_rank() == 0:
            # Root may write into any directory; but nobody can make one where a file is.
            Path(args.output_dir, "checkpoint-4").write_text("in the way")


def train_on(directory: str, kind: str | None, sharded: bool, ranks: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Six steps with a checkpoint each second one; with ``kind`` None resumed, and with a disk that works."""
    plugin = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT" if sharded else "FULL_STATE_DICT"}
    arguments = TrainingArguments(
        directory,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        fsdp="full_shard",
        fsdp_config=plugin,
        parallelism_config=AutoParallelismConfig(tp_size=2),
    )
    model = build("llama")
    FaultyTrainer.options = argparse.Namespace(die=None)
    callbacks = [] if kind is None else [Spoil(kind, ranks)]
    trainer = FaultyTrainer(model, arguments, train_dataset=_Rows(steps_of(model, STEPS)), callbacks=callbacks)
    watch = Watch(argparse.Namespace(die=None, wait_at=None))
    trainer.add_callback(watch)
    streams = [(stream, os.dup(stream)) for stream in (1, 2)]
    try:
        trainer.train(resume_from_checkpoint=kind is None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for stream, was in streams:
            os.dup2(was, stream)
            os.close(was)
    losses = {str(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {"started": watch.started, "step": trainer.state.global_step, "losses": losses}


@pytest.mark.parametrize(
    "kind, sharded, ranks",
    [("no_space", False, (0,)), ("no_space", True, (1,)), ("read_only", False, (0,))],
    ids=["no_space", "no_space_on_one_rank", "read_only"],
)
def test_disk_that_fails_during_a_save(kind, sharded, ranks, tmp_path):
    """All ranks say which checkpoint could not be written; the one before is intact, and the next start takes it."""
    expect_error(2, train_on, str(tmp_path), kind, sharded, ranks, match=r"checkpoint-4", within=ENDS_WITHIN)
    if kind == "read_only":
        (tmp_path / "checkpoint-4").unlink()
    assert_went_on(run_distributed(2, train_on, str(tmp_path), None, sharded), start=2)
