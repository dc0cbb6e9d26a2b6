"""``hf-automodel-parallel options``: the table of docs/options.md."""

from __future__ import annotations

import typer

_OPTIONS_TITLE = """\
# Options

Fields of `AutoParallelismConfig`, in every text form under the same names, besides the sizes of the mesh axes
(`dp_replicate`, `dp_shard`, `cp`, `tp`, each with or without `_size`). Printed by `hf-automodel-parallel options`; each
is declared in `hf_automodel_parallel/core/options.py`.
"""


def options() -> None:
    """Print the table of all options of AutoParallelismConfig, in Markdown (docs/options.md)."""
    from ..core.option_fields import markdown_table
    from ..core.options import OptionFields

    typer.echo(f"{_OPTIONS_TITLE}\n{markdown_table(OptionFields)}", nl=False)
