"""``pareto-merging train``."""

import shlex
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.markup import escape
from typer.core import TyperCommand

from pareto_merging.cli.options import ConfigFile, OutFolder, Quiet, Stopped, warn


def train(
    config: ConfigFile,
    out: OutFolder,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in that folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Learn the Pareto set that CONFIG.yaml describes.

    Ctrl-C stops after the step in hand; the same command with --resume runs
    the remaining steps and gives the bits an uninterrupted run would have
    given.
    """
    from pareto_merging.errors import Interrupted
    from pareto_merging.run.config import read_config
    from pareto_merging.run.folder import SET_NAME
    from pareto_merging.run.train import describe_precision, train_run

    settings = read_config(config)
    try:
        model, result = train_run(settings, out, resume=resume, progress=not quiet, on_warning=warn)
    except Interrupted as stop:
        again = shlex.join(["pareto-merging", "train", str(config), "--out", str(out), "--resume"])
        raise Stopped(f"{stop}; go on with: {again}") from stop
    tasks = settings.tasks.values() if isinstance(settings.tasks, dict) else ()
    has_images = settings.suite is not None or any(task.evaluation is not None for task in tasks)
    after = f"evaluate {shlex.quote(str(out))}" if has_images else f"export {shlex.quote(str(out))} --preference equal"
    print(describe_precision(model))
    done = f"{result.steps} steps" + (f", {result.resumed_from} of them before" if result.resumed_from else "")
    print(f"{out / SET_NAME}: learned in {done}; {result.seconds:.1f} s. Next: pareto-merging {after}")


class Train(TyperCommand):
    """The command, whose help ends in the keys of CONFIG.yaml, listed when asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        self.epilog = "\n\n".join(map(escape, _keys()))
        super().format_help(ctx, formatter)


def _keys() -> Iterator[str]:
    """Yield every key of CONFIG.yaml with its meaning, choices and default."""
    from pareto_merging.learn.settings import MethodSettings, OneOf
    from pareto_merging.run.config import EncoderConfig, RunConfig, TaskConfig

    groups: dict[str, Any] = {
        "Keys of CONFIG.yaml": RunConfig,
        "Keys of `encoder:`": EncoderConfig,
        "Keys of each task under `tasks:`": TaskConfig,
        "Keys of `method:`, all optional": MethodSettings,
    }
    for title, group in groups.items():
        yield f"{title}."
        for name, field in group.model_fields.items():
            if field.description is None:
                continue
            choices = [str(value) for value in get_args(field.annotation) if get_origin(field.annotation) is Literal]
            choices += [name for one in field.metadata if isinstance(one, OneOf) for name in one.table]
            default = "" if field.default is None else f" (default {field.default})"
            default = " (required)" if field.is_required() else default
            one_of = f" [{', '.join(choices)}]" if choices else ""
            yield f"{name}: {field.description}{one_of}{default}"
