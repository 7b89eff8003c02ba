"""A run's configuration turned into what the rest works with: encoder, weights, heads and images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pareto_merging import encoders
from pareto_merging.checkpoints.files import read_shapes, read_tensors
from pareto_merging.config import EncoderConfig, RunConfig, TaskConfig, UnseenConfig
from pareto_merging.data import digits
from pareto_merging.data.heads import ZeroShotHead, read_head
from pareto_merging.data.sources import FolderImages, open_images
from pareto_merging.devices import find_device
from pareto_merging.errors import UserError
from pareto_merging.evaluation import EvaluationTask
from pareto_merging.modules import set_strategy
from pareto_merging.parametrize import parametrize
from pareto_merging.training import MergingTask

_WEIGHT_TYPES = ("F16", "BF16", "F32", "F64")


@contextlib.contextmanager
def user_errors(what: str = "") -> Iterator[None]:
    """Values that a library function refuses are the user's here: its one-line message, without a traceback."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error


def digits_files(folder: Path, tasks: list[str] | None) -> tuple[EncoderConfig, dict[str, TaskConfig]]:
    """The embedded suite in ``folder`` as a user's configuration would name its files; all eight tasks by default."""
    chosen = list(digits.TASKS) if tasks is None else tasks
    unknown = [name for name in chosen if name not in digits.TASKS]
    if unknown:
        raise UserError(f"tasks: expected some of {', '.join(digits.TASKS)}; got {', '.join(unknown)}")
    encoder = EncoderConfig(
        architecture=str(folder / "encoder.json"), pretrained=folder / "pretrained.safetensors", quick_gelu=False
    )
    return encoder, {
        name: TaskConfig(
            checkpoint=folder / f"finetuned_{name}.safetensors",
            head=folder / "heads.safetensors",
            merging=f"digits:{name}/merging",
            evaluation=f"digits:{name}/evaluation",
            training=f"digits:{name}/training",
        )
        for name in chosen
    }


