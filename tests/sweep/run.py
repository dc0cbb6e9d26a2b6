"""``python -m sweep.run`` (from tests/): every causal-LM type against one process, written to docs/architectures.md.

Results are kept as JSON lines beside the report's build folder, so that an interrupted sweep goes on where it was;
``--fresh`` begins anew. Exits 1 if a gradient is wrong. ``make sweep`` runs it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

# Before anything imports torch or a library of Hugging Face: they read these when they are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import typer
from harness.pool import DistributedFailure, WorkerPool
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sweep.cells import KINDS, MESHES, Outcome, cells, run_kinds
from sweep.report import report
from sweep.tiny import VARIANTS, causal_lm_types

ROOT = Path(__file__).resolve().parents[2]
SECONDS_PER_CASE = 240.0


def main(
    only: Annotated[str, typer.Option(help="Only types whose name contains this; commas separate alternatives.")] = "",
    mesh: Annotated[str, typer.Option(help=f"Only these meshes, of {', '.join(MESHES)}.")] = ",".join(MESHES),
    kind: Annotated[str, typer.Option(help=f"Only these kinds, of {', '.join(KINDS)}.")] = ",".join(KINDS),
    jobs: Annotated[int, typer.Option(help="Types at a time, each on a pool of processes of its own.")] = 1,
    fresh: Annotated[bool, typer.Option(help="Forget the results of an earlier, interrupted sweep.")] = False,
    results: Annotated[Path, typer.Option(help="Results so far, one JSON object a line.")] = ROOT / "build/sweep.jsonl",
    out: Annotated[Path, typer.Option(help="The report to write.")] = ROOT / "docs" / "architectures.md",
) -> None:
    """Compare every causal language model of the installed transformers with one process, and write the report."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    console = Console()
    meshes, kinds = [m for m in mesh.split(",") if m], [k for k in kind.split(",") if k]
    unknown = [m for m in meshes if m not in MESHES] + [k for k in kinds if k not in KINDS]
    if unknown or jobs < 1:
        console.print(f"[red]unknown: {', '.join(unknown) or f'--jobs {jobs}'}[/]; see --help")
        raise typer.Exit(2)
    wanted = [part for part in only.split(",") if part]
    cases = [c for c in (*causal_lm_types(), *VARIANTS) if not wanted or any(part in c for part in wanted)]
    if not cases:
        console.print(f"[red]no type contains {only!r}[/]")
        raise typer.Exit(2)
    results.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        results.unlink(missing_ok=True)
    key = versions()
    known = read_results(results, key)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    lock = threading.Lock()
    with Progress(*columns, console=console) as progress, results.open("a") as log:
        task = progress.add_task("", total=len(cases) * len(meshes))

        def attempt(case: str, mesh: str, pools: _Pools) -> None:
            todo = [k for k in kinds if k in cells(mesh) and (case, mesh, k) not in known]
            for outcome in pools.run(case, mesh, todo) if todo else []:
                with lock:
                    known[case, mesh, outcome.kind] = outcome
                    log.write(json.dumps({"versions": key, **vars(outcome)}) + "\n")
                    log.flush()
                    if outcome.status in ("wrong", "failed"):
                        console.print(f"[red]{outcome.status}[/] {case} {mesh} {outcome.kind}: {outcome.detail[:200]}")
            with lock:
                progress.update(task, description=f"{case} {mesh}", advance=1)

        for mesh in meshes:  # one world size after the other: only the pools of one are alive at a time
            shares = [cases[first::jobs] for first in range(jobs)]

            def work(share: list[str], mesh: str = mesh) -> None:
                pools = _Pools(MESHES[mesh][0])
                try:
                    for case in share:
                        attempt(case, mesh, pools)
                finally:
                    pools.close()

            with ThreadPoolExecutor(jobs) as workers:
                list(workers.map(work, shares))
    outcomes = [known[c, m, k] for c in cases for m in meshes for k in kinds if (c, m, k) in known]
    out.write_text(report(outcomes, key, sum(o.seconds for o in outcomes)))
    wrong = [o for o in outcomes if o.status == "wrong"]
    console.print(f"{len(outcomes)} cells, {len(wrong)} wrong; written to {out}")
    raise typer.Exit(1 if wrong else 0)


class _Pools:
    """One pool of processes, started anew when a case has killed it."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.pool: WorkerPool | None = None

    def run(self, case: str, mesh: str, kinds: list[str]) -> list[Outcome]:
        if self.pool is None or not self.pool.alive:
            self.pool = WorkerPool(self.world)
        try:
            answers: list[dict[str, Any]] = self.pool.run(run_kinds, (case, mesh, kinds), {}, SECONDS_PER_CASE)[0]
            return [Outcome(**answer) for answer in answers]
        except DistributedFailure as failure:
            if len(kinds) > 1:  # one of them has taken the others along
                return [outcome for kind in kinds for outcome in self.run(case, mesh, [kind])]
            return [Outcome(case, mesh, kinds[0], "failed", detail=" ".join(str(failure).split())[:600])]

    def close(self) -> None:
        if self.pool is not None and self.pool.alive:
            self.pool.close()


def versions() -> str:
    """The libraries that decide the results."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft"))


def read_results(path: Path, key: str) -> dict[tuple[str, str, str], Outcome]:
    """What an earlier sweep with the same libraries has found."""
    known: dict[tuple[str, str, str], Outcome] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        values = json.loads(line)
        if values.pop("versions") == key:
            outcome = Outcome(**values)
            known[outcome.model_type, outcome.mesh, outcome.kind] = outcome
    return known


if __name__ == "__main__":
    sys.exit(typer.run(main))
