"""``hf-automodel-parallel selftest``: is what this machine computes in parallel what one process computes?

Processes are forked from one that has imported everything and computed nothing, so a case costs a second or two.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..core.output import VERBOSE_VARIABLE

EPILOG = (
    "Examples:\n\n  hf-automodel-parallel selftest\n\n  hf-automodel-parallel selftest --nproc 8 --device cuda\n\n"
    "  hf-automodel-parallel selftest --only tp,resume --json"
)

#: Seconds that a case may take.
_LIMIT = 120.0
_NOT_INHERITED = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_", "HF_AUTO_PARALLEL", "RANK", "WORLD_SIZE", "LOCAL_")


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
    _import_all()
    rows = []
    for case in chosen:
        began = time.perf_counter()
        row = {"case": case["name"], "mesh": _mesh(case)} | _run(case, device)
        row["seconds"] = round(time.perf_counter() - began, 1)
        rows.append(row)
        if not as_json:
            _show(row)
    failed = sum(not row["ok"] for row in rows)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "device": device, "nproc": nproc, "cases": rows}, indent=2))
    else:
        typer.echo(f"{len(rows) - failed} of {len(rows)} cases are what one process computes, on {nproc} x {device}")
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
    return found


def _mesh(case: dict[str, Any]) -> str:
    def shown(sizes: dict[str, int]) -> str:
        parts = (f"{axis.removesuffix('_size')} {size}" for axis, size in sizes.items() if size > 1)
        return " x ".join(parts) or "1 process"

    again = case.get("again")
    return shown(case["sizes"]) + (f" -> {shown(again)}" if again else "")


def _show(row: dict[str, Any]) -> None:
    mark = typer.style("✓", fg="green") if row["ok"] else typer.style("✗", fg="red")
    numbers = f"off by {row['worst']:.0e}" if "worst" in row else ""
    typer.echo(f"{mark} {row['case']:<9} {row['mesh']:<43} {numbers:<13} {row['seconds']:>5.1f} s")
    if not row["ok"]:
        typer.echo(f"    {row.get('error') or row['where']}")


def _import_all() -> None:
    """Import what the cases need, so that forked processes have it."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from ..accelerate_plugin import methods  # noqa: F401
    from ..strategies import default  # noqa: F401
    from . import selftest_ranks  # noqa: F401


def _run(case: dict[str, Any], device: str) -> dict[str, Any]:
    """The result of ``case``: the row of the table without its name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problem = _fork(1, folder, lambda rank: _reference(case, device, folder))
        if problem is None and case["name"] == "resume":
            first = case | {"first": True}
            _fork(case["ranks"], folder, lambda rank: _parallel(first, device, folder))
            if not (folder / "checkpoint").is_dir():
                problem = _said(folder) or "the first run wrote no checkpoint"
            case = case | {"first": False, "sizes": case["again"], "ranks": math.prod(case["again"].values())}
        if problem is None:
            problem = _fork(case["ranks"], folder, lambda rank: _parallel(case, device, folder))
        if problem is not None:
            return {"ok": False, "error": problem}
        return json.loads((folder / "result.json").read_text())


def _reference(case: dict[str, Any], device: str, folder: Path) -> None:
    import torch

    from .selftest_ranks import reference

    torch.save(reference(case, torch.device(device)), folder / "reference.pt")


def _parallel(case: dict[str, Any], device: str, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from .selftest_ranks import parallel

    expected = torch.load(folder / "reference.pt", weights_only=True)
    result = parallel(case, device == "cpu", expected, folder)
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _fork(ranks: int, folder: Path, work: Any) -> str | None:
    """Run ``work(rank)`` in forked processes. Returns the first error in a line; None without one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _child(rank, ranks, port, folder, work)
        children[child] = rank
    failed = _wait(children)
    return None if failed is None else _said(folder) or failed


def _wait(children: dict[int, int]) -> str | None:
    """Wait for all ``children`` (process id -> rank); kill what is left after the limit, or soon after an error."""
    left, failed, until = dict(children), None, time.monotonic() + _LIMIT
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                rank, code = left.pop(child), os.waitstatus_to_exitcode(status)
                if code and failed is None:
                    failed, until = f"rank {rank} ended with exit code {code}", time.monotonic() + 5
        if left and time.monotonic() > until:
            failed = failed or f"no answer within {_LIMIT:.0f} s"
            for child in left:
                os.kill(child, 9)
            until = float("inf")
        time.sleep(0.02)
    return failed


def _said(folder: Path) -> str:
    """The first error that a rank wrote."""
    errors = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime)
    return errors[0].read_text() if errors else ""


def _child(rank: int, ranks: int, port: int, folder: Path, work: Any) -> None:
    """The life of a forked process; it ends without what the parent has registered for the end of a process."""
    code = 0
    try:
        os.dup2(os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        for name in [name for name in os.environ if name.startswith(_NOT_INHERITED)]:
            del os.environ[name]
        os.environ |= {VERBOSE_VARIABLE: "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        import torch

        torch.set_num_threads(1)
        work(rank)
    except BaseException as error:
        code = 1
        traceback.print_exc()
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    finally:
        sys.stdout.flush()
        os._exit(code)
