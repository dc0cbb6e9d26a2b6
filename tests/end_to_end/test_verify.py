"""``hf-automodel-parallel verify``: ten architectures are right; what is wrong ends with its name and exit status 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.models import MODELS
from transformers import AutoConfig
from typer.testing import CliRunner

from hf_automodel_parallel.cli import app
from hf_automodel_parallel.cli.verify import smaller

PACKAGES = Path(__file__).resolve().parents[1] / "packages"
#: Runs verify with one list of arguments after the other; prints exit status and standard output of each.
EACH = """
import json, sys
from typer.testing import CliRunner
from hf_automodel_parallel.cli import app

for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, ["verify", *arguments])
    print(json.dumps([result.exit_code, result.stdout]), flush=True)
"""
TP, TP_FSDP, SEQUENCE = ["--tp", "2"], ["--tp", "2", "--dp-shard", "2"], ["--tp", "2", "--sequence-parallel"]
ARCHITECTURES = {
    "llama": [*TP_FSDP, "--lora", "r=4"],
    "mistral": ["--dp-shard", "2"],
    "qwen3": SEQUENCE,
    "gemma3": TP,
    "phi3": TP,
    "olmo2": TP,
    "cohere": SEQUENCE,
    "gpt2": TP,
    "mixtral": TP,
    "qwen3_moe": TP,
}


def verify(*jobs: list[str]) -> list[tuple[int, str]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EACH, json.dumps(jobs)],
        cwd=PACKAGES,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)
def test_ten_architectures(tmp_path):
    for name in ARCHITECTURES:
        kind, values = MODELS[name]
        AutoConfig.for_model(kind, **values).save_pretrained(tmp_path / name)
    results = verify(*([str(tmp_path / name), *mesh, "--json"] for name, mesh in ARCHITECTURES.items()))
    for name, (code, output) in zip(ARCHITECTURES, results, strict=True):
        found = json.loads(output)
        assert code == 0 and found["ok"], (name, output)
        assert found["loss_error"] < 1e-5 and max(found["errors"].values()) < 1e-4
        assert len(found["errors"]) >= 10 and not found["one_side"], name
        assert ("lora_A" in found["where"] or "lora_B" in found["where"]) == (name == "llama")


def test_own_architecture_plan_and_strategy(tmp_path):
    """A right one, a plan that ``prepare`` refuses, and a strategy whose gradients are wrong."""
    for name in ("own", "other"):
        values = json.loads((PACKAGES / "custom_code" / "config.json").read_text())
        del values["auto_map"]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values | {"model_type": f"verified_{name}"}))
    own, other = ([str(tmp_path / name), "--tp", "2", "--import", "verified"] for name in ("own", "other"))
    right, refused, wrong = verify(
        [*own, "--tp-plan", "verified:plan"],
        [*own, "--tp-plan", "verified:wrong_plan"],
        [*other, "--worst", "1"],
    )
    assert right[0] == 0 and "Plan: explicit by OwnStrategy. 28 gradients compared." in right[1], right[1]
    assert right[1].endswith("✓ loss and gradients are those of one process\n")
    assert refused[0] == 1 and "the gradient of layers.0.mlp_norm.weight" in " ".join(refused[1].split()), refused[1]
    lines = " ".join(wrong[1].split())
    assert wrong[0] == 1, lines
    assert "✗ layers.1.attention_norm.weight: its gradient is off by 1e+00 of its norm, the worst of 1 of 28" in lines
    assert all(len(line) <= 80 for _, output in (right, refused, wrong) for line in output.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq", "65"], "--seq 65: the small model has 64 positions; give 64 or less."),
        (["--import", "no_such_package"], "--import no_such_package: No module named 'no_such_package'."),
        (["--tp", "2", "--world", "3"], ""),
        (["--set", "no_such_field=1"], ""),
    ],
)
def test_wrong_options(arguments, message):
    result = CliRunner().invoke(app, ["verify", "llama-3.1-405b", *arguments])
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert result.output.startswith(f"hf-automodel-parallel: {message}")


def test_large_meshes_are_made_smaller():
    one = {"dp_replicate_size": 1, "dp_shard_size": 1, "cp_size": 1, "sp_size": 1, "tp_size": 1}
    assert smaller(one | {"dp_shard_size": 2, "tp_size": 4}) == one | {"dp_shard_size": 2, "tp_size": 4}
    assert smaller(one | {"dp_shard_size": 128, "tp_size": 8}) == one | {"dp_shard_size": 2, "tp_size": 2}
    assert smaller(one | {"tp_size": 3}) == one | {"tp_size": 2}
