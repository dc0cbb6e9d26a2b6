"""An unmodified script behind the launcher: parallel, with the results of one process, and untouched without it."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import accelerate.accelerator
import pytest
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.accelerate_plugin.config import CONFIG_VARIABLE
from hf_automodel_parallel.accelerate_plugin.launcher import main
from hf_automodel_parallel.core.mesh import AXES

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
LAUNCHER = ["-m", "hf_automodel_parallel.launch"]

#: What both scripts share: the model, the data, and one line of output from the first process.
COMMON = """
import json
import sys

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM


def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def make_rows():
    return torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))


def report(model, losses):
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    result = {
        "losses": losses,
        "dtensors": len(sharded),
        "parameters": len(list(model.parameters())),
        "axes": sorted({name for p in sharded for name in p.device_mesh.mesh_dim_names}),
        "split_over_tp": sum(
            not p.placements[p.device_mesh.mesh_dim_names.index("tp")].is_replicate() for p in sharded
        ),
        "package": "hf_automodel_parallel" in sys.modules,
        "arguments": sys.argv[1:],
    }
    sys.stdout.write("RESULT " + json.dumps(result) + "\\n")  # in one piece: other ranks write, too
    sys.stdout.flush()
"""

ACCELERATOR_SCRIPT = (
    COMMON
    + """
from accelerate import Accelerator
from transformers import get_linear_schedule_with_warmup


def main():
    accelerator = Accelerator()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dataloader = DataLoader(TensorDataset(make_rows()), batch_size=4)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, len(dataloader))
    model, optimizer, dataloader, scheduler = accelerator.prepare(model, optimizer, dataloader, scheduler)
    losses = []
    for (input_ids,) in dataloader:
        loss = model(input_ids=input_ids, labels=input_ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    if accelerator.is_main_process:
        report(model, losses)


if __name__ == "__main__":
    main()
"""
)

TRAINER_SCRIPT = (
    COMMON
    + """
from transformers import Trainer, TrainingArguments


def main():
    rows = [{"input_ids": row, "labels": row} for row in make_rows()]
    arguments = TrainingArguments(
        output_dir="output",
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(make_model(), arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        report(trainer.model, losses)


if __name__ == "__main__":
    main()
"""
)


def start(command: list[str], directory: Path, timeout: float = 240) -> tuple[int, str]:
    """Exit code and output of ``python command``, in an environment that says nothing about parallelism."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_")) and name != CONFIG_VARIABLE
    }
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def reported(output: str) -> dict[str, Any]:
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def result_of(command: list[str], directory: Path) -> dict[str, Any]:
    code, output = start(command, directory)
    assert code == 0 and output.count("RESULT ") == 1, output
    return reported(output)


def accelerate_launch(config: str | None = None) -> list[str]:
    options = (
        ["--config_file", str(ROOT / "accelerate_configs" / config)] if config else ["--cpu", "--num_processes", "1"]
    )
    return ["-m", "accelerate.commands.launch", *options]


def assert_tensor_parallel(result: dict[str, Any], axes: list[str]) -> None:
    assert result["package"]
    assert result["dtensors"] == result["parameters"]
    assert result["axes"] == axes
    assert result["split_over_tp"] == 2 * 7 + 2, "all but the norms"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("scripts")
    paths = {"accelerator": directory / "with_accelerator.py", "trainer": directory / "with_trainer.py"}
    paths["accelerator"].write_text(ACCELERATOR_SCRIPT)
    paths["trainer"].write_text(TRAINER_SCRIPT)
    return paths


