"""Seconds of a whole step of the stock Trainer: data, forward, backward, clipping, AdamW, logging; ours and
transformers' own parallelism in turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from typing import Any

from ..peers import PEERS, Case
from ..ranks import RanksFailed, on_ranks
from ..recorder import Recorder
from ..timing import compared, over_ranks

WAYS = ("native", "ours")

#: Steps of one training, and how many of the first ones are not in the time.
STEPS, LEFT_OUT = 8, 2


def cases(smoke: bool) -> list[Case]:
    if smoke:
        return [Case(hidden=64, tokens=16, layers=2, whole=True)]
    meshes = ({"tp": 2}, {"tp": 2, "dp": 2})
    return [Case(**mesh, whole=True, lora=lora) for mesh in meshes for lora in (False, True)]


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Every case in processes of its own."""
    rounds = arguments.rounds or (1 if recorder.smoke else 5)
    rows, left_out = [], []
    for case in cases(recorder.smoke):
        label = f"{case.mesh_name}, {'LoRA' if case.lora else 'full'}"
        try:
            ranks = on_ranks(case.world, "benchmarks.cpu.train_step:measure", {"case": asdict(case), "rounds": rounds})
        except RanksFailed as error:
            left_out.append({"what": f"Trainer, {label}", "why": str(error)})
            recorder.progress(error.output)
            continue
        left_out += [{"what": f"{PEERS[way]}: Trainer, {label}", "why": why} for way, why in ranks[0]["wrong"].items()]
        peers = compared(over_ranks([rank["times"] for rank in ranks]))
        rows.append({**case.as_row(), "losses": ranks[0]["losses"], "peers": peers})
        for way, figures in peers.items():
            recorder.progress(f"train_step: {label}, {way}: {1e3 * figures['wall_s'][1]:.1f} ms a step")
    recorder.record("train_step", rows, {"rounds": rounds, "steps": STEPS - LEFT_OUT, "dtype": "float32"}, left_out)


def measure(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One rank: trainings in turn; the time of a round is that of one of its steps, on average."""
    what = Case(**case)
    times: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
    losses, wrong = {}, {}
    for round_ in range(rounds + 1):
        for way in [way for way in WAYS if way not in wrong]:
            try:
                seconds, losses[way] = _train(way, what)
            except Exception as error:  # of another library's code
                wrong[way] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                continue
            if round_:  # the first is a warm-up
                for kept, value in zip(times[way], seconds):
                    kept.append(value)
    if len(losses) == len(WAYS) and abs(losses["native"] - losses["ours"]) > 1e-3 * losses["ours"]:
        wrong["native"] = f"another loss: {losses['native']:.5f}, not {losses['ours']:.5f}"
    return {"times": {way: kept for way, kept in times.items() if way not in wrong}, "losses": losses, "wrong": wrong}


def _train(way: str, case: Case) -> tuple[tuple[float, float], float]:
    """Seconds of a step, wall clock and CPU; the loss of the last one."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ..peers import native, ours
    from ..peers.accelerate_state import new_state
    from ..peers.case import LAYERS_ONLY, build

    class Clock(TrainerCallback):
        """Of the steps after the first few."""

        def __init__(self) -> None:
            self.begin = self.seconds = (0.0, 0.0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter(), time.process_time()
            if state.global_step == LEFT_OUT:
                self.begin = now
            wall, cpu = ((a - b) / (STEPS - LEFT_OUT) for a, b in zip(now, self.begin))
            self.seconds = wall, cpu

    new_state()
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(LAYERS_ONLY, (2 * STEPS * case.dp, case.tokens // 2), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        fields: dict[str, Any] = {} if way == "native" else {"parallelism_config": ours.config(case)}
        arguments = TrainingArguments(
            directory,
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
            **fields,
        )
        model = native.tuned(case) if way == "native" else build(case)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[clock])  # type: ignore[arg-type]
        trainer.train()
    return clock.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
