"""Seconds of ``save_state`` and ``load_state`` beside Accelerate's for the same training state on FSDP2, and for how
long training stands still when ours is written in the background.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..peers import Case
from ..ranks import RanksFailed, on_ranks
from ..recorder import Recorder
from ..timing import Stopwatch, over_ranks, quartiles

WAYS = ("accelerate_fsdp", "ours", "ours, async_save")
SHARDED = "SHARDED_STATE_DICT"  # Accelerate's default for FSDP2; each rank writes its shards
LABELS = {"accelerate_fsdp": "stock Accelerate FSDP2"}


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """AdamW's state of 31 M parameters (360 MB with the weights, in float32) on two ranks."""
    rounds = arguments.rounds or (1 if recorder.smoke else 5)
    case = Case(tp=1, dp=2, hidden=64 if recorder.smoke else 1024, tokens=16)
    rows, left_out = [], []
    with tempfile.TemporaryDirectory() as directory:
        given = {"case": asdict(case), "rounds": rounds, "directory": directory}
        try:
            ranks = on_ranks(2, "benchmarks.cpu.checkpoint:measure", given)
        except RanksFailed as error:
            left_out.append({"what": "checkpoints", "why": str(error)})
            recorder.progress(error.output)
        else:
            for what in ("save", "load"):
                times = over_ranks([rank[what] for rank in ranks])
                theirs = times[WAYS[0]][0]
                for way, (wall, cpu) in times.items():
                    row: dict[str, Any] = {"what": what, "way": LABELS.get(way, way)}
                    row |= {"wall_s": quartiles(wall), "cpu_s": quartiles(cpu)}
                    if way != WAYS[0]:
                        row["over_accelerate_wall"] = quartiles([a / b for a, b in zip(wall, theirs)])
                    rows.append(row)
                    recorder.progress(f"checkpoint: {what}, {way}: {quartiles(wall)[1]:.2f} s")
    settings = {"hidden": case.hidden, "rounds": rounds, "mesh": "FSDP2", "state_dict_type": SHARDED}
    recorder.record("checkpoint", rows, settings, left_out)


def measure(case: dict[str, Any], rounds: int, directory: str) -> dict[str, Any]:
    """One rank: every way saves and loads in turn."""
    import torch
    import torch.distributed as dist

    from ..peers import accelerate_fsdp, ours
    from ..peers.case import batch, build

    what = Case(**case)
    makers = {
        WAYS[0]: accelerate_fsdp.accelerator_for,
        WAYS[1]: lambda: ours.accelerator_for(what, SHARDED),
        WAYS[2]: lambda: ours.accelerator_for(what, SHARDED, async_save=True),
    }
    ways = {}
    for name, make in makers.items():
        accelerator, activate = make()
        model = build(what)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        accelerator.backward(model(**batch(what), use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()
        ways[name] = accelerator, activate
    found: dict[str, Any] = {part: {name: ([], []) for name in ways} for part in ("save", "load")}
    for round_ in range(rounds + 1):
        for name, (accelerator, activate) in ways.items():
            activate()
            target = Path(directory, f"{round_}-{name.replace(', ', '-')}")
            for part, call in (("save", accelerator.save_state), ("load", accelerator.load_state)):
                dist.barrier()
                watch = Stopwatch()
                call(str(target))
                seconds = watch.read()
                if "async" in name and part == "save":
                    _wait_for(target / "checkpoint_manifest.json")
                if round_:  # the first is a warm-up
                    for kept, value in zip(found[part][name], seconds):
                        kept.append(value)
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(target)
    return found


def _wait_for(path: Path, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} is not there after {seconds:.0f} s")
        time.sleep(0.05)
