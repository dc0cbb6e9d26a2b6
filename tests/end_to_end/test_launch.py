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

import pytest
from accelerate.state import AcceleratorState

from hf_automodel_parallel import __version__
from hf_automodel_parallel.cli.suggest import accelerate_file
from hf_automodel_parallel.config import CONFIG_VARIABLE
from hf_automodel_parallel.planner.arithmetic import Candidate

ROOT = Path(__file__).resolve().parents[2]
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


#: What rank 0 says of a run of the scripts by itself, in this order, each once.
SAID = [
    f"{__version__}: LlamaForCausalLM, 90.4 K parameters in float32, all trained; 2 ranks on cpu",
    "mesh tp 2; global batch 4 = 4 rows x 1 data-parallel rank (DDP would have 8)",
    "plan hf (of the model's class): 10 colwise, 4 rowwise, 1 colwise_gather_output, 1 embedding_rowwise; 1 note, see "
    "verbose=2",
    "memory per rank: weights ",
    "audit of the first step: ok, 21 of 21 trained tensors have gradients, replicas are equal on all ranks",
    "step 2: ",
]


def assert_says_what_it_is(output: str) -> None:
    """A few lines of rank 0 say what runs, none twice, and the other rank says nothing."""
    said = [
        line.partition("hf_automodel_parallel: ")[2] for line in output.splitlines() if "automodel_parallel" in line
    ]
    assert len(said) == len(SAID) <= 8, output
    for line, expected in zip(said, SAID, strict=True):
        assert line.startswith(expected), (line, expected)
    step = said[-1]
    assert " tokens/s (" in step and " per device); optimizer state " in step and "peak memory" in step


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


@pytest.mark.core_cases("trainer")
@pytest.mark.parametrize("kind", ["accelerator", "trainer"])
def test_script_behind_the_launcher(scripts, one_process, kind, tmp_path):
    """`accelerate launch` with a shipped config: every layer is split, and the losses are those of one process."""
    command = [*accelerate_launch("cpu_tp2.yaml"), *LAUNCHER, str(scripts[kind]), "--learning_rate", "1"]
    code, output = start(command, tmp_path)
    assert code == 0 and output.count("RESULT ") == 1, output
    result = reported(output)
    assert_tensor_parallel(result, ["tp"])
    assert_says_what_it_is(output)
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
    assert_tensor_parallel(result, ["tp"])
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


def test_help_from_the_shell(tmp_path):
    code, output = start([*LAUNCHER, "--help"], tmp_path)
    assert code == 0 and output.startswith("usage: accelerate launch"), output


def test_no_config_from_the_shell(scripts, tmp_path):
    code, output = start([*LAUNCHER, str(scripts["accelerator"])], tmp_path)
    assert code == 1
    assert output.strip().splitlines()[-1].startswith("hf_automodel_parallel: nothing says how to parallelise"), output


# ---- shipped config files -----------------------------------------------------------------------------------------


WRONG_SIZE_SCRIPT = """
import torch
from accelerate import Accelerator
from hf_automodel_parallel import AutoParallelismConfig

accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=3))
print("not reached")
"""


@pytest.mark.core
def test_wrong_size_ends_the_launched_script(tmp_path):
    """The whole way: a shell sees a failure soon. One rank prints the message, with the script's own lines; torchrun's
    summary has it as root cause; no other rank repeats it.
    """
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
    message = "ConfigError: the sizes of the mesh axes (tp_size=3) multiply to 3, but there are 2 processes."
    printed, _, summary = output.partition("script.py FAILED")
    assert printed.count(message) == summary.count(message) == 1, output
    assert "in <module>\n    accelerator = Accelerator(" in printed and "hf_automodel_parallel/config.py" not in printed
    assert message in summary[summary.index("Root Cause") :] and "as on rank 0" in summary, output
    assert "not reached" not in output
    assert time.monotonic() - start < 60, output


def test_the_file_that_suggest_writes_starts_a_run(tmp_path):
    """`accelerate launch` with the file as it is: every parameter is on the mesh of the choice."""
    sizes = {"dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2}
    about = {"gpus": 4, "gpus_per_node": 4, "model": "tiny", "dtype": "fp32", "mixed_precision": "no", "sequence": 16}
    file, script = tmp_path / "cfg.yaml", tmp_path / "train.py"
    file.write_text(accelerate_file(Candidate(sizes, "full", True, 4, 1), about, file))
    script.write_text(TRAINER_SCRIPT)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), *LAUNCHER, "--auto_parallel", str(file)]
    code, output = start([*launch, str(script)], tmp_path)
    assert code == 0, output
    result = reported(output)
    assert result["dtensors"] == result["parameters"] and result["axes"] == ["dp_shard", "tp"]
    assert "mesh dp_shard 2 x tp 2" in output and " on sequence shards" in output
