"""``hf-automodel-parallel plan``: what a model costs on a mesh, before there is a GPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from . import model_options as options
from .model_options import File, Text
from .tables import eighty_columns, table_of

if TYPE_CHECKING:
    from ..planner.explanation import Explanation

EPILOG = (
    "Examples:\n\n  hf-automodel-parallel plan path/to/model --tp 2 --no-step\n\n"
    "  hf-automodel-parallel plan llama-3.1-405b --tp 8 --dp-shard 128 --sequence-parallel --seq 8192 "
    "--interconnect h100-infiniband\n\n"
    "  hf-automodel-parallel plan config.json --tp 4 --lora r=16,targets=all-linear --checkpointing full --json\n\n"
    "  hf-automodel-parallel plan path/to/model --config_file accelerate.yaml --gpu-memory 80GiB\n\n"
    "  hf-automodel-parallel plan gemma3-27b --tp 4 --dp-shard 8 --gpu-memory 80GiB --html report.html "
    "--html-grid 'tp=1,2,4,8 seq=4096,8192'"
)


#: Parameters of ``plan`` that say something of a step only -> the option's name.
_OF_A_STEP = {
    "batch": "--batch",
    "sequence": "--seq",
    "gpu_memory": "--gpu-memory",
    "interconnect": "--interconnect",
    "per_node": "--per-node",
    "modes": "--modes",
    "every_layer": "--every-layer",
}


@options.quiet
def plan(
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
    dtype: options.Dtype = "bf16",
    mixed_precision: options.Mixed = None,
    optimizer: options.Optimizer = "adamw",
    batch: options.Batch = 1,
    sequence: options.Sequence = 4096,
    gpu_memory: Annotated[Text, typer.Option(help="Memory of a GPU, such as 80GiB, for the warnings.")] = None,
    interconnect: Annotated[
        Text, typer.Option(help="Estimate communication time: a name of interconnects.yaml, or FILE.yaml:NAME.")
    ] = None,
    per_node: options.PerNode = None,
    modes: Annotated[
        bool, typer.Option("--modes/--no-modes", help="Also measure the other modes of activation checkpointing.")
    ] = True,
    every_layer: Annotated[bool, typer.Option("--every-layer", help="Run all layers instead of a few.")] = False,
    step: Annotated[bool, typer.Option("--step/--no-step", help="Run a step; without it only the placements.")] = True,
    imports: options.Imports = None,
    as_json: options.AsJson = False,
    html: Annotated[
        File, typer.Option(help="Also write a page with figures and sliders, one file, to this path.")
    ] = None,
    html_grid: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="What the page's sliders offer, each measured: 'tp=1,2,4,8 seq=4096,8192 checkpointing=none,full'. "
            "Without it half and twice the tp, and twice the tokens."
        ),
    ] = None,
) -> None:
    """Show what a model costs on a mesh: placements and their source, memory per rank, collectives per step.

    The numbers come from Accelerator.prepare and one training step, on simulated ranks and tensors without memory. No
    GPU, no weights, no network.
    """
    from ..core.options import CHECKPOINTING_MODES
    from ..errors import ConfigError
    from ..planner.explain import explain, without_effect
    from ..planner.grid import parse_grid
    from ..planner.models import lora_of
    from ..planner.page import write_page
    from ..planner.sizes import bytes_of

    with options.one_line_errors():
        if not step:
            without_effect("--no-step", [_OF_A_STEP[name] for name in _OF_A_STEP if options.was_given(context, name)])
        fields, environment, precision, ranks = options.config_values(context)
        given: dict[str, Any] = dict(
            world_size=ranks,
            batch=batch,
            sequence=sequence,
            dtype=dtype,
            mixed_precision=mixed_precision or precision,
            optimizer=optimizer,
            lora=lora_of(lora) if lora else None,
            checkpointing=CHECKPOINTING_MODES if modes and step else (),
            interconnect=interconnect,
            gpus_per_node=per_node,
            gpu_memory=bytes_of(gpu_memory) if gpu_memory else None,
            environment=environment,
            every_layer=every_layer,
            step=step,
            imports=imports or (),
            progress=lambda line: typer.secho(f"  {line}: done", dim=True, err=True),
        )
        if html is None and html_grid:
            raise ConfigError("--html-grid: these points are for the page; add --html report.html.")
        if html is None:
            found = explain(model, fields, **given)
        else:
            found = write_page(html, model, fields, parse_grid(html_grid or ()), **given)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    show(found)


def show(found: Explanation) -> None:
    """Print an explanation as tables of at most 80 columns (wider in a wider terminal)."""
    console = eighty_columns()
    about = found.about
    mesh = ", ".join(f"{axis}={size}" for axis, size in found.sizes.items() if size > 1) or "one rank"
    console.print(f"{about['model']} on {about['world_size']:,} ranks ({mesh})", style="bold")
    if found.rows:
        table = table_of(f"Plan: {found.origin}", "module or parameter", "style", "#", "weight on tp", "source")
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
    for note in found.notes:
        console.print(f"note: {note}")
    for entry in found.unmatched:
        console.print(f"not used by this config: {entry}")
    console.print(
        f"{found.parameters:,} parameters, {found.trainable:,} trained; tp replicates {found.replicated_over_tp:,}."
    )
    if found.memory:
        _show_step(found, console)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow")


_ROWS = {
    "parameters": "parameters (this rank's shards)",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "gathered": "unsharded FSDP units, most at a time",
    "activations": "activations kept for backward",
    "logits": "logits",
    "buffers": "buffers",
}


def _show_step(found: Explanation, console: Any) -> None:
    from ..core.output import size_text

    about = found.about
    tokens = f"{about['batch']} x {about['sequence']:,} tokens"
    table = table_of(
        f"Memory per rank, {about['dtype']}, {about['optimizer']}, {tokens}", "what", right=("bytes", "size")
    )
    for name, text in _ROWS.items():
        table.add_row(text, f"{found.memory[name]:,}", size_text(found.memory[name]))
    phase = max(found.peaks, key=lambda name: found.peaks[name])
    table.add_row(f"peak, in {phase}", f"{found.memory['peak']:,}", size_text(found.memory["peak"]), style="bold")
    console.print(table)
    if len(found.by_checkpointing) > 1:
        table = table_of("By activation checkpointing", "mode", right=("activations", "peak"))
        for mode, its in found.by_checkpointing.items():
            table.add_row(mode, size_text(its["activations"]), size_text(its["peak"]))
        console.print(table)
    if found.collectives:
        table = table_of("Collectives of a step, per rank", "collective", "axis", right=("calls", "tensors", "sent"))
        for row in found.collectives:
            table.add_row(
                row["kind"],
                row["axis"],
                f"{row['count']:,}",
                size_text(row["tensor_bytes"]),
                size_text(row["sent_bytes"]),
            )
        console.print(table)
    if found.seconds:
        times = ", ".join(f"{axis} {seconds:.3g} s" for axis, seconds in found.seconds.items())
        console.print(
            f"Estimate, {about['interconnect']}: communication takes at least {sum(found.seconds.values()):.3g} s of a "
            f"step if nothing overlaps ({times}): bytes over bandwidth, without latency."
        )
