"""Tables on the terminal. Nothing is cut off; what goes into a file or pipe is as wide as it needs to be."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPE_WIDTH = 240


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """Print to standard output; columns are right-aligned but for those in ``left``, long cells fold."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    table = Table(title=escape(title), title_justify="left")
    for number, name in enumerate(head):
        table.add_column(escape(name), justify="left" if number in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
