"""What learning begins with, by the setting ``start``: a base found without a step.

The table is :data:`STARTS`; a start is found once, and a run that goes on reads it from its folder.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pareto_merging.checkpoints.safetensors import read_metadata, read_tensors, write_tensors
from pareto_merging.data.tasks import Task
from pareto_merging.errors import UserError
from pareto_merging.learn.held_back import BestState
from pareto_merging.learn.loop import TrainingResult, learn_pareto_set
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.prepared import learned_from
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.learn.teachers import task_identity, with_teachers
from pareto_merging.methods import regmean, sequential
from pareto_merging.methods.interface import Copies
from pareto_merging.methods.per_task import check_tasks
from pareto_merging.model.base import base_tensors, set_base
from pareto_merging.model.files import BASE, load_learned
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state
from pareto_merging.system.modes import eval_mode

START_NAME, FORMAT = "start.safetensors", "pareto-start"
# (Pareto model, pretrained, copies, tasks, settings, progress) -> facts, as plain JSON; the model holds what was found
Start = Callable[[nn.Module, nn.Module, Copies, Mapping[str, Task], MethodSettings, bool], dict[str, Any]]


def _regmean(
    model: nn.Module,
    pretrained: nn.Module,
    finetuned: Copies,
    tasks: Mapping[str, Task],
    settings: MethodSettings,
    progress: bool,
) -> dict[str, Any]:
    how: dict[str, Any] = {"images": settings.start_images, "seed": settings.seed, "progress": progress}
    merged = regmean.merge(pretrained, finetuned, tasks=tasks, **how).model()
    own = base_tensors(model)
    set_base(model, {name: p for name, p in merged.named_parameters() if name in own}, "regmean")
    return {}


def _sequential(
    model: nn.Module,
    pretrained: nn.Module,
    finetuned: Copies,
    tasks: Mapping[str, Task],
    settings: MethodSettings,
    progress: bool,
) -> dict[str, Any]:
    how: dict[str, Any] = {"images": settings.start_images, "ridge": settings.ridge, "seed": settings.seed}
    return sequential.start_sequential(model, pretrained, finetuned, tasks, progress=progress, **how)


STARTS: dict[str, Start] = {"regmean": _regmean, "sequential": _sequential}
# what the closed form's ridge is chosen from where images are few, by agreement on those held back
RIDGES = (0.03, 0.1, 0.3, 1.0)


def begin(
    model: nn.Module,
    pretrained: nn.Module,
    finetuned: Copies,
    tasks: Mapping[str, Task] | None,
    settings: MethodSettings,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Give a Pareto model the start of its settings, in place. Return what was found out, as plain JSON.

    Args:
        model: as :func:`parametrize` made it of ``pretrained`` and ``finetuned``.
        tasks: unlabelled images by task name; those held back from learning are not looked at.
        folder: where it is kept for a run that goes on with ``resume``, in ``start.safetensors``.

    Raises:
        ValueError: no images; otherwise as the start itself.
    """
    if settings.start == "pretrained":
        return {}
    if not tasks:
        raise ValueError(f"tasks: expected unlabelled images of every task for start {settings.start}, got none")
    names = pareto_state(model).task_names
    check_tasks(tasks, names)
    # in the model's order, as they are learned from: the same images are held back
    tasks = {name: tasks[name] for name in names}
    # without digests nothing says which models a file is of
    path = None if folder is None or not pareto_state(model).digests else folder / START_NAME
    identity = _identity(model, settings, tasks) if path is not None else {}
    if path is not None and resume and (facts := _read(model, path, identity)) is not None:
        return facts
    given, (settings, learned, held) = settings, learned_from(tasks, settings)
    tried: dict[str, float] = {}
    if settings is not given and held and settings.start == "sequential":
        for ridge in RIDGES:
            STARTS[settings.start](model, pretrained, finetuned, learned, _with(settings, ridge), progress)
            tried[f"{ridge:g}"] = _agreement(model, finetuned, held, settings)
        # the largest of equals
        settings = _with(settings, max(RIDGES, key=lambda ridge: (tried[f"{ridge:g}"], ridge)))
    facts = STARTS[settings.start](model, pretrained, finetuned, learned, settings, progress)
    facts |= {"tried": tried} if tried else {}
    pareto_state(model).start_facts = facts
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        base = {f"{BASE}{name}": tensor for name, tensor in base_tensors(model).items()}
        metadata = {"format": FORMAT, "identity": identity, "facts": facts}
        write_tensors(path, {**learned_parameters(model), **base}, metadata)
    return facts


