"""``python -m parity.matrix`` (from tests/): every cell of the parity matrix, written to docs/parity.md.

Exits 1 if a cell fails. ``make parity`` runs it. The default backend of the compiled cells is aot_eager: it takes the same
graphs through the same autograd as inductor, which on two CPU cores spends most of a minute per cell in the C++ compiler;
``--backend inductor --only llama-`` (for example) runs cells with it.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

# Before anything imports torch or a library of Hugging Face: they read these when they are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import typer
from harness.pool import DistributedFailure, close_pools
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from parity.cells import AXES, CI_CELLS, Cell, Verdict, all_cells, run_cell
from parity.test_gradients import MESHES

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "docs" / "parity.md"


def main(
    only: Annotated[str, typer.Option(help="Only cells whose name contains this; commas separate alternatives.")] = "",
    backend: Annotated[str, typer.Option(help="torch.compile backend of the compiled cells.")] = "aot_eager",
    out: Annotated[Path, typer.Option(help="The report to write.")] = DEFAULT_OUT,
) -> None:
    """Run the parity matrix and write the report."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="parity_inductor_")
    torch.set_num_threads(1)
    console = Console()
    wanted = [part for part in only.split(",") if part]
    # One world size after the other: only one pool of workers is alive at a time.
    cells = sorted(all_cells(), key=lambda cell: (MESHES[cell.mesh][0], cell.compiled))
    cells = [cell for cell in cells if not wanted or any(part in str(cell) for part in wanted)]
    if not cells:
        console.print(f"[red]no cell contains {only!r}[/]; a name looks like {all_cells()[0]}")
        raise typer.Exit(2)
    results: dict[Cell, Verdict] = {}
    start = time.monotonic()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cells))
        world = 0
        for cell in cells:
            if MESHES[cell.mesh][0] != world:
                close_pools()
                world = MESHES[cell.mesh][0]
            progress.update(task, description=str(cell))
            results[cell] = verdict = attempt(cell, backend)
            if verdict.problems:
                console.print(f"[red]FAILED[/] {cell}: {'; '.join(verdict.problems)}")
            progress.advance(task)
    seconds = time.monotonic() - start
    out.write_text(report(results, backend, seconds, only))
    failed = sum(bool(verdict.problems) for verdict in results.values())
    console.print(f"{len(results) - failed} of {len(results)} cells hold, in {seconds / 60:.1f} min; written to {out}")
    close_pools()
    raise typer.Exit(1 if failed else 0)


def attempt(cell: Cell, backend: str) -> Verdict:
    """The verdict on a cell, whatever happens to its ranks."""
    try:
        return run_cell(cell, backend)
    except (DistributedFailure, AssertionError) as error:
        lines = [line for line in str(error).splitlines() if line.startswith("--- rank")] or [str(error)]
        return Verdict(float("nan"), float("nan"), float("nan"), "-", (lines[0][:300],))


def report(results: dict[Cell, Verdict], backend: str, seconds: float, only: str) -> str:
    """The page: what was run where, the worst cells, and one table per model and adapter."""
    failed = {cell: verdict for cell, verdict in results.items() if verdict.problems}
    held = [verdict for verdict in results.values() if not verdict.problems]
    worst = max(held, key=lambda verdict: verdict.in_bounds, default=None)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft"))
    command = "make parity"
    if only or backend != "aot_eager":
        command = f"python -m parity.matrix --backend {backend}" + (f" --only {only}" if only else "")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        "# Parity with one process",
        "",
        f"Written by `{command}` on {today}: **{len(held)} of {len(results)} cells hold**"
        + (f" (of {len(all_cells())} in the whole matrix)" if len(results) != len(all_cells()) else "")
        + f", {len(failed)} fail.",
        "",
        f"* {versions}; {os.cpu_count()} CPU cores, gloo, float32; wall time {seconds / 60:.1f} minutes.",
        f"* Compiled cells: backend `{backend}`, each decoder layer in place.",
        "* A cell compares loss and every gradient of one step with the same model in one process, at equal weights. Bounds:",
        "  loss 1e-6 (relative), each gradient 1e-5 of its own norm + 1e-8 of the norm of all. No gradient may be missing or",
        "  new, and the trainable parameters have to be those of the model as it was built.",
        "* With dropout 0.1 the oracle replays the masks that the ranks drew; a mask that a checkpoint draws again has to be the",
        "  same (`tests/harness/dropout.py`). Fused expert weights have neither dropout nor DoRA in PEFT; such adapters of",
        "  Qwen3-MoE are on the attention, the others on all linear layers and the experts.",
        "* LoRA on fused expert weights breaks dynamo's graph inside of PEFT. With activation checkpointing such a layer runs",
        "  uncompiled and says so.",
        "",
        "An entry is the worst gradient's error in units of its bound (1 would be a failure), and its relative error.",
    ]
    if worst is not None:
        lines += [
            "",
            f"Worst of all: {worst.in_bounds:.2f} bounds ({worst.relative:.1e}) at `{worst.worst}`; worst loss "
            f"{max(verdict.loss for verdict in held):.1e}.",
        ]
    if failed:
        lines += ["", "## Failures", ""]
        lines += [f"* **{cell}**: {'; '.join(verdict.problems)}" for cell, verdict in failed.items()]
    meshes = AXES["mesh"]
    for model in AXES["model"]:
        lines += [
            "",
            f"## {model}",
            "",
            f"| adapter | checkpointing | | {' | '.join(meshes)} |",
            "|---" * (3 + len(meshes)) + "|",
        ]
        rows: dict[tuple, dict[str, str]] = {}
        for cell, verdict in results.items():
            if cell.model == model:
                adapter = f"{cell.adapter}, dropout {cell.dropout}" if cell.dropout else cell.adapter
                mode = AXES["checkpointing"].index(cell.checkpointing)
                row = rows.setdefault((AXES["adapter"].index(cell.adapter), adapter, mode, cell.compiled), {})
                text = f"{verdict.in_bounds:.2f} ({verdict.relative:.1e})"
                row[cell.mesh] = "**FAILS**" if verdict.problems else text
        for (_, adapter, mode, compiled), row in sorted(rows.items()):
            cells = " | ".join(row.get(mesh, "not run") for mesh in meshes)
            lines.append(
                f"| {adapter} | {AXES['checkpointing'][mode]} | {'compiled' if compiled else 'eager'} | {cells} |"
            )
    lines += [
        "",
        "## What every test run checks",
        "",
        "`tests/parity/test_matrix.py`: every pair of values of two axes occurs in",
    ]
    lines += ["one of these cells (that they do is itself a test), with `aot_eager` where compiled.", ""]
    lines += [f"* {cell}" for cell in CI_CELLS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(typer.run(main))
