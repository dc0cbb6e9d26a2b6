"""``hf-automodel-parallel selftest``: green where all is right, red with a name where ranks compute something else."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from hf_automodel_parallel.cli import app, local_ranks, selftest
from hf_automodel_parallel.cli.selftest import cases

METHODS = [("cpu", False, "fork"), ("cpu", True, "spawn"), ("cuda", False, "spawn")]

#: The parallel ranks compute with other data than the reference.
OTHER_DATA = """
import os
from hf_automodel_parallel.cli import app, selftest_ranks

batch = selftest_ranks.batch
selftest_ranks.batch = lambda step, rows: batch(step + (os.environ["WORLD_SIZE"] != "1"), rows)
"""
RUN = "import sys; from hf_automodel_parallel.cli import app; app(sys.argv[1:])"


def start(code: str, *arguments: str) -> tuple[int, str, str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "selftest", "--nproc", "2", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
    )
    return done.returncode, done.stdout, done.stderr


def test_right():
    code, output, errors = start(RUN, "--only", "tp,bf16,resume,bandwidth", "--json")
    assert code == 0, output + errors
    result = json.loads(output)
    assert result["ok"] and result["device"] == "cpu" and result["nproc"] == 2
    *compared, bandwidth = result["cases"]
    assert [(row["case"], row["mesh"]) for row in compared] == [
        ("tp", "tp 2"),
        ("bf16", "tp 2"),
        ("resume", "tp 2 -> dp_shard 2"),
    ]
    exact, bf16, resumed = (row["worst"] for row in compared)
    assert exact < 1e-5 and 1e-5 < bf16 < 0.1 and resumed < 1e-4
    assert bandwidth["ok"] and [(row["axis"], row["ranks"]) for row in bandwidth["axes"]] == [("tp", 2)] * 3
    for row in bandwidth["axes"]:  # of two ranks each sends all bytes once
        assert 0 < row["seconds"] < 10 and row["gb_per_second"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)


def test_wrong():
    code, output, errors = start(OTHER_DATA + RUN, "--only", "tp")
    assert code == 1, output + errors
    first, name, summary = output.splitlines()
    assert first.startswith("✗ tp ") and name.strip().endswith(".weight"), output
    assert summary == "0 of 1 cases are what one process computes, on 2 x cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "3"], "--nproc 3: give an even number of processes."),
        (["--device", "tpu"], "--device tpu: give cpu or cuda."),
        (
            ["--only", "fsdp"],
            "--only fsdp: the cases are tp, fsdp2, tp_fsdp2, hsdp, lora, sequence, bf16, resume, bandwidth.",
        ),
    ],
)
def test_wrong_options(arguments, message):
    result = CliRunner().invoke(app, ["selftest", *arguments])
    assert result.exit_code == 2 and result.output == f"hf-automodel-parallel: {message}\n"


@pytest.mark.parametrize(("device", "initialised", "method"), METHODS)
def test_start_of_processes(device, initialised, method, monkeypatch):
    """CUDA cannot be used in a fork of a process that has initialised it."""

    class Chosen(Exception):
        pass

    def get_context(name):
        raise Chosen(name)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(local_ranks.multiprocessing, "get_context", get_context)
    with pytest.raises(Chosen, match=f"^{method}$"):
        selftest._run(cases(2)[0], device)


def write_state(folder, rank):
    """What a rank sees."""
    world = (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"])
    (folder / f"{rank}.json").write_text(json.dumps([world, "set_by_parent" in globals()]))


def test_fresh_interpreters(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "set_by_parent", True)
    assert local_ranks.run(2, tmp_path, partial(write_state, tmp_path), "cuda") is None
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[str(rank), "2", "127.0.0.1"], False]


def test_meshes():
    """Every case fits the number of processes, and the smallest ones are left out where they need more."""
    for nproc in (2, 4, 6, 8):
        assert all(case["ranks"] <= nproc for case in cases(nproc))
        assert cases(nproc)[-1]["ranks"] == nproc
    assert [case["name"] for case in cases(2)] == ["tp", "fsdp2", "lora", "sequence", "bf16", "resume", "bandwidth"]
