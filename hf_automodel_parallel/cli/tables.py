"""Tables of commands: 80 columns, wider in a wider terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

# rich is imported inside, because it draws random numbers on import, which would change the random state of a training.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def eighty_columns() -> Console:
    """A console of the terminal's width; of 80 columns where there is none."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=80, highlight=False)


def table_of(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table; numbers stand in the columns ``right``, the last ones."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", expand=bool(len(columns) > 3))
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name == "#" else "left")
    for name in right:
        table.add_column(name, justify="right")
    return table
