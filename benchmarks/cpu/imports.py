"""Seconds to import the package, beside accelerate alone, in fresh processes in turn."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from ..ranks import environment
from ..recorder import Recorder
from ..timing import quartiles

MODULES = ("accelerate", "hf_automodel_parallel")

_CODE = (
    "import time, importlib; wall, cpu = time.perf_counter(), time.process_time(); importlib.import_module({!r}); "
    "print(time.perf_counter() - wall, time.process_time() - cpu)"
)


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Alternating."""
    rounds = arguments.rounds or (1 if recorder.smoke else 7)
    found: dict[str, tuple[list[float], list[float]]] = {module: ([], []) for module in MODULES}
    for _ in range(rounds):
        for module, (wall, cpu) in found.items():
            command = [sys.executable, "-W", "ignore", "-c", _CODE.format(module)]
            seconds = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
            for times, value in zip((wall, cpu), seconds.split()[-2:]):
                times.append(float(value))
            time.sleep(0.05)
    rows = [
        {"module": module, "wall_s": quartiles(wall), "cpu_s": quartiles(cpu)} for module, (wall, cpu) in found.items()
    ]
    extra = [ours - theirs for ours, theirs in zip(found[MODULES[1]][1], found[MODULES[0]][1])]
    recorder.progress(f"imports: {quartiles(extra)[1]:.2f} s of CPU beyond accelerate's")
    recorder.record("imports", rows, {"rounds": rounds, "beyond_accelerate_cpu_s": quartiles(extra)})
