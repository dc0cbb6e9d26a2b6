"""The launcher module in this process: command lines, mistakes, what a script finds, shipped configs."""

import json
import logging
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import accelerate.accelerator
import pytest
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.config import CONFIG_VARIABLE
from hf_automodel_parallel.core.mesh import AXES
from hf_automodel_parallel.core.output import VERBOSE_VARIABLE
from hf_automodel_parallel.launch import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.fixture
def process_state(monkeypatch, tmp_path):
    """`main` changes its process, which here is that of the tests: everything is put back afterwards."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_")) and name != CONFIG_VARIABLE
    }
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(accelerate.accelerator, "ParallelismConfig", ParallelismConfig)
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    return environment


def exit_of(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(process_state, capsys, option):
    assert exit_of([option]) == 0
    shown = capsys.readouterr().out
    for part in ("usage: accelerate launch", "--auto_parallel CONFIG", "-m MODULE", "examples:", "torchrun"):
        assert part in shown
    assert CONFIG_VARIABLE in shown
    assert accelerate.accelerator.ParallelismConfig is ParallelismConfig


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--auto-paralel", "tp=2", "script.py"], "unknown option '--auto-paralel' before the script"),
        (["--tp", "2", "script.py"], "unknown option '--tp'"),
        (["--auto_parallel"], "--auto_parallel needs a value"),
        (["--auto_parallel", "tp=2"], "no script given"),
        ([], "no script given"),
        (["-m"], "-m needs the name of a module"),
    ],
)
def test_wrong_command_line_shows_the_usage(process_state, arguments, message):
    code = exit_of(arguments)
    assert message in code and "usage: accelerate launch" in code
    assert accelerate.accelerator.ParallelismConfig is ParallelismConfig


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--auto_parallel", "tp=2", "missing.py"], "the script 'missing.py' does not exist"),
        (["--auto_parallel", "tq=2", "script.py"], "unknown field 'tq'"),
        (["--auto_parallel", "", "script.py"], "the parallelism config is empty"),
        (["--auto_parallel", "missing.yaml", "script.py"], "cannot read the parallelism config 'missing.yaml'"),
        (["script.py"], "nothing says how to parallelise. Give --auto_parallel"),
        (["script.py", "--auto_parallel", "tp=2"], "--auto_parallel stands behind the script"),
        (["script.py", "--auto-parallel=tp=2"], "--auto_parallel stands behind the script"),
    ],
)
def test_mistake_is_one_line(process_state, arguments, message):
    """Every rank prints it: a traceback through runpy would hide it."""
    code = exit_of(arguments)
    assert code.startswith("hf_automodel_parallel: ") and message in code
    assert "\n" not in code


WRITE = """
import json, os, sys
import accelerate.accelerator
from neighbour import NAME
config = accelerate.accelerator.ParallelismConfig()
json.dump([__name__, sys.argv, NAME, config.to_dict(), type(config).__name__], open("seen.json", "w"))
"""


@pytest.mark.parametrize("form", ["script", "module"])
@pytest.mark.parametrize("flag", [["--auto_parallel", "tp=1"], ["--auto-parallel=tp=1"]], ids=["spaced", "joined"])
def test_script_finds_what_it_is_used_to(process_state, tmp_path, form, flag):
    """Name, arguments and neighbours of the script are those of `python script.py`, `python -m module`."""
    directory = tmp_path / "project"
    directory.mkdir()
    (directory / "neighbour.py").write_text("NAME = 'found'\n")
    (directory / "train.py").write_text(WRITE)
    what = [str(directory / "train.py")] if form == "script" else ["-m", "train"]
    sys.path.insert(0, str(directory)) if form == "module" else None
    try:
        main([*flag, *what, "-h", "--auto_parallel", "other"])
    finally:
        sys.modules.pop("neighbour", None)
    name, argv, neighbour, config, kind = json.loads((tmp_path / "seen.json").read_text())
    assert name == "__main__" and neighbour == "found"
    assert Path(argv[0]).name == "train.py" and argv[1:] == ["-h", "--auto_parallel", "other"]
    assert kind == "AutoParallelismConfig" and config == {"tp_size": 1}


@pytest.mark.parametrize(
    "flag, environment, wanted",
    [
        ([], {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, {"tp_size": 2}),
        ([], {CONFIG_VARIABLE: "dp_shard=4"}, {"dp_shard_size": 4}),
        (["--auto_parallel", "dp_shard=2"], {CONFIG_VARIABLE: "dp_shard=4"}, {"dp_shard_size": 2}),
        (
            ["--auto_parallel", "dp_shard=2"],
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            {"dp_shard_size": 2},
        ),
        (
            [],
            {CONFIG_VARIABLE: "", "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            {"tp_size": 2},
        ),
    ],
    ids=["file", "variable", "flag_over_variable", "flag_over_file", "empty_variable"],
)
def test_who_wins(process_state, tmp_path, flag, environment, wanted):
    """The flag over $HF_AUTO_PARALLEL over Accelerate's file, and as a whole: sizes are not mixed from two places."""
    process_state.update(environment)
    (tmp_path / "neighbour.py").write_text("NAME = 'found'\n")
    (tmp_path / "train.py").write_text(WRITE)
    try:
        main([*flag, "train.py"])
    finally:
        sys.modules.pop("neighbour", None)
    config = json.loads((tmp_path / "seen.json").read_text())[3]
    assert {name: value for name, value in config.items() if name != "tp_handler"} == wanted


