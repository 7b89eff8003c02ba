"""``pareto-merging compare``: methods on a configuration's models, kept in a folder."""

import contextlib
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pareto_merging.errors import UserError, user_errors
from pareto_merging.measure.comparison import EFFORT, compare, default_grid, evaluated_preferences
from pareto_merging.measure.reports import Report, write_comparison
from pareto_merging.measure.results import Measured, Result, stored_results
from pareto_merging.methods.registry import METHODS
from pareto_merging.preferences import check_preference
from pareto_merging.run.config import RunConfig, dump_config
from pareto_merging.run.folder import CONFIG_NAME, check_new, check_same, differences, locked
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.environment import environment
from pareto_merging.system.files import write_json, write_text
from pareto_merging.system.threads import one_thread

SETTINGS_NAME = "settings.json"


def chosen_methods(text: str | None, tasks: int) -> list[str]:
    """Return the methods of ``--methods``, each once, in order.

    The text has names, ``all``, and ``-name`` for one to leave out. None: all, beyond two tasks without the one that
    needs a run for each preference. Raises UserError for others.
    """
    if text is None:
        return [name for name, method in METHODS.items() if tasks <= 2 or not method.runs_per_preference]
    chosen: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name = part.removeprefix("-")
        if name not in METHODS and part != "all":
            close = ", ".join(difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4))
            near = f"; near: {close}" if close else f" (all: {', '.join(METHODS)})"
            raise UserError(f"methods: expected names of methods, got {part!r}{near}")
        if part == "all":
            chosen += METHODS
        elif part.startswith("-"):
            chosen = [other for other in chosen if other != name]
        else:
            chosen.append(name)
    if not chosen:
        raise UserError(f"methods: expected at least one of {', '.join(METHODS)}; got {text!r}")
    return list(dict.fromkeys(chosen))


def compare_run(
    config: RunConfig,
    folder: Path,
    *,
    methods: str | None = None,
    effort: int = EFFORT,
    seeds: int = 1,
    grid: str | None = None,
    resume: bool = False,
    progress: bool = True,
    suite_folder: Path | None = None,
) -> Report:
    """Compare methods on a configuration's models; write everything into ``folder`` and return its report.

    What is done is kept in a file for each method and seed. With ``resume`` only what is missing is run; methods and
    seeds may then be other ones and join those that are there, the rest must be what it was.

    Args:
        methods: see :func:`chosen_methods`. effort, grid: see :class:`Comparison`. seeds: how many, from the
            configuration's on.

    Raises:
        UserError: see :func:`start_run`, :class:`Workspace` and :func:`parse_preferences`. Interrupted: Ctrl-C.
    """
    folder = Path(folder)
    workspace = Workspace(config, suite_folder)
    names = workspace.task_names
    wanted = chosen_methods(methods, len(names))
    grid = default_grid(len(names)) if grid is None else grid
    _check_numbers(config, names, grid, seeds)
    _check_folder(config, folder, resume)
    _open(workspace)
    settings = {"effort": effort, "preferences": grid, "files": workspace.fingerprint()}
    if (folder / SETTINGS_NAME).exists():
        _check_settings(folder / SETTINGS_NAME, settings)
    # the suite's matrices are too small for a second thread
    threads = one_thread() if config.suite is not None else contextlib.nullcontext()
    with locked(folder), threads:
        write_text(folder / CONFIG_NAME, dump_config(config))
        write_json(folder / SETTINGS_NAME, settings)
        compare(
            workspace,
            folder,
            wanted,
            seeds=range(config.method.seed, config.method.seed + seeds),
            effort=effort,
            grid=grid,
            progress=progress,
            on_done=_tell if progress else None,
        )
        about = {
            "config": config.model_dump(mode="json", exclude_none=True),
            "settings": {"effort": effort, "preferences": grid, "seeds": seeds, "methods": wanted},
            "environment": environment(),
        }
        # with --resume perhaps more than what was asked for now
        return write_comparison(folder, names, stored_results(folder, wanted), about)


def _check_numbers(config: RunConfig, names: Sequence[str], grid: str, seeds: int) -> None:
    """Raise UserError for preferences or seeds that there cannot be."""
    with user_errors():
        evaluated_preferences(names, grid)
        if config.method.gamma is not None:
            check_preference(config.method.gamma, names, per_item=False)
    if config.method.seed + seeds > 2**63:
        raise UserError(f"seeds: expected fewer from {config.method.seed} on, got {seeds}")


def _check_folder(config: RunConfig, folder: Path, resume: bool) -> None:
    """Raise UserError unless the folder is new, or with ``resume`` of the same configuration."""
    is_comparison = (folder / SETTINGS_NAME).exists()
    if is_comparison and not resume:
        raise UserError(f"{folder}: expected a new folder, got a comparison that can go on with --resume")
    if is_comparison:
        check_same(config, folder)
    else:
        check_new(folder)


def _open(workspace: Workspace) -> None:
    """Open what a comparison needs before its folder is made: mistakes leave nothing behind."""
    workspace.check_files()
    workspace.evaluation_tasks()
    workspace.available_merging_tasks()
    workspace.training_tasks()
    workspace.unseen_tasks()


def _check_settings(path: Path, now: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected the settings of a comparison, got {error}") from error
    changed = sorted(differences(before, json.loads(json.dumps(now))))
    if changed:
        raise UserError(
            f"{path.parent}: expected what the comparison was started with, but {', '.join(changed)} differs (for "
            "other settings choose a new folder)"
        )


def _tell(result: Result, done: int, total: int, left: float | None) -> None:
    if isinstance(result, Measured):
        # a method that runs once for each preference does so after its tuning
        what = f"{max(result.tuning.seconds if result.tuning else 0.0, result.seconds):.1f} s"
        equal = result.point("equal")
        if equal is not None:
            what = f"average {sum(equal.accuracy) / len(equal.accuracy):.1f} % at the equal preference; {what}"
    else:
        what = f"{result.status}: {result.reason}"
    time_left = f"; about {_duration(left)} left" if left is not None and left >= 1 else ""
    print(f"[{done}/{total}] {result.title}: {what}{time_left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
