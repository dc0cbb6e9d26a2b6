"""``python -m hf_automodel_parallel``: the command-line tool."""

from .cli import app

app(prog_name="hf-automodel-parallel")
