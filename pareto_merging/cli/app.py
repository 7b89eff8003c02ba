"""The command line's commands and exit codes. A mistake is one line and exit code 2."""

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from pareto_merging.cli.compare import compare
from pareto_merging.cli.convert import convert
from pareto_merging.cli.demo import demo
from pareto_merging.cli.evaluate import evaluate
from pareto_merging.cli.export import export
from pareto_merging.cli.options import Stopped, tell
from pareto_merging.cli.plan import plan
from pareto_merging.cli.serve import serve
from pareto_merging.cli.train import Train, train
from pareto_merging.errors import Interrupted, TrainingError, UserError
from pareto_merging.methods import FILES

app = typer.Typer(
    name="pareto-merging",
    help=(
        "Merge K fine-tuned models into one Pareto set: learned once, without labels, it gives the best merged model "
        "for any preference.\n\nStart with `pareto-merging demo`; then write a CONFIG.yaml, look at `plan`, and run "
        "`train`, `evaluate`, `export`; `compare` says which of the merging methods suits your models."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (demo, train, evaluate, compare, convert, export, plan, serve):
    epilog = f"Methods: {', '.join(FILES)}." if command is compare else None
    app.command(cls=Train if command is train else None, epilog=epilog)(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. 0; 1 (training or a compared method failed); 2 (a mistake); 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show γ shows a question mark
            stream.reconfigure(errors="replace")
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="pareto-merging", standalone_mode=False)
        if code == 130:
            tell("interrupted before there was anything to keep")
        sys.exit(code if isinstance(code, int) else 0)
    except (Stopped, Interrupted) as stop:
        tell(f"{stop}; nothing was kept" if isinstance(stop, Interrupted) else str(stop))
        sys.exit(130)
    except (KeyboardInterrupt, typer.Abort):
        tell("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output has gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (TrainingError, UserError, OSError) as error:
        tell(" ".join(str(error).split()))
        sys.exit(1 if isinstance(error, TrainingError) else 2)
    except (MemoryError, RuntimeError) as error:
        # torch says it is out of memory in a RuntimeError, on the CPU only by its text
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        tell("out of memory; `pareto-merging plan` counts what a run needs")
        sys.exit(1)
    except Exception as error:
        # typer's own usage errors; its exception classes are not public
        if not hasattr(error, "format_message"):
            raise
        text = error.format_message()
        if text:
            tell(f"{text} (see --help)")
        sys.exit(getattr(error, "exit_code", 2))
