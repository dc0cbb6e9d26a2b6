"""``hf-automodel-parallel selftest``: is what this machine computes in parallel what one process computes?"""

from __future__ import annotations

import json
import math
import tempfile
import time
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from . import local_ranks
from .local_ranks import mesh_text

EPILOG = (
    "Examples:\n\n  hf-automodel-parallel selftest\n\n  hf-automodel-parallel selftest --nproc 8 --device cuda\n\n"
    "  hf-automodel-parallel selftest --only tp,resume --json"
)


def selftest(
    nproc: Annotated[int, typer.Option(help="Number of processes, an even one; on CUDA one for each GPU.")] = 4,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="cpu or cuda; left out: cuda where there are enough GPUs."),
    ] = None,
    only: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Some of the cases, separated by commas."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Train a tiny model in parallel on this machine and compare loss and every gradient with one process.

    The last case times all-reduces on each mesh axis; GB/s is what a link of a ring carries.

    Exit status 0 if all cases hold, 1 if one does not, 2 for wrong options.
    """
    import torch

    gpus = torch.cuda.device_count()
    device = device or ("cuda" if gpus >= nproc else "cpu")
    wrong = None
    if nproc < 2 or nproc % 2:
        wrong = f"--nproc {nproc}: give an even number of processes."
    elif device not in ("cpu", "cuda"):
        wrong = f"--device {device}: give cpu or cuda."
    elif device == "cuda" and gpus < nproc:
        wrong = f"--device cuda --nproc {nproc}: this machine has {gpus} GPUs; give fewer processes, or --device cpu."
    chosen = cases(nproc)
    if only is not None:
        names = [name.strip() for name in only.split(",")]
        unknown = [name for name in names if name not in {case["name"] for case in chosen}]
        if unknown:
            wrong = f"--only {unknown[0]}: the cases are {', '.join(case['name'] for case in chosen)}."
        chosen = [case for case in chosen if case["name"] in names]
    if wrong:
        typer.secho(f"hf-automodel-parallel: {wrong}", fg="red", err=True)
        raise typer.Exit(2)
    rows = []
    for case in chosen:
        began = time.perf_counter()
        row = {"case": case["name"], "mesh": _mesh(case)} | _run(case, device)
        row["seconds"] = round(time.perf_counter() - began, 1)
        rows.append(row)
        if not as_json:
            _show(row)
    failed = sum(not row["ok"] for row in rows)
    compared = [row for row in rows if row["case"] != "bandwidth"]
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "device": device, "nproc": nproc, "cases": rows}, indent=2))
    elif compared:
        right = sum(row["ok"] for row in compared)
        typer.echo(f"{right} of {len(compared)} cases are what one process computes, on {nproc} x {device}")
    raise typer.Exit(1 if failed else 0)


def cases(nproc: int) -> list[dict[str, Any]]:
    """The cases for ``nproc`` processes, quick and basic ones first."""
    half = nproc // 2
    both = {"tp_size": 2, "dp_shard_size": half}
    found: list[dict[str, Any]] = []

    def add(name: str, sizes: dict[str, int], **values: Any) -> None:
        ranks = math.prod(sizes.values())
        case = {"name": name, "sizes": sizes, "ranks": ranks, "batches": ranks // sizes.get("tp_size", 1)}
        found.append(case | {"options": {}, "lora": False, "bf16": False} | values)

    add("tp", {"tp_size": 2, "dp_shard_size": 1})
    add("fsdp2", {"dp_shard_size": nproc, "tp_size": 1})
    if half > 1:
        add("tp_fsdp2", both)
        add("hsdp", {"dp_replicate_size": 2, "dp_shard_size": half, "tp_size": 1})
    add("lora", both, lora=True)
    add("sequence", both, options={"sequence_parallel": True})
    add("bf16", both, bf16=True)
    add("resume", both, again={"dp_shard_size": nproc, "tp_size": 1})
    replicas = 2 if half > 2 and half % 2 == 0 else 1
    add("bandwidth", {"dp_replicate_size": replicas, "dp_shard_size": half // replicas, "tp_size": 2})
    return found


def _mesh(case: dict[str, Any]) -> str:
    again = case.get("again")
    return mesh_text(case["sizes"]) + (f" -> {mesh_text(again)}" if again else "")


def _show(row: dict[str, Any]) -> None:
    mark = typer.style("✓", fg="green") if row["ok"] else typer.style("✗", fg="red")
    numbers = f"off by {row['worst']:.0e}" if "worst" in row else ""
    typer.echo(f"{mark} {row['case']:<9} {row['mesh']:<43} {numbers:<13} {row['seconds']:>5.1f} s")
    if not row["ok"]:
        typer.echo(f"    {row.get('error') or row['where']}")
    for axis, times in groupby(row.get("axes", []), key=lambda time: f"{time['axis']} {time['ranks']}"):
        speeds = (f"{time['bytes'] >> 10:,} KiB {time['gb_per_second']:.3g} GB/s" for time in times)
        typer.echo(f"    {axis}: " + ", ".join(speeds))


def _run(case: dict[str, Any], device: str) -> dict[str, Any]:
    """The result of ``case``: the row of the table without its name."""
    from .selftest_ranks import write_bandwidth, write_reference, write_result

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if case["name"] == "bandwidth":
            problem = local_ranks.run(case["ranks"], folder, partial(write_bandwidth, case, device, folder), device)
            return {"ok": False, "error": problem} if problem else json.loads((folder / "result.json").read_text())
        problem = local_ranks.run(1, folder, partial(write_reference, case, device, folder), device)
        if problem is None and case["name"] == "resume":
            first = case | {"first": True}
            local_ranks.run(case["ranks"], folder, partial(write_result, first, device, folder), device)
            if not (folder / "checkpoint").is_dir():
                problem = local_ranks.error_in(folder) or "the first run wrote no checkpoint"
            case = case | {"first": False, "sizes": case["again"], "ranks": math.prod(case["again"].values())}
        if problem is None:
            problem = local_ranks.run(case["ranks"], folder, partial(write_result, case, device, folder), device)
        if problem is not None:
            return {"ok": False, "error": problem}
        return json.loads((folder / "result.json").read_text())
