"""``hf-automodel-parallel verify``: ten architectures are right; what is wrong ends with its name and exit status 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.models import MODELS
from sweep import stacks
from transformers import AutoConfig
from typer.testing import CliRunner

from hf_automodel_parallel.cli import app
from hf_automodel_parallel.cli.comparison import compare_saved
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


def test_other_stacks(tmp_path):
    """What PEFT's LoRA on a model that transformers has sharded ends with, here and in a script without the package."""
    kind, values = MODELS["llama"]
    AutoConfig.for_model(kind, **values).save_pretrained(model := tmp_path / "llama")
    lora, script = ["--tp", "2", "--lora", "r=4"], tmp_path / "reproduction"
    fsdp, native, failing, ours = verify(
        [str(model), "--dp-shard", "2", "--lora", "r=4", "--stack", "accelerate"],
        [str(model), "--tp", "2", "--stack", "transformers"],
        [str(model), *lora, "--stack", "transformers", "--script", str(script), "--json"],
        [str(model), *lora],
    )
    for right, stack in ((fsdp, "By accelerate "), (native, "By transformers "), (ours, "Plan: hf")):
        assert right[0] == 0 and stack in right[1], right[1]
        assert right[1].endswith("✓ loss and gradients are those of one process\n")
    assert failing[0] == 1
    error = json.loads(failing[1])["error"]
    assert error.startswith("RuntimeError: shape '[")

    assert "hf_automodel_parallel" not in (script / "run.py").read_text()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    again = subprocess.run(command, cwd=script, env=variables, capture_output=True, text=True, timeout=120)
    assert again.returncode and error in again.stderr


def test_gradients_of_another_shape_are_wrong():
    right = {"float32": {"loss": 1.0, "gradients": {"a": torch.ones(2), "b": torch.ones(2)}}}
    found = [{"loss": 1.0, "gradients": {"a": torch.ones(2), "b": torch.ones(1)}}, right["float32"]]
    compared = compare_saved(found, right)
    assert compared.where == "b" and compared.worst == float("inf") and not compared.ok
    assert compare_saved([right["float32"]] * 2, right).ok
    lacking = [right["float32"], {"loss": 1.0, "gradients": {"a": torch.ones(2)}}]
    assert compare_saved(lacking, right).one_side == ["b"]


def test_page_of_other_stacks():
    """docs/stacks.md is made of its data, and here every cell is right."""
    data = json.loads(stacks.DATA.read_text())
    assert stacks.PAGE.read_text() == stacks.page(data)
    assert all(why is None for cell, why in data["outcomes"].items() if cell.endswith("/this package"))
    assert all(any(cell.endswith(f"/{name}") for cell in data["outcomes"]) for name in stacks.STACKS)
    for mesh, row in (("tp 2", "tp 2 |"), ("FSDP2 2", "| the same, FSDP2 2 |")):
        right = {
            stack: sum(data["outcomes"].get(f"LoRA/{kind}/{mesh}/{stack}", "") is None for kind in stacks.TYPES)
            for stack in stacks.STACKS
        }
        if mesh == "tp 2":
            right["Accelerate"] = "no tp of its own"
        cells = [
            v if isinstance(v := right[name], str) else f"{v} of 8"
            for name in ("this package", "Accelerate", "transformers")
        ]
        assert f"{row} {' | '.join(cells)} |" in (stacks.ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stack", "deepspeed"], "--stack deepspeed: give one of transformers, accelerate."),
        (["--stack", "accelerate"], "--stack accelerate has no tp here: give --dp-shard alone."),
        (
            ["--stack", "transformers", "--cp", "2"],
            "--stack transformers has no cp here: give --tp and --dp-shard alone.",
        ),
        (
            ["--stack", "transformers", "--sequence-parallel"],
            "--stack transformers has no sequence_parallel: leave it out.",
        ),
        (["--script", "x"], "--script x: give --stack, and a directory that does not exist yet."),
        (["--stack", "transformers", "--script", "/"], "--script /: give --stack, and a directory that does not"),
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
