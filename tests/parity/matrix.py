"""``python -m parity.matrix`` (from tests/): every cell of the parity matrices, written to docs/parity.md.

Exits 1 if a cell fails. ``make parity`` runs it. The default backend of the compiled cells is aot_eager: it takes the
same graphs through the same autograd as inductor, which on two CPU cores spends most of a minute per cell in the C++
compiler; ``--backend inductor --only llama-`` (for example) runs cells with it.

Verdicts are kept in build/parity.jsonl, one line each, so that a run may be done in pieces: ``--resume`` runs what is
not in there yet (for these versions and this backend), ``--minutes 10`` stops after ten. A matrix that is not run keeps
its section of the page.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

# Before anything imports torch or a library of Hugging Face: they read these when they are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import typer
from harness.meshes import MESHES
from harness.pool import DistributedFailure, close_pools
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from parity.cells import ADAPTER_AXES, SEQUENCE_AXES, Axes, Cell, Verdict, all_cells, run_cell
from parity.table import MATRIX, SEQUENCE

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft"))


@dataclass(frozen=True)
class Matrix:
    """One matrix.

    Attributes:
        title: of its section.
        axes: name -> values; the axis "mesh" gives the columns of the tables, "model" the tables.
        row: a cell -> what its row of the table is called, in three columns.
        checked: the cells that every test run checks.
        notes: what is to be known about it.
    """

    title: str
    axes: Axes
    row: Callable[[Cell], tuple[str, str, str]]
    checked: list[Cell]
    notes: list[str]

    @functools.cached_property
    def cells(self) -> list[Cell]:
        return all_cells(self.axes)


def _mode(cell: Cell) -> str:
    return "compiled" if cell.compiled else "eager"


MATRICES = {
    "adapters": Matrix(
        "Adapters, dropout, checkpointing, compilation",
        ADAPTER_AXES,
        lambda cell: (
            f"{cell.adapter}, dropout {cell.dropout}" if cell.dropout else cell.adapter,
            cell.checkpointing,
            _mode(cell),
        ),
        MATRIX,
        [
            "With dropout 0.1 the oracle replays the masks that the ranks drew; a mask that a checkpoint draws again "
            "has to be",
            "  the same (`tests/harness/dropout.py`). Fused expert weights have neither dropout nor DoRA in PEFT; such "
            "adapters",
            "  of Qwen3-MoE are on the attention, the others on all linear layers and the experts.",
        ],
    ),
    "sequence": Matrix(
        "Sequence parallelism",
        SEQUENCE_AXES,
        lambda cell: (
            cell.adapter,
            cell.checkpointing + (", gathered again" if cell.sequence == "again" else ""),
            _mode(cell),
        ),
        SEQUENCE,
        [
            "Sequences of 15 tokens, which neither 2 nor 4 ranks divide; eager cells run a second forward, of 10 "
            "tokens, before",
            "  the backward of both. `own` is transformers' gradient checkpointing (not reentrant). LoRA is on all "
            "linear",
            "  layers, and on the experts.",
            "`gathered again`: `sequence_parallel_regather=True`.",
        ],
    ),
}


def main(
    matrix: Annotated[str, typer.Option(help="adapters, sequence or all.")] = "all",
    only: Annotated[str, typer.Option(help="Only cells whose name contains this; commas separate alternatives.")] = "",
    backend: Annotated[str, typer.Option(help="torch.compile backend of the compiled cells.")] = "aot_eager",
    resume: Annotated[bool, typer.Option(help="Keep the verdicts of an earlier, unfinished run.")] = False,
    minutes: Annotated[float, typer.Option(help="Stop after so many; --resume goes on.")] = math.inf,
    verdicts: Annotated[Path, typer.Option(help="Where verdicts are kept.")] = ROOT / "build" / "parity.jsonl",
    out: Annotated[Path, typer.Option(help="The report to write.")] = ROOT / "docs" / "parity.md",
) -> None:
    """Run the parity matrices and write the report."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="parity_inductor_")
    torch.set_num_threads(1)
    console = Console()
    names = list(MATRICES) if matrix == "all" else [matrix]
    if unknown := [name for name in names if name not in MATRICES]:
        console.print(f"[red]--matrix {unknown[0]!r}[/]: there are {', '.join(MATRICES)}, and all")
        raise typer.Exit(2)
    verdicts.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        verdicts.unlink(missing_ok=True)
    wanted = [part for part in only.split(",") if part]
    chosen = [(name, cell) for name in names for cell in MATRICES[name].cells]
    chosen = [(name, cell) for name, cell in chosen if not wanted or any(part in str(cell) for part in wanted)]
    if not chosen:
        console.print(f"[red]no cell contains {only!r}[/]; a name looks like {MATRICES[names[0]].cells[0]}")
        raise typer.Exit(2)
    known = read_verdicts(verdicts, backend)
    chosen = [(name, cell) for name, cell in chosen if (name, str(cell)) not in known]
    # One world size after the other: only one pool of workers is alive at a time. What is quick comes first, and the
    # plain cells before those of an option.
    chosen.sort(key=lambda pair: (pair[1].compiled, str(pair[1]).endswith("-again"), MESHES[pair[1].mesh][0]))
    start = time.monotonic()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress, verdicts.open("a") as lines:
        task = progress.add_task("", total=len(chosen))
        world = 0
        for name, cell in chosen:
            if time.monotonic() - start > 60 * minutes:
                break
            if MESHES[cell.mesh][0] != world:
                close_pools()
                world = MESHES[cell.mesh][0]
            progress.update(task, description=str(cell))
            before = time.monotonic()
            verdict = attempt(cell, backend)
            record = {"matrix": name, "cell": str(cell), "backend": backend, "versions": VERSIONS, "date": _today()}
            record |= {"seconds": round(time.monotonic() - before, 1), "verdict": asdict(verdict)}
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            if verdict.problems:
                console.print(f"[red]FAILED[/] {cell}: {'; '.join(verdict.problems)}")
            progress.advance(task)
    close_pools()
    write(read_verdicts(verdicts, backend), names, backend, out)
    results = read_verdicts(verdicts, backend)
    results = {key: record for key, record in results.items() if key[0] in names}
    failed = sum(bool(record["verdict"]["problems"]) for record in results.values())
    minutes = (time.monotonic() - start) / 60
    console.print(f"{len(results) - failed} of {len(results)} cells hold, in {minutes:.1f} min; written to {out}")
    raise typer.Exit(1 if failed else 0)


