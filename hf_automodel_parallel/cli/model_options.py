"""Options that plan, suggest and verify share: the mesh, the model, what a step is, and a config file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import AutoParallelError, first_line

# typer reads annotations at run time, where Python 3.10 needs Optional.
Text = Optional[str]  # noqa: UP045
Count = Optional[int]  # noqa: UP045
File = Optional[Path]  # noqa: UP045

Model = Annotated[
    str,
    typer.Argument(
        help="A model directory, its config.json, a cached hub id, or a shipped geometry such as llama-3.1-405b. "
        "Weights are not read."
    ),
]
Tp = Annotated[Count, typer.Option(help="Ranks of the tp axis; 2 if no size, number of ranks or file is given.", min=1)]
DpShard = Annotated[Count, typer.Option(help="Ranks over which FSDP2 shards.", min=1)]
DpReplicate = Annotated[Count, typer.Option(help="Replicas of those (HSDP).", min=1)]
Cp = Annotated[Count, typer.Option(help="Ranks that share a sequence.", min=1)]
World = Annotated[Count, typer.Option(help="Number of ranks, from which a size left out is inferred.", min=1)]
ConfigFile = Annotated[
    File, typer.Option("--config_file", "--config-file", help="A config of this package or of Accelerate.")
]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", help="Another field of AutoParallelismConfig: name=value. Repeatable."),
]
TpPlan = Annotated[Text, typer.Option(help="A named plan or the import path of a plan, instead of the model's own.")]
PlanOrder = Annotated[Text, typer.Option(help="Sources to try, in order, such as hf+registry.")]
SequenceParallel = Annotated[
    bool, typer.Option("--sequence-parallel", help="Shard activations between blocks along the sequence.")
]
PerNode = Annotated[Count, typer.Option(help="GPUs of a node; without it the interconnect's, or 8.", min=1)]
Checkpointing = Annotated[Text, typer.Option(help="Activation checkpointing: none, full, submodule or selective.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Lora = Annotated[
    Text, typer.Option(help="Wrap with LoRA first: 'r=16,targets=all-linear', or modules separated by commas.")
]
Dtype = Annotated[str, typer.Option(help="Dtype of the parameters: bf16, fp16 or fp32.")]
Batch = Annotated[int, typer.Option(help="Rows of each data-parallel rank.", min=1)]
Sequence = Annotated[int, typer.Option("--seq", help="Tokens of a row, of all cp ranks together.", min=1)]
Optimizer = Annotated[str, typer.Option(help="A class of torch.optim, in any case.")]
Mixed = Annotated[Text, typer.Option(help="As for Accelerator: no, bf16 or fp16.")]
Imports = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--import", help="A module to import first, such as one that registers an architecture. Repeatable."),
]


@contextmanager
def one_line_errors(code: int = 1) -> Iterator[None]:
    """An error of the package, a file that cannot be read, or a module that is not there, is one line and ``code``."""
    try:
        yield
    except (AutoParallelError, ImportError, OSError, ValueError) as error:
        text = error if isinstance(error, AutoParallelError) else first_line(error)
        typer.secho(f"hf-automodel-parallel: {text}", fg="red", err=True)
        raise typer.Exit(code) from error


#: Parameters of a command -> the field of ``AutoParallelismConfig`` that each is.
_FIELDS = {
    "tp": "tp_size",
    "dp_shard": "dp_shard_size",
    "dp_replicate": "dp_replicate_size",
    "cp": "cp_size",
    "tp_plan": "tp_plan",
    "plan_order": "plan_order",
    "sequence_parallel": "sequence_parallel",
    "checkpointing": "activation_checkpointing",
}


def config_values(context: typer.Context) -> tuple[dict[str, Any], dict[str, str], str, int | None]:
    """Fields of ``AutoParallelismConfig`` by the options of the mesh, ``--set`` and ``--config_file``.

    What is given as an option wins over ``--set``, and that over the file. tp is 2 where nothing gives a size or the
    number of ranks.

    Returns:
        (fields, the file's ``FSDP_*`` variables, its mixed_precision, number of ranks or None).
    """
    from ..accelerate_plugin.config_text import parallelism_section, parse_pairs, read_file
    from ..core.mesh import AXES

    fields: dict[str, Any] = {}
    environment: dict[str, str] = {}
    precision, world = "no", None
    config_file: Path | None = context.params["config_file"]
    if config_file is not None:
        values = read_file(config_file)
        fields = {(f"{k}_size" if k in AXES else k): v for k, v in parallelism_section(values).items()}
        precision = str(values.get("mixed_precision") or "no")
        world = values.get("num_processes")
        for name, value in (values.get("fsdp_config") or {}).items():
            environment[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    for text in context.params["settings"] or []:
        fields |= {(f"{k}_size" if k in AXES else k): v for k, v in parse_pairs(text).items()}
    for name, field in _FIELDS.items():
        if (value := context.params[name]) not in (None, False):
            fields[field] = value
    world = context.params["world"] or world
    if world is None and not any(f"{axis}_size" in fields for axis in AXES):
        fields["tp_size"] = 2
    return fields, environment, precision, world


def was_given(context: typer.Context, name: str) -> bool:
    """True if the parameter ``name`` of the command stands on the command line: not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """The command without the log lines and warnings of libraries, unless the environment asks for all details."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import logging
        import warnings

        from ..core.output import DETAILS, verbosity

        with one_line_errors():
            level = verbosity(None)
        if level == DETAILS:
            return function(*args, **kwargs)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            return function(*args, **kwargs)
        finally:
            logging.disable(logging.NOTSET)

    return call
