"""Checkpoints: what a run goes on from. What is learned, Adam's moments, the step, and whose they are."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pareto_merging.checkpoints.safetensors import read_metadata, read_tensors, write_tensors
from pareto_merging.errors import UserError
from pareto_merging.learn.adam import MOMENTS
from pareto_merging.learn.held_back import BestState
from pareto_merging.learn.learner import Learner
from pareto_merging.learn.settings import MethodSettings, ModelSettings
from pareto_merging.model.digests import TensorDigest
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state

CHECKPOINT_NAME = "checkpoint.safetensors"
FORMAT = "pareto-checkpoint"
# what a checkpoint meant that was written before there was a choice
_SINCE = {name: field.default for name, field in MethodSettings.model_fields.items()}


def save_checkpoint(learner: Learner, folder: Path, step: int, best: BestState | None = None) -> None:
    """Write the state after ``step`` into the folder, atomically. And the best so far, where images are held back."""
    tensors: dict[str, Tensor] = {f"parameter.{n}": p for n, p in learned_parameters(learner.model).items()}
    metadata = {"format": FORMAT, "step": step, **_identity(learner)}
    if best is not None:
        tensors |= {f"best.{name}": tensor for name, tensor in best.tensors.items()}
        metadata["best"] = {"step": best.step, "score": best.score, "looks": best.looks}
    write_tensors(folder / CHECKPOINT_NAME, tensors | learner.adam.moments(), metadata)


def restore_checkpoint(learner: Learner, folder: Path, best: BestState | None = None) -> int:
    """Load the folder's checkpoint and return how many steps it has done. 0 if there is none.

    Raises UserError for one of other settings, weights or heads, a damaged one, or another file.
    """
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return 0
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: expected a training checkpoint, got another safetensors file")
    if differences := ", ".join(_differences(path, metadata, _identity(learner))):
        raise UserError(f"{path}: expected one of the same settings and weights, but it differs in {differences}")
    step = int(metadata["step"]) if metadata.get("step", "").isdecimal() else -1
    if not 0 <= step <= learner.total:
        raise UserError(f"{path}: expected a step from 0 to {learner.total}, got {metadata.get('step')!r}")
    tensors = read_tensors(path, learner.device)
    everything = learned_parameters(learner.model)
    wanted = {f"parameter.{name}": parameter for name, parameter in everything.items()}
    if step:
        wanted |= {f"{key}.{name}": p for name, p in learner.learned.items() for key in MOMENTS}
    for name, parameter in wanted.items():
        value = tensors.get(name)
        if value is None or value.shape != parameter.shape:
            got = "none" if value is None else str(list(value.shape))
            raise UserError(f"{path}: expected {name} of shape {list(parameter.shape)}, got {got}")
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: expected finite numbers in {name}, got NaN or inf")
    with torch.no_grad():
        for name, parameter in everything.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    learner.adam.load(step, tensors)
    if best is not None:
        _restore_best(best, metadata, tensors)
    return step


def _restore_best(best: BestState, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Go on from the best state that a checkpoint has. One without a whole one is as if none was looked at."""
    try:
        saved = json.loads(metadata.get("best", "null"))
        looks = {int(step): float(score) for step, score in saved["looks"].items()}
        step, score = int(saved["step"]), float(saved["score"])
    except (TypeError, KeyError, ValueError, AttributeError):
        return
    kept = {name: tensors.get(f"best.{name}") for name in learned_parameters(best.model)}
    for name, parameter in learned_parameters(best.model).items():
        value = kept[name]
        if value is None or value.shape != parameter.shape or not bool(torch.isfinite(value).all()):
            return
    best.step, best.score, best.looks = step, score, looks
    best.tensors = {name: value for name, value in kept.items() if value is not None}


def _identity(learner: Learner) -> dict[str, Any]:
    """Return what a checkpoint must agree on: the settings, tasks, weights and heads."""
    state = pareto_state(learner.model)
    # how often to save changes nothing about the result
    settings = {k: v for k, v in json.loads(learner.settings.model_dump_json()).items() if k != "checkpoint_every"}
    heads = {}
    for name, task in learner.tasks.items():
        digest = TensorDigest()
        for key, tensor in task.head.state_dict().items():
            if isinstance(tensor, Tensor):
                digest.add(key, tensor)
        heads[name] = digest.hexdigest()
    model = json.loads(json.dumps(state.settings))
    identity = {"settings": settings, "task_names": list(learner.names), "model": model}
    digests = state.digests | ({"base": state.base_digest} if state.base_digest else {})
    return {**identity, "digests": digests, "heads": heads}


def _differences(path: Path, metadata: Mapping[str, str], identity: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a checkpoint's header says otherwise than ``identity``.

    What the two models agree on may differ in the settings, which once could say otherwise than their model.
    """
    saved: dict[str, Any] = {}
    for part in identity:
        try:
            saved[part] = json.loads(metadata.get(part, ""))
        except ValueError as error:
            raise UserError(f"{path}: expected {part} in the header of a checkpoint, got none") from error
    model = saved["model"] if isinstance(saved["model"], dict) else {}
    agreed = {key for key in ModelSettings.model_fields if key in model and model[key] == identity["model"].get(key)}
    for part, now in identity.items():
        before = saved[part]
        if not isinstance(before, dict) or not isinstance(now, dict):
            if before != now:
                yield f"{part} ({before!r}, now {now!r})"
            continue
        for key in dict.fromkeys((*now, *before)):
            if before.get(key, _SINCE.get(key)) != now.get(key) and not (part == "settings" and key in agreed):
                label = "" if part == "settings" else f"{part}: "
                yield f"{label}{key} ({_short(before.get(key, _SINCE.get(key)))}, now {_short(now.get(key))})"


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else repr(value)
