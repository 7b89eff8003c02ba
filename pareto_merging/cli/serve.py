"""``pareto-merging serve``."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pareto_merging.cli.options import Quiet, tell, warn
from pareto_merging.errors import UserError
from pareto_merging.serving.limits import Limits, make_limits


def _with_limits(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of the server's limits. They replace ``**limits``; ``quiet`` stays last."""
    *own, quiet, _ = inspect.signature(command, eval_str=True).parameters.values()
    options = []
    for name, limit in Limits.model_fields.items():
        text = str(limit.description)
        option = typer.Option(help=f"{text[0].upper()}{text[1:]}.", rich_help_panel="Limits")
        is_list = isinstance(limit.default, tuple)
        kind, default = (str, ",".join(limit.default)) if is_list else (limit.annotation, limit.default)
        annotation = Annotated[kind, option]  # type: ignore[valid-type]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    signature = inspect.Signature([*own, *options, quiet.replace(kind=inspect.Parameter.KEYWORD_ONLY)])
    command.__signature__ = signature  # type: ignore[attr-defined]
    return command


@_with_limits
def serve(
    folded: Annotated[
        Path, typer.Argument(metavar="FOLDED", help="A folded file: `pareto-merging export RUN --folded` writes one.")
    ],
    host: Annotated[
        str, typer.Option(help="The address to bind. There is no authentication: leave it, or put a proxy in front.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to bind; 0 takes a free one.")] = 8000,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64. Default: what the file holds.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads of the model. Default: PyTorch's.")
    ] = None,
    keep_merged: Annotated[
        bool,
        typer.Option(
            "--keep-merged/--no-keep-merged",
            help="Keep merged weights for a preference that comes again: as fast as the plain model, for a third of a "
            "ViT more in memory.",
        ),
    ] = True,
    quiet: Quiet = False,
    **limits: Any,
) -> None:
    """Serve a folded model over HTTP: each request chooses its merged model by a preference.

    POST /classify and /embed take an image and a preference, as JSON or as a
    form; /docs tries them out in a browser, /model names tasks and limits,
    /health and /metrics (Prometheus) are for machines. Requests of different
    preferences are computed in one batch. SIGTERM or Ctrl-C answers what was
    accepted and exits.
    """
    checked = make_limits({**limits, "formats": tuple(limits["formats"].split(","))})
    try:
        from pareto_merging.serving.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pareto_merging":
            raise
        missing = f"expected the serve extra (pip install 'pareto-merging[serve]'), got no module named {error.name}"
        raise UserError(f"serve: {missing}") from error
    lost = run(
        folded,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        limits=checked,
        threads=threads,
        keep_merged=keep_merged,
        progress=not quiet,
        on_warning=warn,
    )
    if lost:
        tell(f"{lost} accepted requests were not answered within --shutdown {checked.shutdown}")
        raise typer.Exit(1)
