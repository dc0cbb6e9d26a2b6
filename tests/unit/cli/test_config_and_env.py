"""Launch configs for other numbers of GPUs and nodes, and what a bug report needs."""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import yaml
from typer.testing import CliRunner

from hf_automodel_parallel import __version__
from hf_automodel_parallel.cli import app
from hf_automodel_parallel.cli.config import folder_of
from hf_automodel_parallel.cli.model_options import quiet
from hf_automodel_parallel.core.output import VERBOSE_VARIABLE

NAMES = sorted(path.stem for path in folder_of("accelerate_configs").glob("*.yaml"))


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def sizes(config: dict) -> dict[str, int]:
    section = config["parallelism_config"].items()
    return {name.removeprefix("parallelism_config_").removesuffix("_size"): size for name, size in section}


def test_names():
    listed = run("config").splitlines()
    assert listed[::2] == NAMES and all(len(line) <= 80 for line in listed)
    assert run("config", "gpu_fsdp2") == (folder_of("accelerate_configs") / "gpu_fsdp2.yaml").read_text()
    assert "there is no config 'gpu'; the names are cpu_fsdp2_tp2, " in run("config", "gpu", code=1)


@pytest.mark.parametrize(("gpus", "nodes"), [(8, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_adapted(name, gpus, nodes):
    text = run("config", name, "--gpus", str(gpus), "--nodes", str(nodes))
    values, before = yaml.safe_load(text), yaml.safe_load(run("config", name))
    mesh = sizes(values)
    assert math.prod(mesh.values()) == values["num_processes"] == gpus * nodes and values["num_machines"] == nodes
    assert values.get("fsdp_config") == before.get("fsdp_config")
    assert mesh["tp"] == (gpus * nodes if name == "cpu_tp2" else sizes(before)["tp"])
    assert mesh["dp_replicate"] == (nodes if name == "gpu_hsdp_tp_2nodes" else 1)
    if nodes > 1:  # a free port is another one on each node, and so is the rank
        assert values["main_process_port"] == 29500 and values["rdzv_backend"] == "static"
        assert values["same_network"] is True and "machine_rank" not in values
    header = text.partition("\n\n")[0]
    assert f"{gpus} processes each" in header and "--config_file THIS_FILE" in header


def test_gpus_that_tp_does_not_divide():
    shown = run("config", "gpu_fsdp2_tp", "--gpus", "3", code=1)
    assert "1 x 3 processes cannot be divided by 2 (tp 2); give another --gpus." in shown


@pytest.mark.parametrize("name", ["cpu_fsdp2_tp2", "gpu_fsdp2_tp"])
def test_nothing_left_to_shard_over_is_tensor_parallelism_alone(name):
    """Accelerate refuses FSDP with dp_shard 1; what is written has the sections of the shipped config without FSDP."""
    values, alone = yaml.safe_load(run("config", name, "--gpus", "2")), yaml.safe_load(run("config", "cpu_tp2"))
    assert values.keys() == alone.keys() and sizes(values) == sizes(alone)
    assert values["distributed_type"] == alone["distributed_type"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--gpus", "8"], "--gpus needs the name of a config in front of it: cpu_fsdp2_tp2, "),
        (["--nodes", "2"], "--nodes needs the name of a config"),
        (["gpu_fsdp2", "--gpus", "1"], "nothing to parallelise; give --gpus 2 or more"),
        (["gpu_hsdp_tp_2nodes", "--gpus", "2"], "which Accelerate refuses; give --gpus 4 or more, or use gpu_fsdp2_tp"),
    ],
)
def test_what_would_not_start_is_refused(arguments, sentence):
    assert sentence in run("config", *arguments, code=1)


def test_version_and_environment(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("--version") == f"hf-automodel-parallel {__version__}\n"
    shown = run("env")
    assert f"- hf-automodel-parallel: {__version__} (" in shown and "- torch: 2." in shown
    assert "- NCCL_DEBUG: WARN" in shown and "secret" not in shown


@pytest.mark.parametrize(("level", "lines"), [("", 0), ("2", 2)])
def test_a_command_is_quiet_unless_all_is_wanted(monkeypatch, caplog, recwarn, level, lines):
    """Of libraries: log lines and warnings."""
    monkeypatch.setenv(VERBOSE_VARIABLE, level)

    @quiet
    def command() -> None:
        logging.getLogger("of_a_library").warning("a line")
        warnings.warn("a warning")

    with warnings.catch_warnings():
        command()
    assert len(caplog.messages) + len(recwarn) == lines
