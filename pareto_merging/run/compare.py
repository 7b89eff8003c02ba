"""``pareto-merging compare``: methods on a configuration's models, kept in a folder."""

import contextlib
import difflib
import json
import sys
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
from pareto_merging.system.devices import one_thread
from pareto_merging.system.environment import environment
from pareto_merging.system.files import write_json, write_text

SETTINGS_NAME = "settings.json"


def chosen_methods(text: str | None, tasks: int) -> list[str]:
    """Return the methods of ``--methods``, each once, in order. It has names, ``all``, and ``-name`` to leave one out.

    None: all, beyond two tasks without the one that needs a run for each preference. UserError for other names.
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

    ``methods``: see :func:`chosen_methods`. ``effort``, ``grid``: see :class:`Comparison`. ``seeds``: how many, from
    the configuration's on. UserError: a mistake in any of them or in a file. Interrupted: Ctrl-C.
    """
    folder = Path(folder)
    workspace = Workspace(config, suite_folder)
    names = workspace.task_names
    wanted = chosen_methods(methods, len(names))
    grid = default_grid(len(names)) if grid is None else grid
    with user_errors():
        evaluated_preferences(names, grid)
        if config.method.gamma is not None:
            check_preference(config.method.gamma, names, per_item=False)
    if config.method.seed + seeds > 2**63:
        raise UserError(f"seeds: expected fewer from {config.method.seed} on, got {seeds}")
    settings = _checked_settings(workspace, folder, resume, {"effort": effort, "preferences": grid})
    # the suite's matrices are too small for a second thread
    threads = one_thread() if config.suite is not None else contextlib.nullcontext()
    with locked(folder), threads:
        write_text(folder / CONFIG_NAME, dump_config(config))
        write_json(folder / SETTINGS_NAME, settings)
        all_seeds = range(config.method.seed, config.method.seed + seeds)
        on_done = _tell if progress else None
        compare(
            workspace, folder, wanted, seeds=all_seeds, effort=effort, grid=grid, progress=progress, on_done=on_done
        )
        about = {
            "config": config.model_dump(mode="json", exclude_none=True),
            "settings": {"effort": effort, "preferences": grid, "seeds": seeds, "methods": wanted},
            "environment": environment(),
        }
        # with --resume perhaps more than what was asked for now
        return write_comparison(folder, names, stored_results(folder, wanted), about)


def _checked_settings(workspace: Workspace, folder: Path, resume: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings and what the files are now. UserError unless the folder is new or of the same comparison.

    Whatever the comparison needs is opened before its folder is made: mistakes leave nothing behind.
    """
    path = folder / SETTINGS_NAME
    if not path.exists():
        check_new(folder)
    elif not resume:
        raise UserError(f"{folder}: expected a new folder, got a comparison that can go on with --resume")
    else:
        check_same(workspace.config, folder)
    workspace.check_files()
    workspace.evaluation_tasks()
    workspace.available_merging_tasks()
    workspace.training_tasks()
    workspace.unseen_tasks()
    settings = {**settings, "files": workspace.fingerprint()}
    if not path.exists():
        return settings
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected the settings of a comparison, got {error}") from error
    changed = sorted(differences(before, json.loads(json.dumps(settings))))
    if changed:
        what = f"expected what the comparison was started with, but {', '.join(changed)} differs"
        raise UserError(f"{folder}: {what} (for other settings choose a new folder)")
    return settings


def _tell(result: Result, done: int, total: int, left: float | None) -> None:
    if isinstance(result, Measured):
        # a method that runs once for each preference does so after its tuning
        what = f"{max(result.tuning_seconds, result.seconds):.1f} s"
        if (equal := result.point("equal")) is not None:
            what = f"average {sum(equal.accuracy) / len(equal.accuracy):.1f} % at the equal preference; {what}"
    else:
        what = f"{result.status}: {result.reason}"
    time_left = f"; about {_duration(left)} left" if left is not None and left >= 1 else ""
    print(f"[{done}/{total}] {result.title}: {what}{time_left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100 * 60:
        return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