def test_loser_is_named(process_state, tmp_path, caplog):
    """Two places that differ: the log says which one is used."""
    section = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}
    sizes = {"PARALLELISM_CONFIG_TP_SIZE": "1", "PARALLELISM_CONFIG_CP_SIZE": "1"}
    (tmp_path / "train.py").write_text("")
    for flag, differs in {"tp=2,dp_shard=4": True, "dp_shard=4": False}.items():
        process_state.update(section | sizes)
        caplog.clear()
        main(["--auto_parallel", flag, "train.py"])
        assert (
            "is used, not the parallelism_config section of Accelerate's config file (dp_shard_size=4)" in caplog.text
        ) is differs
    (tmp_path / "train.py").write_text(
        "from accelerate import Accelerator\n"
        "from hf_automodel_parallel import AutoParallelismConfig\n"
        "Accelerator(cpu=True, parallelism_config=AutoParallelismConfig(cp_size=1))\n"
        "Accelerator(cpu=True)\n"  # shares it
    )
    main(["--auto_parallel", "forward_prefetch=3", "train.py"])
    assert "the script's own parallelism config, AutoParallelismConfig(" in caplog.text


BNB, TORCH = logging.getLogger("bitsandbytes.backends.cpu.ops"), logging.getLogger("torch._higher_order_ops.wrap")
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


@pytest.fixture
def libraries(process_state, monkeypatch, tmp_path):
    """As at the start of a process: nothing is silenced, and everything is put back."""
    for logger in (BNB, TORCH, logging.getLogger("torch.distributed.tensor._redistribute")):
        monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(sys, "warnoptions", [])
    for variable in (*BARS, "TRANSFORMERS_VERBOSITY", VERBOSE_VARIABLE):
        process_state.pop(variable, None)
    (tmp_path / "train.py").write_text("import warnings\nwarnings.warn('old name', FutureWarning)\n")
    with warnings.catch_warnings():
        yield process_state


def library_lines(caplog) -> list[str]:
    caplog.clear()
    BNB.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    BNB.warning("something that matters")
    TORCH.warning("\nDetected that context_fn is passed to torch.utils.checkpoint under torch.compile.\n")
    return caplog.messages


@pytest.mark.parametrize("rank", ["0", "1"])
def test_libraries_are_quieter(libraries, caplog, recwarn, rank):
    """Known lines are left out; ranks > 0 have no bars, and no notices that rank 0 has."""
    libraries["RANK"] = rank
    libraries[BARS[1]] = "0"  # the user's
    main(["--auto_parallel", "tp=1", "train.py"])
    assert library_lines(caplog) == ["something that matters"]
    assert [libraries.get(variable) for variable in BARS] == [None if rank == "0" else "1", "0"]
    assert libraries.get("TRANSFORMERS_VERBOSITY") == (None if rank == "0" else "error")
    assert len(recwarn) == (rank == "0")


@pytest.mark.parametrize("form", ["option", "variable"])
def test_libraries_say_everything_with_verbose_2(libraries, caplog, recwarn, form):
    libraries |= {"RANK": "1"} | ({VERBOSE_VARIABLE: "2"} if form == "variable" else {})
    main(["--auto_parallel", "tp=1,verbose=2" if form == "option" else "tp=1", "train.py"])
    assert len(library_lines(caplog)) == 3
    assert not {*BARS, "TRANSFORMERS_VERBOSITY"} & set(libraries) and len(recwarn) == 1


def test_parallelism_config_of_the_script_itself_is_left_alone(process_state, tmp_path):
    """A script that passes its own sizes means them; only what Accelerate builds by itself comes from the
    environment.
    """
    (tmp_path / "train.py").write_text(
        "import accelerate.accelerator, json\n"
        "config = accelerate.accelerator.ParallelismConfig(tp_size=1, dp_shard_size=4)\n"
        "json.dump(config.to_dict(), open('seen.json', 'w'))\n"
    )
    main(["--auto_parallel", "dp_shard=2", "train.py"])
    assert json.loads((tmp_path / "seen.json").read_text()) == {"tp_size": 1, "dp_shard_size": 4}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config(path, monkeypatch):
    """Accelerate reads the file, its sizes multiply to its processes, and our config takes what reaches the workers."""
    config = load_config_from_file(str(path))
    values = yaml.safe_load(path.read_text())
    sizes = {key: value for key, value in config.parallelism_config.items() if key.endswith("_size")}
    assert sizes and all(key.startswith("parallelism_config_") for key in sizes)
    product = 1
    for key, size in sizes.items():
        product *= size
        monkeypatch.setenv(key.upper(), str(size))
    assert product == config.num_processes == values["num_processes"]
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    parallel = AutoParallelismConfig()
    parallel.resolve_sizes(config.num_processes)
    assert {
        f"parallelism_config_{axis}_size": getattr(parallel, f"{axis}_size") for axis in AXES
    }.items() >= sizes.items()
    for line in path.read_text().splitlines():
        if line.startswith("#") and "--config_file" in line:
            assert f"accelerate_configs/{path.name}" in line, "the example in the file names the file"


def test_there_are_shipped_configs():
    assert {"cpu_tp2", "cpu_fsdp2_tp2"} <= {path.stem for path in CONFIGS}


def test_runpy_is_what_runs_the_script():
    """The launcher's module form must be importable under the name that its help prints."""
    again = runpy.run_module("hf_automodel_parallel.launch", run_name="not_main")["main"]
    assert again.__code__ == main.__code__
