"""``hf-automodel-parallel verify``: does a model train on a mesh as it does in one process? In miniature, on CPU."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.importing import import_modules
from ..errors import ConfigError
from . import local_ranks
from . import model_options as options
from .tables import eighty_columns, table_of

EPILOG = (
    "Examples:\n\n  hf-automodel-parallel verify path/to/model --tp 2 --dp-shard 2 --sequence-parallel\n\n"
    "  hf-automodel-parallel verify llama-3.1-405b --tp 2 --lora r=4,targets=all-linear --checkpointing full\n\n"
    "  hf-automodel-parallel verify path/to/model --tp 2 --import my_pkg --tp-plan my_pkg.plans:mine\n\n"
    "  hf-automodel-parallel verify path/to/model --config_file accelerate.yaml --json\n\n"
    "  hf-automodel-parallel verify path/to/model --tp 2 --lora r=8 --stack transformers --script reproduction"
)

#: Sizes of the tp axis that the heads of the small model divide by, and the most processes that run as they were given.
_TP, _PROCESSES = (1, 2, 4), 8


@options.quiet
def verify(
    context: typer.Context,
    model: options.Model,
    tp: options.Tp = None,
    dp_shard: options.DpShard = None,
    dp_replicate: options.DpReplicate = None,
    cp: options.Cp = None,
    world: options.World = None,
    config_file: options.ConfigFile = None,
    settings: options.Settings = None,
    tp_plan: options.TpPlan = None,
    plan_order: options.PlanOrder = None,
    sequence_parallel: options.SequenceParallel = False,
    checkpointing: options.Checkpointing = None,
    lora: options.Lora = None,
    batch: options.Batch = 2,
    sequence: Annotated[int, typer.Option("--seq", help="Tokens of a row, 2 to 64.", min=2)] = 16,
    worst: Annotated[int, typer.Option(help="Number of gradients to show, the worst ones.", min=1)] = 5,
    stack: Annotated[
        options.Text,
        typer.Option(help="Judge another parallelisation: transformers (DistributedConfig) or accelerate (FSDP2)."),
    ] = None,
    script: Annotated[
        options.File,
        typer.Option(help="With --stack: a new directory for a script that repeats it without this package."),
    ] = None,
    imports: options.Imports = None,
    as_json: options.AsJson = False,
) -> None:
    """Train a small copy of a model on local CPU processes; compare loss and every gradient with one process.

    The copy has the class of the model and the switches of its config, with few layers of small sizes. It is run in
    float32 by Accelerator.prepare, forward and backward. Without sizes of the mesh, tp is 2; a mesh of more than 8
    processes is made smaller. Exit status 0 if all is equal, 1 if not, 2 for wrong options.
    """
    from ..plan_search.proxy_model import POSITIONS
    from . import stacks

    with options.one_line_errors(2):
        if os.getcwd() not in sys.path:  # as python -m has it
            sys.path.insert(0, os.getcwd())
        import_modules(imports or ())
        fields, environment, precision, ranks = options.config_values(context)
        if sequence > POSITIONS:
            raise ConfigError(f"--seq {sequence}: the small model has {POSITIONS} positions; give {POSITIONS} or less.")
        asked = sizes_of(fields, ranks)
        sizes = smaller(asked)
        if stack is not None:
            stacks.check(stack, fields, asked, config_file)
        if script is not None and (stack is None or script.exists()):
            raise ConfigError(f"--script {script}: give --stack, and a directory that does not exist yet.")
        job = _job(model, lora, fields, sizes, batch, sequence, environment, tuple(imports or ()))
    result = _run(job) if stack is None else _run_stack(stacks.StackJob(job, stack), script)
    result |= {"model": model, "class": type(job.network).__name__, "mesh": sizes, "asked": asked, "notes": []}
    result["stack"] = None if stack is None else stacks.words(stack)
    if precision != "no":
        result["notes"].append(f"mixed_precision {precision} of the config file is not used: float32 shows more")
    if as_json:
        typer.echo(json.dumps(_finite(result), indent=2))
    else:
        _show(result, worst)
    raise typer.Exit(0 if result["ok"] else 1)


def sizes_of(fields: dict[str, Any], world: int | None) -> dict[str, int]:
    """The sizes of all mesh axes, by the names of the fields.

    Raises:
        ConfigError: a field is wrong, or the sizes do not fit ``world``.
    """
    from ..config import AutoParallelismConfig
    from ..core.mesh import AXES

    config = AutoParallelismConfig(**fields)
    names = [f"{axis}_size" for axis in AXES]
    config.resolve_sizes(world or math.prod(fields.get(name) or 1 for name in names))
    return {name: getattr(config, name) for name in names}


def smaller(sizes: dict[str, int]) -> dict[str, int]:
    """``sizes`` if they are few processes, else 2 of each axis that has 2 or more."""
    if math.prod(sizes.values()) <= _PROCESSES and sizes["tp_size"] in _TP:
        return sizes
    return {name: min(size, 2) for name, size in sizes.items()}


def _job(model: str, lora: str | None, fields: dict[str, Any], sizes: dict[str, int], *rest: Any) -> Any:
    from ..config import AutoParallelismConfig
    from ..planner.models import lora_of, on_meta
    from .verify_ranks import Job

    AutoParallelismConfig(**fields | sizes)  # what is wrong is said once
    return Job(on_meta(model, "fp32"), lora_of(lora) if lora else None, fields | sizes, sizes, *rest)


def _run(job: Any) -> dict[str, Any]:
    """The result of :func:`.verify_ranks.parallel`; ``ok`` and ``error`` where a process ended with an error."""
    from .verify_ranks import write_reference, write_result

    ranks = math.prod(job.sizes.values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _progress("one process")
        problem = local_ranks.run(1, folder, partial(write_reference, job, folder))
        if problem is not None:
            return {"ok": False, "error": f"one process: {problem}"}
        _progress(f"{ranks} processes, {local_ranks.mesh_text(job.sizes)}")
        problem = local_ranks.run(ranks, folder, partial(write_result, job, folder))
        if problem is not None:
            return {"ok": False, "error": problem}
        return json.loads((folder / "result.json").read_text())


def _run_stack(one: Any, script: Path | None) -> dict[str, Any]:
    """The result of :func:`.stacks.result_of`, in ``script`` or in a temporary directory."""
    from . import stacks

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if script is None else script
        folder.mkdir(parents=True, exist_ok=True)
        _progress("one process")
        problem = local_ranks.run(1, folder, partial(stacks.write_files, one, folder))
        if problem is not None:
            return {"ok": False, "error": f"one process: {problem}"}
        _progress(f"{one.ranks} processes, {local_ranks.mesh_text(one.job.sizes)}, {one.stack}")
        result = stacks.result_of(one, folder)
    if script is not None:
        _progress(f"repeat it: torchrun --nproc_per_node {one.ranks} {script / 'run.py'}")
    return result


def _progress(line: str) -> None:
    typer.secho(f"  {line} ...", dim=True, err=True)


def _finite(result: Any) -> Any:
    """``result`` with null for infinity, which JSON does not have."""
    if isinstance(result, dict):
        return {name: _finite(value) for name, value in result.items()}
    return None if isinstance(result, float) and not math.isfinite(result) else result


def _show(result: dict[str, Any], worst: int) -> None:
    """Print the result as a table of at most 80 columns (wider in a wider terminal)."""
    console = eighty_columns()
    mesh, asked = local_ranks.mesh_text(result["mesh"]), local_ranks.mesh_text(result["asked"])
    what = f"{result['model']} ({result['class']}, a small copy) on {mesh}"
    console.print(what + (f" instead of {asked}" if mesh != asked else ""), style="bold")
    for note in result["notes"]:
        console.print(f"note: {note}")
    if "error" in result:
        console.print(f"✗ {result['error']}", style="red", markup=False)
        return
    errors = result["errors"]
    table = table_of("Loss, and the worst gradients", "parameter", right=("one process", "error"))
    table.add_row("loss", f"{result['reference_loss']:.6f}", f"{result['loss_error']:.0e}")
    for name in sorted(errors, key=lambda name: -errors[name])[:worst]:
        table.add_row(name, f"{result['norms'][name]:.3e}", f"{errors[name]:.0e}")
    console.print(table)
    source = f"Plan: {result['origin'] or 'none'}" if result["stack"] is None else f"By {result['stack']}"
    console.print(
        f"{source}. {len(errors)} gradients compared. Relative errors; of a gradient up to "
        f"{result['bound']:.0e}, of the loss up to {result['loss_bound']:.0e} are rounding."
    )
    if result["ok"]:
        console.print("✓ loss and gradients are those of one process", style="green")
    else:
        console.print(f"✗ {_failure(result)}", style="red", markup=False)


def _failure(result: dict[str, Any]) -> str:
    name, errors = result["where"], result["errors"]
    if result["one_side"]:
        return f"{name}."
    wrong = sum(error >= result["bound"] for error in errors.values())
    if wrong:
        return (
            f"{name}: its gradient is off by {errors[name]:.0e} of its norm, the worst of {wrong} of {len(errors)} "
            f"that are off.{'' if result['stack'] else ' Correct the plan or the strategy.'}"
        )
    return f"the loss is {result['loss']:.6f}, and {result['reference_loss']:.6f} in one process."
