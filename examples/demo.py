"""What `make demo` shows, on CPU processes and in a few minutes: a training that survives a killed process.

1. the plan for the model, before anything runs
2. `finetune_text.py` on four processes, tensor parallel 2 x FSDP2 2, until one of them is killed (SIGKILL)
3. the same on another mesh, FSDP2 4, from the last checkpoint to the end, then LoRA
4. the loss curves, the saved adapter in one plain process, and a table. Exit status 1 if losses differ.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import finetune_text
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "examples/finetune_text.py"
SAVED, KILLED = 20, 27

console = Console(highlight=False)


def run(command: list[str], log: Path | None = None, **variables: str) -> int:
    """Exit status of ``command``. With ``log`` stderr goes there, but for the lines of this package."""
    environment = {
        **finetune_text.plain_environment(),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        **variables,
    }
    if log is None:
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            file.write(line)
            if line.startswith("hf_automodel_parallel: "):
                print(line, end="", file=sys.stderr, flush=True)
    return process.returncode


def plot(out: Path) -> None:
    """The training losses in the terminal."""
    try:
        from uniplot import plot_to_string
    except ImportError:
        console.print("no plot: pip install uniplot")
        return
    history = json.loads((out / "run.json").read_text())["history"]
    for name, title in (("full", "all parameters"), ("LoRA", "LoRA")):
        curve = {int(step): loss for step, loss in history[name].items()}
        first = {step: loss for step, loss in curve.items() if name == "full" and step <= SAVED}
        rest = {step: loss for step, loss in curve.items() if step not in first}
        curves = {label: points for label, points in (("tp 2 x FSDP2 2", first), ("FSDP2 4", rest)) if points}
        text = plot_to_string(
            xs=[list(points) for points in curves.values()],
            ys=[list(points.values()) for points in curves.values()],
            lines=True,
            legend_labels=list(curves),
            title=f"training loss, {title}",
            width=min(64, console.width - 12),
            height=10,
            color=console.is_terminal,
        )
        print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/demo"), help="default: %(default)s")
    arguments, began = parser.parse_args(), time.monotonic()
    os.chdir(ROOT)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in the order of the programs it starts
    out = arguments.output_dir / "parallel"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    python, threads = [sys.executable, "-m"], {"OMP_NUM_THREADS": "1"}
    common = ["--save-steps", str(SAVED), "--no-check", "--output-dir"]

    finetune_text.model_config().save_pretrained(out / "config")
    plan = [*python, "hf_automodel_parallel", "plan", str(out / "config/config.json"), "--tp", "2", "--dp-shard", "2"]
    plan += ["--batch", "4", "--seq", "128", "--dtype", "fp32", "--no-modes"]
    show("1. The plan, before anything runs", plan, "hf-automodel-parallel")
    if run(plan):
        return 1

    launcher = ["-m", "hf_automodel_parallel.launch"]
    config = ["--config_file", "accelerate_configs/cpu_fsdp2_tp2.yaml"]
    first = [*python, "accelerate.commands.launch", *config, *launcher, SCRIPT]
    first += ["--kill-at", str(KILLED), *common, str(out)]
    show(f"2. Tensor parallel 2 x FSDP2 2, until a process is killed at step {KILLED}", first, "accelerate launch")
    status = run(first, arguments.output_dir / "killed.log", **threads)
    if status == 0 or not (out / f"base/checkpoint-{SAVED}").is_dir():
        console.print(f"[red]no process was killed after a checkpoint; see {arguments.output_dir / 'killed.log'}[/red]")
        return 1
    console.print(f"  [red]killed[/red] (exit status {status}); {out / f'base/checkpoint-{SAVED}'} is there")

    second = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "4", *launcher]
    second += ["--auto_parallel", "dp_shard=4", SCRIPT, "--resume", "--batch-size", "2", *common, str(out)]
    show("3. From the checkpoint on another mesh: FSDP2 4", second, "torchrun")
    if run(second, **threads):
        return 1

    console.print("\n[bold]4. The result[/bold]")
    plot(out)
    status = finetune_text.compare(out)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    console.print(f"{time.monotonic() - began:.0f} s, of which {used.ru_utime + used.ru_stime:.0f} s on a core")
    return status


def show(title: str, command: list[str], program: str) -> None:
    """The stage, and its command as a user would type it."""
    rest = command[3:] if command[1] == "-m" else command[1:]
    console.print(f"\n[bold]{title}[/bold]\n[dim]$ {program} {shlex.join(rest)}[/dim]", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