@dataclass
class Workspace:
    """The files of one run, opened when they are needed.

    ``encoder_config`` and ``task_configs`` name them; ``suite_folder`` replaces the embedded suite's own.
    """

    config: RunConfig
    suite_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.config.suite is not None:
            chosen = self.config.tasks
            assert chosen is None or isinstance(chosen, list)
            folder = self.suite_folder or Path(digits.__file__).parent / "digits_suite"
            self.encoder_config, self.task_configs = digits_files(folder, chosen)
        else:
            assert self.config.encoder is not None and isinstance(self.config.tasks, dict)
            self.encoder_config, self.task_configs = self.config.encoder, self.config.tasks

        self.unseen_configs = self._unseen()

    def _unseen(self) -> dict[str, UnseenConfig]:
        unseen = self.config.unseen
        if unseen is None or isinstance(unseen, dict):
            return unseen or {}
        folder = self.encoder_config.pretrained.parent
        both = [name for name in unseen if name in self.task_configs]
        if both:
            raise UserError(f"unseen: expected tasks that are not merged, got {', '.join(both)}")
        _, tasks = digits_files(folder, unseen)
        return {
            name: UnseenConfig(head=task.head, merging=task.merging, evaluation=task.evaluation)  # type: ignore[arg-type]
            for name, task in tasks.items()
        }

    @property
    def task_names(self) -> list[str]:
        """The tasks in the order of the preference's entries."""
        return list(self.task_configs)

    @cached_property
    def encoder_description(self) -> dict[str, Any]:
        """How to build the plain encoder: see :func:`pareto_merging.encoders.describe`."""
        return encoders.describe(self.encoder_config.architecture, self.encoder_config.quick_gelu)

    @cached_property
    def device(self) -> torch.device:
        """Where the work is done: a CUDA GPU where there is one, unless the configuration says otherwise."""
        return find_device(self.config.device)

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """How image files become the encoder's input: see :func:`pareto_merging.encoders.default_preprocessing`."""
        found = encoders.default_preprocessing(self.encoder_description)
        if self.config.suite is not None:
            mean, std = digits.normalisation()
            found |= {"mean": [mean] * 3, "std": [std] * 3}
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and the images."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.config.dtype]

    def check_files(self) -> None:
        """UserError if a checkpoint or head is missing or does not fit the encoder; reads only headers and heads."""
        skeleton = self.skeleton()
        expected = {name: list(t.shape) for name, t in skeleton.state_dict().items()}
        paths = {"pretrained": self.encoder_config.pretrained}
        paths |= {name: task.checkpoint for name, task in self.task_configs.items()}
        for path in paths.values():
            found = read_shapes(path)
            check_tensors(path, {name: shape for name, (shape, _) in found.items()}, expected)
            odd = [f"{name} {dtype}" for name, (_, dtype) in found.items() if dtype not in _WEIGHT_TYPES]
            if odd:
                raise UserError(f"{path}: expected {', '.join(_WEIGHT_TYPES)} tensors, got {', '.join(odd[:5])}")
        size = encoders.image_size(self.encoder_description)
        with user_errors("encoder"), torch.no_grad():
            try:
                features = cast(Tensor, skeleton(torch.empty(1, 3, size, size, device="meta")))
                width = features.shape[-1]
            except RuntimeError as error:
                raise UserError(f"encoder: expected one that takes {size}×{size} images, got {error}") from error
        heads = [(name, task.head) for name, task in self.task_configs.items() if task.head is not None]
        heads += [(name, task.head) for name, task in self.unseen_configs.items()]
        for name, path in heads:
            got = list(read_head(path, name).weight.shape)
            if got[1] != width:
                raise UserError(f"{path}: expected a head of [classes, {width}] for this encoder, got {got}")

    def skeleton(self) -> nn.Module:
        """The encoder without memory for its weights."""
        with torch.device("meta"):
            return encoders.build(self.encoder_description)

    def load(self, path: Path) -> dict[str, Tensor]:
        """One checkpoint's tensors on the run's device, in its dtype."""
        tensors = read_tensors(path, self.device)
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def encoder(self, path: Path) -> nn.Module:
        """The plain encoder with the weights of one checkpoint."""
        model = encoders.build(self.encoder_description).to(self.device, self.dtype)
        tensors = self.load(path)
        expected = {name: list(t.shape) for name, t in model.state_dict().items()}
        check_tensors(path, {name: list(t.shape) for name, t in tensors.items()}, expected)
        model.load_state_dict(tensors)
        return model

    def pretrained(self) -> nn.Module:
        """The pretrained encoder."""
        return self.encoder(self.encoder_config.pretrained)

    def finetuned(self) -> dict[str, Mapping[str, Tensor]]:
        """The fine-tuned weights by task name."""
        return {name: self.load(task.checkpoint) for name, task in self.task_configs.items()}

    def pareto_model(self) -> nn.Module:
        """A fresh Pareto model with the configuration's settings."""
        method = self.config.method
        with user_errors():
            model = parametrize(self.pretrained(), self.finetuned(), **method.model_arguments())
        self.apply_strategy(model)
        return model

    def apply_strategy(self, model: nn.Module) -> None:
        """How the configuration wants the layers of a Pareto model computed."""
        budget = self.config.memory_budget
        with user_errors():
            set_strategy(model, self.config.strategy, memory_budget=None if budget is None else int(budget))

    def head(self, task: str) -> ZeroShotHead:
        """The frozen head of one task."""
        path = self.task_configs[task].head
        if path is None:
            raise UserError(f"tasks.{task}.head: expected a head, got none")
        return read_head(path, task).to(self.device)

    def merging_tasks(self) -> dict[str, MergingTask]:
        """Unlabelled images and heads; UserError naming a task without."""
        for name, task in self.task_configs.items():
            if task.merging is None:
                raise UserError(f"tasks.{name}.merging: expected unlabelled images for the entropy, got none")
        size = encoders.image_size(self.encoder_description)
        return {
            name: MergingTask(open_images(str(task.merging), size), self.head(name))
            for name, task in self.task_configs.items()
        }

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of last change of each file (not of image folders): whether they are the ones they were."""
        named: list[Path | str | None] = [self.encoder_config.architecture, self.encoder_config.pretrained]
        for task in self.task_configs.values():
            named += [task.checkpoint, task.head, task.merging, task.evaluation, task.training]
        for unseen in self.unseen_configs.values():
            named += [unseen.head, unseen.merging, unseen.evaluation]
        paths = [Path(name) for name in dict.fromkeys(named) if name is not None]
        return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()}

    def chance(self, names: Sequence[str]) -> list[float]:
        """What guessing would get on each task, in percent: 100 / its head's number of classes."""
        return [100.0 / self.head(name).weight.shape[0] for name in names]

    def available_merging_tasks(self) -> dict[str, MergingTask]:
        """Unlabelled images and heads of the tasks that have both."""
        size = encoders.image_size(self.encoder_description)
        return {
            name: MergingTask(open_images(task.merging, size), self.head(name))
            for name, task in self.task_configs.items()
            if task.merging is not None and task.head is not None
        }

    def training_tasks(self) -> dict[str, EvaluationTask]:
        """Labelled training images and heads of the tasks that have both; UserError if the classes differ."""
        size = encoders.image_size(self.encoder_description)
        tasks = {
            name: EvaluationTask(open_images(task.training, size), self.head(name))
            for name, task in self.task_configs.items()
            if task.training is not None and task.head is not None
        }
        for name, entry in tasks.items():
            _check_classes(name, entry, self.head(name))
        return tasks

    def unseen_tasks(self) -> dict[str, tuple[MergingTask, EvaluationTask]]:
        """The tasks without a checkpoint: unlabelled images to choose a model by, and labelled ones to judge it."""
        size = encoders.image_size(self.encoder_description)
        found = {}
        for name, task in self.unseen_configs.items():
            head = read_head(task.head, name).to(self.device)
            labelled = EvaluationTask(open_images(task.evaluation, size), head)
            _check_classes(name, labelled, head)
            found[name] = MergingTask(open_images(task.merging, size), head), labelled
        return found

    def evaluation_tasks(self) -> dict[str, EvaluationTask]:
        """Labelled images and heads of the tasks that have them; UserError if none has, or if the classes differ."""
        size = encoders.image_size(self.encoder_description)
        tasks = {
            name: EvaluationTask(open_images(task.evaluation, size), self.head(name))
            for name, task in self.task_configs.items()
            if task.evaluation is not None
        }
        if not tasks:
            raise UserError("tasks: expected `evaluation` images for at least one task, got none")
        for name, entry in tasks.items():
            _check_classes(name, entry, self.head(name))
        return tasks


def _check_classes(name: str, task: EvaluationTask, head: ZeroShotHead) -> None:
    classes = head.weight.shape[0]
    if isinstance(task.images, FolderImages) and len(task.images.classes) != classes:
        raise UserError(
            f"{task.images.root}: expected {classes} sub-folders, one for each class of {name}'s head in its order, "
            f"got {len(task.images.classes)}"
        )


def check_tensors(path: Path, shapes: Mapping[str, list[int]], expected: Mapping[str, list[int]]) -> None:
    """UserError naming the tensors of ``path`` that are missing, extra or of another shape than ``expected``."""
    if any(name.startswith("visual.") for name in shapes):
        raise UserError(
            f"{path}: expected the vision tower alone, got a whole CLIP model (keep the tensors whose names begin with "
            "visual. and drop that prefix)"
        )
    problems = [f"lacks {name}" for name in expected if name not in shapes]
    problems += [f"has an extra {name}" for name in shapes if name not in expected]
    problems += [
        f"has {name} of shape {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path}: is not of the encoder's architecture: it {'; it '.join(problems[:5])}{more}")