def _today() -> str:
    return str(datetime.datetime.now(datetime.timezone.utc).date())


def attempt(cell: Cell, backend: str) -> Verdict:
    """The verdict on a cell, whatever happens to its ranks."""
    try:
        return run_cell(cell, backend)
    except (DistributedFailure, AssertionError) as error:
        lines = [line for line in str(error).splitlines() if line.startswith("--- rank")] or [str(error)]
        return Verdict(float("nan"), float("nan"), float("nan"), "-", (lines[0][:300],))


def read_verdicts(path: Path, backend: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(matrix, cell) -> the last record of it with these versions and this backend. Eager cells have none."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        eager = "-eager" in record["cell"]
        if record["versions"] == VERSIONS and (eager or record["backend"] == backend):
            found[record["matrix"], record["cell"]] = record
    return found


# ---- the page ------------------------------------------------------------------------------------------------------

HEADER = """# Parity with one process

A cell compares loss and every gradient of one step with the same model in one process, at equal weights (float32, CPU,
gloo).
Bounds: loss 1e-6 (relative), each gradient 1e-5 of its own norm + 1e-8 of the norm of all. No gradient may be missing
or new.
An entry is the worst gradient's error in units of its bound (1 would be a failure), and its relative error.

Written by `make parity` (`python -m parity.matrix`), one section a matrix."""


def _marker(name: str) -> str:
    return f"<!-- matrix: {name} -->"


def write(records: dict[tuple[str, str], dict[str, Any]], names: list[str], backend: str, out: Path) -> None:
    """Write the sections of the matrices ``names``; those of others stay."""
    sections: dict[str, str] = {}
    for part in (out.read_text() if out.exists() else "").split("<!-- matrix: ")[1:]:
        name, _, text = part.partition(" -->")
        sections[name] = text.strip()
    for name in names:
        of_matrix = {cell: record for (owner, cell), record in records.items() if owner == name}
        if of_matrix:
            sections[name] = section(MATRICES[name], of_matrix, backend)
    parts = [HEADER] + [f"{_marker(name)}\n\n{sections[name]}" for name in MATRICES if name in sections]
    out.write_text("\n\n".join(parts) + "\n")


def section(matrix: Matrix, records: dict[str, dict[str, Any]], backend: str) -> str:
    """One matrix: what was run where, the worst cell, one table per model, and what every test run checks."""
    verdicts = {cell: record["verdict"] for cell, record in records.items()}
    failed = {cell: verdict for cell, verdict in verdicts.items() if verdict["problems"]}
    held = [verdict for verdict in verdicts.values() if not verdict["problems"]]
    missing = [cell for cell in matrix.cells if str(cell) not in verdicts]
    dates = sorted({record["date"] for record in records.values()})
    minutes = sum(record["seconds"] for record in records.values()) / 60
    lines = [
        f"## {matrix.title}",
        "",
        f"**{len(held)} of {len(verdicts)} cells hold**, {len(failed)} fail; {len(matrix.cells)} are in the whole "
        "matrix" + (f", of which {len(missing)} were not run." if missing else "."),
        "",
        f"* Run on {' to '.join(dates[:1] + dates[1:][-1:])}; {VERSIONS}; {os.cpu_count()} CPU cores, {minutes:.0f} "
        "minutes.",
        f"* Compiled cells: backend `{backend}`, each decoder layer in place.",
        *(note if note.startswith("  ") else f"* {note}" for note in matrix.notes),
        "* LoRA on fused expert weights breaks dynamo's graph inside of PEFT. With activation checkpointing such a "
        "layer runs",
        "  uncompiled and says so.",
    ]
    if held:
        worst = max(held, key=lambda verdict: verdict["in_bounds"])
        lines += [
            "",
            f"Worst of all: {worst['in_bounds']:.2f} bounds ({worst['relative']:.1e}) at `{worst['worst']}`; worst "
            f"loss {max(verdict['loss'] for verdict in held):.1e}.",
        ]
    if failed:
        lines += ["", "### Failures", ""]
        lines += [f"* **{cell}**: {'; '.join(verdict['problems'])}" for cell, verdict in failed.items()]
    meshes = matrix.axes["mesh"]
    for model in matrix.axes["model"]:
        rows: dict[tuple[str, str, str], dict[str, str]] = {}
        for cell in matrix.cells:
            if cell.model == model:
                row = rows.setdefault(matrix.row(cell), {})
                row[cell.mesh] = _entry(verdicts.get(str(cell)))
        lines += ["", f"### {model}", "", f"| adapter | checkpointing | | {' | '.join(meshes)} |"]
        lines += ["|---" * (3 + len(meshes)) + "|"]
        lines += [f"| {' | '.join([*name, *(row.get(mesh, '') for mesh in meshes)])} |" for name, row in rows.items()]
    lines += ["", "### What every test run checks", ""]
    lines += ["`tests/parity/table.py`: every pair of values of two axes occurs in one of these cells (that they do is"]
    lines += ["itself a test), with `aot_eager` where compiled.", ""]
    lines += [f"* {cell}" for cell in matrix.checked]
    return "\n".join(lines)


def _entry(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return "not run"
    return "**FAILS**" if verdict["problems"] else f"{verdict['in_bounds']:.2f} ({verdict['relative']:.1e})"


if __name__ == "__main__":
    sys.exit(typer.run(main))
