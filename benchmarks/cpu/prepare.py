"""Seconds of ``prepare``: against depth on 1,024 simulated ranks of the 405B geometry, and against size on real ranks
beside Accelerate's FSDP2.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from ..peers import Case, build_peer
from ..ranks import RanksFailed, in_process, on_ranks
from ..recorder import Recorder
from ..timing import over_ranks, quartiles

GEOMETRY = "llama-3.1-405b"  # of the planner
WORLD, TP = 1024, 8
DEPTHS = (2, 8, 32, 64, 126)
OPTIONS: dict[str, dict[str, Any]] = {
    "TP x FSDP2": {},
    "TP + SP x FSDP2, checkpointing": {"sequence_parallel": True, "activation_checkpointing": "full"},
}

#: Widths of a model with 4 layers on two real ranks: 5 M to 300 M parameters.
WIDTHS = (256, 1024, 2560)
WAYS = ("accelerate_fsdp", "ours")


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Both parts."""
    rounds = arguments.rounds or (1 if recorder.smoke else 3)
    rows, left_out = [], []
    for name, options in list(OPTIONS.items())[: 1 if recorder.smoke else None]:
        depths = DEPTHS[:1] if recorder.smoke else DEPTHS
        given = {"geometry": GEOMETRY, "world": WORLD, "tp": TP, "depths": depths, "rounds": rounds, **options}
        try:
            found = in_process("benchmarks.cpu.prepare:prepare_seconds", **given)
        except RanksFailed as error:
            left_out.append({"what": f"prepare, {name}", "why": str(error)})
            continue
        for layers, seconds in zip(depths, found):
            rows.append({"options": name, "layers": layers, "cpu_s": quartiles(seconds)})
            recorder.progress(f"prepare: {name}, {layers} layers: {quartiles(seconds)[1]:.2f} s of CPU")
    settings = {"geometry": GEOMETRY, "world": WORLD, "tp": TP, "rounds": rounds}
    recorder.record("prepare", rows, settings, left_out, case="depth")
    rows, left_out = [], []
    for hidden in WIDTHS[:1] if recorder.smoke else WIDTHS:
        case = Case(tp=1, dp=2, hidden=hidden)
        try:
            ranks = on_ranks(2, "benchmarks.cpu.prepare:measure", {"case": asdict(case), "rounds": rounds})
        except RanksFailed as error:
            left_out.append({"what": f"prepare of width {hidden}", "why": str(error)})
            continue
        times = over_ranks([rank["times"] for rank in ranks])
        row: dict[str, Any] = {"parameters": ranks[0]["parameters"], "hidden": hidden}
        for way, (wall, cpu) in times.items():
            row[way] = {"wall_s": quartiles(wall), "cpu_s": quartiles(cpu)}
        row["ours_over_it_cpu"] = quartiles([a / b for a, b in zip(times["ours"][1], times[WAYS[0]][1])])
        rows.append(row)
        recorder.progress(f"prepare: {row['parameters']:,} parameters: ours / Accelerate {row['ours_over_it_cpu'][1]}")
    recorder.record("prepare", rows, {"mesh": "FSDP2", "rounds": rounds}, left_out, case="size")


def prepare_seconds(
    geometry: str, world: int, tp: int, depths: list[int], rounds: int, **options: Any
) -> list[list[float]]:
    """CPU seconds of sharding over (world / tp, tp) simulated ranks at every depth, ``rounds`` times after one that
    warms up; in a process of its own.

    Args:
        geometry: its name in the planner.
        options: fields of ``AutoParallelismConfig`` beside the sizes.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from hf_automodel_parallel import compat
    from hf_automodel_parallel.core.options import ParallelOptions
    from hf_automodel_parallel.planner.models import model_config, on_meta
    from hf_automodel_parallel.strategies.context import ParallelizeContext
    from hf_automodel_parallel.strategies.default import DefaultParallelizationStrategy

    found: list[list[float]] = [[] for _ in depths]
    for round_ in range(rounds + 1):
        for layers, seconds in zip(depths[: None if round_ else 1], found):
            config = model_config(geometry)
            config.num_hidden_layers = layers
            model = on_meta(config, "bf16")
            compat.start_simulated_ranks(world)
            mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp_shard_cp", "tp"))
            begin = time.process_time()
            given = ParallelOptions(**options)
            context = ParallelizeContext(model, mesh, torch.device("cpu"), given, sums_after_backward=True)
            context.fsdp.mp_policy = MixedPrecisionPolicy()
            strategy = DefaultParallelizationStrategy()
            strategy.plan(context)
            strategy.carry_out(context)
            taken = time.process_time() - begin
            dist.destroy_process_group()
            if round_:
                seconds.append(taken)
    return found


def measure(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One rank: every way in turn; building the model is not in the time."""
    from ..peers.case import build

    what = Case(**case)
    times: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
    parameters = sum(parameter.numel() for parameter in build(what).parameters())
    for way in WAYS:  # what is set up once
        build_peer(way, Case(tp=1, dp=2))
    for _ in range(rounds):
        for way in WAYS:
            for kept, seconds in zip(times[way], build_peer(way, what).prepare_seconds):
                kept.append(seconds)
    return {"times": times, "parameters": parameters}
