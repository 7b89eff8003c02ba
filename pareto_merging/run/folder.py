"""A run folder: what is in it, how it is started, resumed and opened again.

config.yaml            the configuration, every default written out, paths absolute
log.jsonl              one line per step and event; "weights" says how they are stored and what rounding costs
checkpoint.safetensors what --resume goes on from
pareto_set.safetensors the result
evaluation.*           what `evaluate` measured last, and its pictures

A comparison's folder has config.yaml too, settings.json, a file for each method and seed, and the tables and pictures.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pareto_merging.errors import UserError, user_errors
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME
from pareto_merging.learn.log import LOG_NAME
from pareto_merging.learn.loop import TrainingResult, learn_pareto_set
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.measure.comparison import EFFORT, compare, default_grid, evaluated_preferences, stored_results
from pareto_merging.measure.reports import write_comparison
from pareto_merging.methods.registry import METHODS
from pareto_merging.model.files import load_pareto_set, save_pareto_set
from pareto_merging.model.state import pareto_state
from pareto_merging.model.stored import percent, summarize_dtypes
from pareto_merging.model.strategy import set_strategy
from pareto_merging.preferences import check_preference
from pareto_merging.run.config import RunConfig, dump_config, read_config
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.environment import environment
from pareto_merging.system.files import write_json, write_text
from pareto_merging.system.threads import one_thread

CONFIG_NAME, SET_NAME, LOCK_NAME = "config.yaml", "pareto_set.safetensors", ".lock"
SETTINGS_NAME = "settings.json"


def check_new(path: Path) -> None:
    """UserError if there is something at ``path`` already (an empty folder is nothing), or a file on the way to it."""
    for parent in path.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{path}: expected a folder at {parent}, got a file")
    if path.exists() and not (path.is_dir() and all(entry.name == LOCK_NAME for entry in path.iterdir())):
        kind = "folder" if path.is_dir() else "file"
        raise UserError(f"{path}: expected a new path, got an existing {kind}")


def start_run(config: RunConfig, folder: Path, resume: bool) -> None:
    """Check that the folder is new, or with ``resume`` that it was started with the same configuration.

    Raises:
        UserError: it exists, or does not, or its configuration differs (the keys are named).
    """
    if not resume:
        if (folder / SET_NAME).exists():
            raise UserError(f"{folder}: expected a new folder, got a finished run")
        if (folder / CHECKPOINT_NAME).exists():
            raise UserError(f"{folder}: expected a new folder, got a run that can go on with --resume")
        check_new(folder)
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a run to resume, got no such folder")
    if not (folder / CONFIG_NAME).exists():
        check_new(folder)
        return
    _check_same(config, folder)


def _check_same(config: RunConfig, folder: Path) -> None:
    before, now = (_what_counts(c.model_dump()) for c in (read_config(folder / CONFIG_NAME), config))
    changed = sorted(_differences(before, now))
    if changed:
        raise UserError(
            f"{folder}: expected the configuration it was started with, but {', '.join(changed)} differs "
            "(for another configuration choose a new folder, or delete this one)"
        )


def _what_counts(config: dict[str, Any]) -> dict[str, Any]:
    """Without the settings that change nothing about the result but its rounding, and with the order of the tasks."""
    nothing = ("workers", "device", "strategy", "memory_budget", "cuda_graphs", "tasks_at_once")
    kept = {key: value for key, value in config.items() if key not in nothing}
    kept["method"] = {key: value for key, value in config["method"].items() if key != "checkpoint_every"}
    kept["order of tasks"] = list(config["tasks"] or ())
    return kept


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            found
            for key in keys
            for found in _differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == now else [prefix]


def train_run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    on_warning: Callable[[str], None] | None = None,
    suite_folder: Path | None = None,
) -> tuple[nn.Module, TrainingResult]:
    """Learn the Pareto set a configuration describes and write it into ``folder``.

    Everything the run needs is opened before the folder is made, so that a mistake leaves nothing behind.

    Raises:
        UserError: see :func:`start_run` and :class:`Workspace`. TrainingError, Interrupted: see
        :func:`learn_pareto_set`.
    """
    folder = Path(folder)
    start_run(config, folder, resume)
    workspace = Workspace(config, suite_folder)
    workspace.check_files()
    if workspace.assumption and on_warning is not None:
        on_warning(workspace.assumption)
    if any(task.evaluation is not None for task in workspace.task_configs.values()):
        # folders that do not fit are said now, and not when it is learned
        workspace.evaluation_tasks()
    needs = OBJECTIVES[config.method.objective].needs
    tasks = workspace.merging_tasks() if needs == "images" else None
    model = workspace.pareto_model()
    _check_task_vectors(model, on_warning)
    is_new = not (folder / CONFIG_NAME).exists()
    with _locked(folder):
        try:
            # on a resume too: how it is computed may differ from the first part
            write_text(folder / CONFIG_NAME, dump_config(config))
            with user_errors():
                result = learn_pareto_set(
                    model,
                    tasks,
                    config.method,
                    folder=folder,
                    resume=resume,
                    progress=progress,
                    workers=config.workers,
                    cuda_graphs=config.cuda_graphs,
                    tasks_at_once=config.tasks_at_once,
                    on_warning=on_warning,
                )
        except UserError:
            if is_new and not (folder / CHECKPOINT_NAME).exists():
                # nothing was learned, so nothing is left to stand in the way of the next try
                for name in (CONFIG_NAME, LOG_NAME, LOCK_NAME):
                    (folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    training = {
        "steps": result.steps,
        "collapsed": result.collapsed,
        "method": json.loads(config.method.model_dump_json()),
    }
    save_pareto_set(model, folder / SET_NAME, preset=config.method.preset, training=training)
    return model, result


def describe_precision(model: nn.Module) -> str:
    """Say in one line how a Pareto model's weights are stored, and what rounding its task vectors changed."""
    state = pareto_state(model)
    finetuned = summarize_dtypes([state.stored_dtypes[name] for name in state.task_names])
    text = f"stored: pretrained {state.stored_dtypes['pretrained']}, fine-tuned {finetuned}"
    return f"{text}; rounding of τ: {percent(state.rounding_error)} of Σλτ" if state.rounding_error else text


