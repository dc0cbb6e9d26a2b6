"""The suite for whoever has a GPU, on the CPU with tiny models, and what it does about processes that do not behave."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.children import Outcome, environment_of_ranks, run_cases
from benchmarks.recorder import ROOT


def test_one_bad_case_costs_only_itself():
    """Errors, deaths and hangs are recorded with a message; the other cases run, in the processes that are left or in
    new ones; what is left when the time is over is skipped.
    """
    environment = environment_of_ranks("cpu", "")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests/end_to_end/scripts")])
    names = ["first", "raises", "dies", "second", "hangs", "last"]

    def outcomes_of(names: list[str], **options: Any) -> dict[str, Outcome]:
        told: dict[str, Outcome] = {}
        cases = [{"name": name} for name in names]
        common = {"environment": environment, "limit": 10.0, "settings": {}, "told": told.__setitem__}
        found = run_cases("behave:behave", cases, **(common | options))
        assert found == told
        return found

    outcomes = outcomes_of(names, world=2, deadline=time.monotonic() + 250)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        **dict.fromkeys(names, "passed"),
        **dict.fromkeys(("raises", "dies", "hangs"), "failed"),
    }
    assert outcomes["first"].values == {"rank": "0", "world": "2"}
    assert "ValueError: as it was told (behave.py:" in outcomes["raises"].message
    assert "exit status 7" in outcomes["dies"].message
    assert "no end after 10 s" in outcomes["hangs"].message and "in behave" in outcomes["hangs"].message
    alone = outcomes_of(["first"], world=None, deadline=time.monotonic() + 100)["first"]
    assert alone.values == {"rank": None, "world": None}
    over = outcomes_of(["first"], world=None, deadline=0.0)
    assert over == {"first": Outcome("skipped", message="the time budget is used up")}


@pytest.mark.timeout(900)
def test_the_suite_runs_on_the_cpu(tmp_path):
    """One case of each kind of validation, and both peers in a training."""
    command = [sys.executable, "-m", "benchmarks.run", "--suite", "gpu", "--device", "cpu", "--smoke"]
    done = subprocess.run(
        [*command, "--minutes", "14", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks, trainings = (
        json.loads(Path(tmp_path, f"gpu-{workload}-without-gpu.json").read_text())
        for workload in ("validation", "throughput")
    )
    assert {row["status"] for row in checks["rows"]} == {"passed"}
    assert len(checks["rows"]) == 10, done.stderr
    assert [missed["what"] for missed in checks["not_measured"]] == ["megatron-fsdp"]
    stock, ours = trainings["rows"]
    assert (stock["peer"], ours["peer"], ours["backend"]) == ("stock", "ours", "gloo")
    assert stock["losses"] == pytest.approx(ours["losses"], rel=1e-2)
    assert stock["flops_per_token"] == ours["flops_per_token"] > 0
    assert min(stock["tokens_per_s_per_gpu"], ours["tokens_per_s_per_gpu"]) > 0
