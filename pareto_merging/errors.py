"""Errors whose message is for the user. The command line prints it on one line and exits, without a traceback."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user gave is wrong: names it, what was expected and what came. Exit code 2.

    Always one line that a terminal shows as it is, whatever a file's names hold.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(str(message).split())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


class TrainingError(RuntimeError):
    """Training stopped on a NaN or inf; names the task, the step and the layer. Exit code 1.

    ``task`` is None where a parameter is not finite, ``layer`` the module or parameter first found so; steps count from
    1.
    """

    def __init__(self, message: str, task: str | None, step: int, layer: str) -> None:
        super().__init__(message)
        self.task, self.step, self.layer = task, step, layer


class Interrupted(RuntimeError):
    """Training was asked to stop (Ctrl-C) after ``step`` steps; the state is saved. Exit code 130."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@contextlib.contextmanager
def user_errors(what: str = "") -> Iterator[None]:
    """Make values that a library function refuses the user's mistake. Its message is one line, without a traceback."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error