@pytest.fixture(scope="module")
def one_process(scripts, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The same files, run here by nothing but python."""
    results = {}
    for kind, script in scripts.items():
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.chdir(tmp_path_factory.mktemp(kind))
            patch.setattr(sys, "argv", [str(script)])
            runpy.run_path(str(script), run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=True)
        results[kind] = reported(output.getvalue())
        assert results[kind]["dtensors"] == 0 and len(results[kind]["losses"]) >= 5
    return results


# ---- scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["accelerator", "trainer"])
def test_script_behind_the_launcher(scripts, one_process, kind, tmp_path):
    """`accelerate launch` with a shipped config: every layer is split, and the losses are those of one process."""
    command = [*accelerate_launch("cpu_tp2.yaml"), *LAUNCHER, str(scripts[kind]), "--learning_rate", "1"]
    result = result_of(command, tmp_path)
    assert_tensor_parallel(result, ["dp_shard", "tp"])
    assert result["losses"] == pytest.approx(one_process[kind]["losses"], rel=1e-5)
    assert result["arguments"] == ["--learning_rate", "1"], "the script has its own arguments and no others"


LEAVING = """
import atexit
import sys
import torch.distributed as dist

# Runs after what is registered later. In one piece: other ranks write, too.
atexit.register(lambda: (sys.stdout.write(f"LEFT {dist.is_initialized()}\\n"), sys.stdout.flush()))
"""
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    *LAUNCHER,
    "--auto_parallel",
    "tp=2",
]


def ways_of_leaving(output: str) -> set[str]:
    return {line for line in output.splitlines() if line.startswith("LEFT")}


def test_script_with_the_flag_under_torchrun(one_process, tmp_path):
    """No config file anywhere: the launcher's own flag is enough.

    And the process group is closed before python goes: else gloo's threads may meet an interpreter that is gone, which
    is a SIGABRT after all the work is done.
    """
    script = tmp_path / "train.py"
    script.write_text(LEAVING + ACCELERATOR_SCRIPT)
    code, output = start([*TORCHRUN, str(script)], tmp_path)
    assert code == 0 and ways_of_leaving(output) == {"LEFT False"}, output
    result = reported(output)
    assert_tensor_parallel(result, ["dp_shard", "tp"])
    assert result["losses"] == pytest.approx(one_process["accelerator"]["losses"], rel=1e-5)


def test_after_an_error_of_the_script_nobody_waits_for_others(tmp_path):
    script = tmp_path / "leaving.py"
    script.write_text(
        f"{LEAVING}\nfrom accelerate import Accelerator\nAccelerator()\nraise RuntimeError('of the script')\n"
    )
    code, output = start([*TORCHRUN, str(script)], tmp_path)
    assert code != 0 and ways_of_leaving(output) == {"LEFT True"}, output


def test_script_without_the_launcher_is_untouched(scripts, one_process, tmp_path):
    """Installed beside it, the package never meets a script that does not ask for it."""
    result = result_of([*accelerate_launch(), str(scripts["accelerator"])], tmp_path)
    assert not result["package"]
    assert result | {"package": True} == one_process["accelerator"]


# ---- command line -------------------------------------------------------------------------------------------------


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


def test_help_from_the_shell(tmp_path):
    code, output = start([*LAUNCHER, "--help"], tmp_path)
    assert code == 0 and output.startswith("usage: accelerate launch"), output


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
    ],
)
def test_mistake_is_one_line(process_state, arguments, message):
    """Every rank prints it: a traceback through runpy would hide it."""
    code = exit_of(arguments)
    assert code.startswith("hf_automodel_parallel: ") and message in code
    assert "\n" not in code


def test_no_config_from_the_shell(scripts, tmp_path):
    code, output = start([*LAUNCHER, str(scripts["accelerator"])], tmp_path)
    assert code == 1
    assert output.strip().splitlines()[-1].startswith("hf_automodel_parallel: nothing says how to parallelise"), output


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


# ---- shipped config files -----------------------------------------------------------------------------------------


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
    assert runpy.run_module("hf_automodel_parallel.launch", run_name="not_main")["main"] is main


WRONG_SIZE_SCRIPT = """
import torch
from accelerate import Accelerator
from hf_automodel_parallel import AutoParallelismConfig

accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=3))
print("not reached")
"""


def test_wrong_size_ends_the_launched_script(tmp_path):
    """The whole way: a shell sees a failure soon, and the message is in what the processes printed."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(WRONG_SIZE_SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0, output
    assert "ConfigError: the sizes of the mesh axes (tp_size=3) multiply to 3, but there are 2 processes." in output
    assert "not reached" not in output
    assert time.monotonic() - start < 60, output
