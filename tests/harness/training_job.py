"""The script of the tests of faults: the stock Trainer on a tiny model, which dies, waits or resumes where it is told
to.

The working directory takes what it reports: `result<RANK>.json` at the end, `reached<RANK>` where it waits.
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from harness.training import _Rows, batches_for, build
from hf_automodel_parallel import AutoParallelismConfig

RANK = int(os.environ.get("RANK", "0"))
ROWS = 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=json.loads, required=True, help="of the mesh, as JSON")
    parser.add_argument("--output", required=True)
    parser.add_argument("--data_ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save_steps", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=60, help="of the process group, in seconds")
    parser.add_argument("--adapter", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--wait_at", type=int, help="before this step (from 0), until there is a file 'go'")
    parser.add_argument("--die", help="RANK:WHERE:STEP, with WHERE one of step, save, load")
    parser.add_argument("--options", type=json.loads, default={}, help="more arguments of the Trainer, as JSON")
    return parser.parse_args()


def die_if(options: argparse.Namespace, where: str, step: int) -> None:
    if options.die == f"{RANK}:{where}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)


class Watch(TrainerCallback):
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.options.wait_at:
            Path(f"reached{RANK}").touch()
            deadline = time.monotonic() + 60
            while not Path("go").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        die_if(self.options, "step", state.global_step)


class FaultyTrainer(Trainer):
    """The order of the data is fixed; else stock, and dead where it was told to die."""

    options: argparse.Namespace

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _save_rng_state(self, output_dir: str) -> None:
        die_if(self.options, "save", self.state.global_step)
        super()._save_rng_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            die_if(self.options, "load", int(checkpoint.rpartition("-")[2]))
        super()._load_optimizer_and_scheduler(checkpoint)


def steps_of(model: Any, steps: int) -> list[dict]:
    """One batch a step, for one process."""
    return [batch for step in range(steps) for batch in batches_for(model, 1, rows=ROWS, seed=70 + step)]


def main() -> None:
    options = parse()
    arguments = TrainingArguments(
        options.output,
        use_cpu=True,
        max_steps=options.steps,
        per_device_train_batch_size=ROWS // options.data_ranks,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=options.save_steps,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        ddp_timeout=options.timeout,
        parallelism_config=AutoParallelismConfig(**options.sizes),
        **options.options,
    )
    model = build("llama", {} if options.adapter else None)
    watch = Watch(options)
    FaultyTrainer.options = options
    trainer = FaultyTrainer(model, arguments, train_dataset=_Rows(steps_of(model, options.steps)), callbacks=[watch])
    trainer.train(resume_from_checkpoint=options.resume or None)
    # The steps before the checkpoint come with it.
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    report = {"started": watch.started, "step": trainer.state.global_step, "losses": losses}
    Path(f"result{RANK}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
