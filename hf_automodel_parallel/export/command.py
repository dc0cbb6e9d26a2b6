"""``hf-automodel-parallel export``: a model or adapter directory from a training checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import AutoParallelError

EPILOG = (
    "Examples:\n\n  hf-automodel-parallel export out/checkpoint-500 my-model\n\n"
    "  hf-automodel-parallel export state-dir my-model --config meta-llama-config/ --dtype bfloat16 --max-shard-size "
    "5GB\n\n  hf-automodel-parallel export out/checkpoint-500 my-adapter\n\n"
    "  hf-automodel-parallel export out/checkpoint-500 merged --merge --base path/to/base-model"
)


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A Trainer's checkpoint-N, or a directory of accelerator.save_state (sharded or full)."),
    ],
    out: Annotated[Path, typer.Argument(help="The directory to make.")],
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Directory with config.json (of a model) or adapter_config.json, if the checkpoint has none."
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into the weights of its base model.")
    ] = False,
    base: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Directory of the base model for --merge; not needed if the checkpoint holds its weights."),
    ] = None,
    adapter: Annotated[str, typer.Option(help="Name of the adapter, if there are several.")] = "default",
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the weights in the files: float32, bfloat16, float16. Default: as in the checkpoint."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one file, such as 5GB.")] = "50GB",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is not empty.")] = False,
) -> None:
    """Turn a training checkpoint into a model or adapter directory: without GPUs, in one process, tensor by tensor.

    The checkpoint may come from any number of processes and any mesh. No code in it is run: its pickled files are read
    by an unpickler that knows tensors and numbers only. OUT appears when it is complete.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from .convert import Request
    from .convert import export as convert

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        request = Request(checkpoint, out, config, base, merge, adapter, _dtype(dtype), _size(max_shard_size), force)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("reading", total=None)

            def show(name: str, size: int, total: int) -> None:
                bar.update(task, advance=size, total=total, description=name[-40:])

            summary = convert(request, show)
    except (AutoParallelError, OSError, ValueError) as error:
        typer.secho(f"hf-automodel-parallel: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{out}: {summary.kind}, {summary.tensors} tensors, {summary.bytes:,} bytes")


def _dtype(name: str | None):  # type: ignore[no-untyped-def]
    import torch

    from ..errors import ConfigError

    if name is None:
        return None
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name)
    if short not in ("float32", "bfloat16", "float16", "float64"):
        raise ConfigError(f"--dtype {name}: give float32, bfloat16, float16 or float64.")
    return getattr(torch, short)


def _size(text: str) -> int:
    from ..errors import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--max-shard-size {text}: give a number of bytes, or a size such as 500MB or 5GB.")
    return int(float(match[1]) * 1000 ** ["B", "KB", "MB", "GB", "TB"].index((match[2] or "B").upper()))
