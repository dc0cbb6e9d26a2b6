"""Peers timed in turn, A B C A B C, and what is said about the times."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

#: name -> (seconds of wall clock, of CPU) of each round
Times = dict[str, tuple[list[float], list[float]]]


class Stopwatch:
    """Seconds of wall clock and of this process's CPU since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def in_turn(steps: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3, repeat: int = 1) -> Times:
    """Time every step once in each round; collective.

    Args:
        steps: name -> what is timed. An attribute ``prepare`` of it is called before, outside of the time.
        repeat: calls of a step in a round; the time is that of one call.

    Returns:
        This rank's times. CPU time is that of the process with all of its threads.
    """
    for step in steps.values():
        for _ in range(warmup):
            _ready(step)
            step()
    times: Times = {name: ([], []) for name in steps}
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for name, step in steps.items():
            _ready(step)
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(repeat):
                step()
            times[name][0].append((time.perf_counter() - wall) / repeat)
            times[name][1].append((time.process_time() - cpu) / repeat)
    gc.unfreeze()
    return times


def _ready(step: Any) -> None:
    if hasattr(step, "prepare"):
        step.prepare()


def over_ranks(times: list[Times]) -> Times:
    """The longest wall clock and the sum of the CPU times of all ranks, per round."""
    return {
        name: (
            [max(round_) for round_ in zip(*(rank[name][0] for rank in times))],
            [sum(round_) for round_ in zip(*(rank[name][1] for rank in times))],
        )
        for name in times[0]
    }


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return [values[0]] * 3
    return [round(value, 6) for value in statistics.quantiles(values, n=4, method="inclusive")]


def compared(times: Times, ours: str = "ours") -> dict[str, Any]:
    """Per peer: quartiles of the seconds, and of the per-round ratios ours / peer, of wall clock and CPU."""
    return {
        name: {
            "wall_s": quartiles(wall),
            "cpu_s": quartiles(cpu),
            **(
                {
                    "ours_over_it_wall": quartiles([a / b for a, b in zip(times[ours][0], wall)]),
                    "ours_over_it_cpu": quartiles([a / b for a, b in zip(times[ours][1], cpu)]),
                }
                if ours in times and name != ours
                else {}
            ),
        }
        for name, (wall, cpu) in times.items()
    }