def _with(settings: MethodSettings, ridge: float) -> MethodSettings:
    return settings.model_copy(update={"ridge": ridge})


def _agreement(model: nn.Module, finetuned: Copies, held: Mapping[str, Task], settings: MethodSettings) -> float:
    """Return the agreement in percent with the fine-tuned models on images held back."""
    taught = with_teachers(model, held, settings, finetuned, progress=False)
    best = BestState(model, taught, settings.loss)
    with eval_mode(model, *(task.head for task in taught.values())):
        best.look(0)
    return best.score


def learn_from_start(
    model: nn.Module,
    pretrained: nn.Module,
    finetuned: Copies,
    tasks: Mapping[str, Task] | None,
    settings: MethodSettings,
    **run: Any,
) -> TrainingResult:
    """Begin as the settings say and learn. Where images were held back and no step helped, use all for the start.

    Arguments as of :func:`begin` and :func:`learn_pareto_set`, which say what is raised.
    """
    where = {name: run[name] for name in ("folder", "resume", "progress") if name in run}
    facts = begin(model, pretrained, finetuned, tasks, settings, **where)
    # what has no teachers has no use for the copies
    copies = finetuned if OBJECTIVES[settings.objective].has_teachers else None
    result = learn_pareto_set(model, tasks, settings, finetuned=copies, **run)
    if facts.get("tried") and tasks and not result.chosen.get("step"):
        again = _with(settings, facts.get("ridge", settings.ridge))
        last = STARTS[settings.start](model, pretrained, finetuned, tasks, again, bool(run.get("progress", True)))
        pareto_state(model).start_facts = {**last, "tried": facts["tried"], "all images": True}
    return result


def _identity(model: nn.Module, settings: MethodSettings, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Return what a start that is read must agree on."""
    state = pareto_state(model)
    # the objective's say which ridge is best where images are few
    names = (
        *("start", "start_images", "ridge", "seed", "few_images", "held_back"),
        *("objective", "features_weight", "entropy_weight"),
    )
    return {
        "settings": {name: getattr(settings, name) for name in names},
        "model": dict(state.settings),
        "digests": state.digests,
        "tasks": {name: task_identity(task) for name, task in tasks.items()},
    }


def _read(model: nn.Module, path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give the model the start of a file and return its facts. None where there is none, or one of something else."""
    if not path.exists():
        return None
    try:
        metadata = read_metadata(path)
        expected = json.loads(json.dumps(identity))
        if metadata.get("format") != FORMAT or json.loads(metadata.get("identity", "null")) != expected:
            return None
        facts, tensors = json.loads(metadata["facts"]), read_tensors(path)
    except (UserError, ValueError, KeyError):
        return None
    own: dict[str, Tensor] = {f"{BASE}{name}": tensor for name, tensor in base_tensors(model).items()}
    shapes = {name: tensor.shape for name, tensor in (own | learned_parameters(model)).items()}
    is_whole = shapes == {name: tensor.shape for name, tensor in tensors.items()}
    if not is_whole or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return None
    base = {name.removeprefix(BASE): tensors.pop(name) for name in list(tensors) if name.startswith(BASE)}
    set_base(model, base, identity["settings"]["start"])
    load_learned(model, tensors, path)
    pareto_state(model).start_facts = facts if isinstance(facts, dict) else {}
    return pareto_state(model).start_facts
