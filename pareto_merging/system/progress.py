"""Progress with the time left, as a bar on a terminal or plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance: TypeAlias = Callable[[int, str], None]

PLAIN_SECONDS = 10.0


@contextlib.contextmanager
def progress_bar(title: str, total: int, done: int = 0, enabled: bool = True) -> Iterator[Advance]:
    """Show progress: ``with progress_bar("training", 500) as advance: advance(1, "loss 0.31")``.

    Writes to standard error, so that standard output stays for results.
    """
    console = Console(stderr=True)
    if not enabled:
        yield lambda step, text: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(title, total=total, completed=done, text="")
            yield lambda step, text: progress.update(bar, completed=step, text=escape(text))
    else:
        yield _plain(title, total, done)


def _plain(title: str, total: int, done: int) -> Advance:
    start = last = time.monotonic()

    def advance(step: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS:
            last = now
            left = (now - start) / max(1, step - done) * (total - step)
            print(f"{title} {step}/{total}, {left:.0f} s left  {text}", file=sys.stderr, flush=True)

    return advance