def _check_task_vectors(model: nn.Module, on_warning: Callable[[str], None] | None) -> None:
    state = pareto_state(model)
    same = [name for name in state.task_names if state.digests[name] == state.digests["pretrained"]]
    if len(same) == len(state.task_names):
        raise UserError(f"tasks: expected fine-tuned checkpoints, got the pretrained one for {', '.join(same)}")
    for name in state.task_names:
        equal = [other for other in state.task_names if state.digests[other] == state.digests[name]]
        if len(equal) > 1 and name not in same:
            raise UserError(f"tasks: expected different checkpoints, got the same weights for {', '.join(equal)}")
    if same and on_warning is not None:
        on_warning(f"the checkpoint of {', '.join(same)} equals the pretrained one")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time trains in a folder; UserError if another does. The lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: expected a run that is not being trained, but another process is at it"
            ) from error
        try:
            yield
        finally:
            (folder / LOCK_NAME).unlink(missing_ok=True)


def open_run(folder: Path, suite_folder: Path | None = None) -> tuple[Workspace, nn.Module]:
    """The workspace and the learned Pareto model of a finished run.

    Raises:
        UserError: no such run, an unfinished one, or checkpoints that have changed since (their digests are named).
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a run folder, got {'a file' if folder.exists() else 'no such folder'}")
    if not (folder / CONFIG_NAME).exists():
        raise UserError(f"{folder}: expected a run folder, got one without {CONFIG_NAME}")
    if not (folder / SET_NAME).exists():
        raise UserError(f"{folder}: expected a finished run, got one without {SET_NAME} (train with --resume)")
    workspace = Workspace(read_config(folder / CONFIG_NAME), suite_folder)
    with user_errors():
        model = load_pareto_set(folder / SET_NAME, workspace.pretrained(), workspace.finetuned(), copy=False)
    # how it was learned; where that was on a GPU and this is none, the model is still the same
    if workspace.device.type == "cuda" or workspace.config.strategy in ("auto", "cached", "eager"):
        set_strategy(model, workspace.config.strategy)
    learned = list(pareto_state(model).task_names)
    if learned != workspace.task_names:
        raise UserError(
            f"{folder}: expected the tasks {', '.join(learned)} in this order, as {SET_NAME} has them, but "
            f"{CONFIG_NAME} has {', '.join(workspace.task_names)}"
        )
    return workspace, model.eval()


def chosen_methods(text: str | None, tasks: int) -> list[str]:
    """The methods of ``--methods``, each once, in order: names, ``all``, and ``-name`` for one to leave out.

    None: all, beyond two tasks without the one that needs a run for each preference. Raises UserError for others.
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
) -> dict[str, Any]:
    """Compare methods on a configuration's models and write everything into ``folder``; returns its compare.json.

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
    with user_errors():
        evaluated_preferences(names, grid)
        if config.method.gamma is not None:
            check_preference(config.method.gamma, names, per_item=False)
    if config.method.seed + seeds > 2**63:
        raise UserError(f"seeds: expected fewer from {config.method.seed} on, got {seeds}")
    if not resume:
        if (folder / SETTINGS_NAME).exists():
            raise UserError(f"{folder}: expected a new folder, got a comparison that can go on with --resume")
        check_new(folder)
    elif not (folder / SETTINGS_NAME).exists():
        check_new(folder)
    else:
        _check_same(config, folder)
    workspace.check_files()
    # opened before the folder is made, so that a mistake leaves nothing behind
    workspace.evaluation_tasks(), workspace.available_merging_tasks(), workspace.training_tasks()
    workspace.unseen_tasks()
    settings = {"effort": effort, "preferences": grid, "files": workspace.fingerprint()}
    if (folder / SETTINGS_NAME).exists():
        _check_settings(folder / SETTINGS_NAME, settings)
    # the suite's matrices are too small for a second thread
    threads = one_thread() if config.suite is not None else contextlib.nullcontext()
    with _locked(folder), threads:
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


def _check_settings(path: Path, now: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected the settings of a comparison, got {error}") from error
    changed = sorted(_differences(before, json.loads(json.dumps(now))))
    if changed:
        raise UserError(
            f"{path.parent}: expected what the comparison was started with, but {', '.join(changed)} differs (for "
            "other settings choose a new folder)"
        )


def _tell(result: Mapping[str, Any], done: int, total: int, left: float | None) -> None:
    if result["status"] == "done":
        equal = next((p["accuracy"] for p in result["points"] if "equal" in p["kinds"]), None)
        # a method that runs once for each preference does so after its tuning
        what = f"{max(result['tuning_seconds'], result['seconds']):.1f} s"
        if equal is not None:
            what = f"average {sum(equal) / len(equal):.1f} % at the equal preference; {what}"
    else:
        what = f"{result['status']}: {result['reason']}"
    time_left = f"; about {_duration(left)} left" if left is not None and left >= 1 else ""
    print(f"[{done}/{total}] {result['title']}: {what}{time_left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
