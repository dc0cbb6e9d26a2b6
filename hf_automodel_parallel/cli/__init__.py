"""``hf-automodel-parallel``: a module for each command; a command imports inside its function: ``--help`` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from ..export import command as export_command
from ..version import __version__
from . import config, env, options, plan, selftest, suggest, verify

app = typer.Typer(
    help="Tensor parallelism and FSDP2 for any Hugging Face model, inside Accelerate and Trainer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-automodel-parallel {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Keep subcommands even while there is only one."""


app.command("plan", epilog=plan.EPILOG)(plan.plan)
app.command("suggest", epilog=suggest.EPILOG)(suggest.suggest)
app.command("verify", epilog=verify.EPILOG)(verify.verify)
app.command("config", epilog=config.EPILOG)(config.config)
app.command("env")(env.env)
app.command("selftest", epilog=selftest.EPILOG)(selftest.selftest)
app.command("options")(options.options)
app.command("export", epilog=export_command.EPILOG)(export_command.export)
