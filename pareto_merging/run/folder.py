"""A run folder: what is in it, how it is started, locked and opened again.

config.yaml            the configuration, every default written out, paths absolute
log.jsonl              one line per step and event; "weights" says how they are stored and what rounding costs
checkpoint.safetensors what --resume goes on from
pareto_set.safetensors the result
evaluation.*           what `evaluate` measured last, and its pictures

A comparison's folder has config.yaml too, settings.json, a file for each method and seed, and the tables and pictures.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from pareto_merging.errors import UserError, user_errors
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME
from pareto_merging.model.files import load_pareto_set
from pareto_merging.model.state import pareto_state
from pareto_merging.model.strategy import set_strategy
from pareto_merging.run.config import RunConfig, read_config
from pareto_merging.run.workspace import Workspace
from pmkernels import strategies

CONFIG_NAME, SET_NAME, LOCK_NAME = "config.yaml", "pareto_set.safetensors", ".lock"


def check_new(path: Path) -> None:
    """Raise UserError if something is at ``path``, or a file on the way. An empty folder is nothing."""
    for parent in path.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{path}: expected a folder at {parent}, got a file")
    if path.exists() and not (path.is_dir() and all(entry.name == LOCK_NAME for entry in path.iterdir())):
        kind = "folder" if path.is_dir() else "file"
        raise UserError(f"{path}: expected a new path, got an existing {kind}")


def start_run(config: RunConfig, folder: Path, resume: bool) -> None:
    """Check that the folder is new, or with ``resume`` of the same configuration. UserError names what differs."""
    if not resume and (folder / SET_NAME).exists():
        raise UserError(f"{folder}: expected a new folder, got a finished run")
    if not resume and (folder / CHECKPOINT_NAME).exists():
        raise UserError(f"{folder}: expected a new folder, got a run that can go on with --resume")
    if resume and not folder.is_dir():
        raise UserError(f"{folder}: expected a run to resume, got no such folder")
    if resume and (folder / CONFIG_NAME).exists():
        check_same(config, folder)
    else:
        check_new(folder)


def check_same(config: RunConfig, folder: Path) -> None:
    """Raise UserError naming the keys in which a folder's configuration differs."""
    stored = read_config(folder / CONFIG_NAME, learned=True)
    before, now = (_what_counts(c.model_dump()) for c in (stored, config))
    changed = sorted(differences(before, now))
    if changed:
        raise UserError(
            f"{folder}: expected the configuration it was started with, but {', '.join(changed)} differs "
            "(for another configuration choose a new folder, or delete this one)"
        )


def _what_counts(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings that change nothing but rounding; add the order of the tasks."""
    nothing = ("workers", "device", "strategy", "memory_budget", "cuda_graphs", "tasks_at_once")
    kept = {key: value for key, value in config.items() if key not in nothing}
    kept["method"] = {key: value for key, value in config["method"].items() if key != "checkpoint_every"}
    kept["order of tasks"] = list(config["tasks"] or ())
    return kept


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Return the keys in which two nested mappings differ, as ``outer.inner``."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            changed
            for key in sorted({*before, *now})
            for changed in differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == now else [prefix]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for one process at a time. UserError if another has it; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            what = "expected a run that is not being trained, but another process is at it"
            raise UserError(f"{folder}: {what}") from error
        try:
            yield
        finally:
            (folder / LOCK_NAME).unlink(missing_ok=True)


def open_run(folder: Path) -> tuple[Workspace, nn.Module]:
    """Return the workspace and the learned Pareto model of a finished run.

    UserError: no such run, an unfinished one, or checkpoints that have changed since (their digests are named).
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a run folder, got {'a file' if folder.exists() else 'no such folder'}")
    if not (folder / CONFIG_NAME).exists():
        raise UserError(f"{folder}: expected a run folder, got one without {CONFIG_NAME}")
    if not (folder / SET_NAME).exists():
        raise UserError(f"{folder}: expected a finished run, got one without {SET_NAME} (train with --resume)")
    workspace = Workspace(read_config(folder / CONFIG_NAME, learned=True))
    with user_errors():
        model = load_pareto_set(folder / SET_NAME, workspace.pretrained(), workspace.finetuned(), copy=False)
    # how it was learned, where that can be done here; the model is the same by any other
    name, case = workspace.config.strategy, strategies.Case(workspace.device, {}, asked=False)
    strategy = strategies.TABLE.get(name)
    if name in strategies.RESERVED or (strategy is not None and strategy.supports(case) is None):
        set_strategy(model, name)
    learned = list(pareto_state(model).task_names)
    if learned != workspace.task_names:
        raise UserError(
            f"{folder}: expected the tasks {', '.join(learned)} in this order, as {SET_NAME} has them, but "
            f"{CONFIG_NAME} has {', '.join(workspace.task_names)}"
        )
    return workspace, model.eval()
