"""``hf-automodel-parallel``: a module for each command; a command imports inside its function: ``--help`` is quick."""

from __future__ import annotations

import typer

from ..export import command as export_command
from . import options, plan

app = typer.Typer(
    help="Tensor parallelism and FSDP2 for any Hugging Face model, inside Accelerate and Trainer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback()
def _root() -> None:
    """Keep subcommands even while there is only one."""


app.command("plan", epilog=plan.EPILOG)(plan.plan)
app.command("options")(options.options)
app.command("export", epilog=export_command.EPILOG)(export_command.export)
