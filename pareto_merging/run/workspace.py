"""A run's configuration turned into what the rest works with: encoder, weights, heads and images."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pareto_merging.data.sources import open_images
from pareto_merging.data.tasks import NoHead, Task, ZeroShotHead, read_head
from pareto_merging.errors import UserError, user_errors
from pareto_merging.learn.gradient import TasksAtOnce
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.pieces import extremes
from pareto_merging.model.stored import StoredTensors, remember_stored
from pareto_merging.model.strategy import set_strategy
from pareto_merging.run import checks
from pareto_merging.run.config import RunConfig, UnseenConfig, describe_validation, digits_files
from pareto_merging.system.devices import find_device


@dataclass
class Workspace:
    """The files of one run, opened when they are needed.

    ``encoder_config`` and ``task_configs`` name them; ``suite_folder`` replaces the embedded suite's own.
    """

    config: RunConfig
    suite_folder: Path | None = None

    def __post_init__(self) -> None:
        self._opened: dict[Path | str, Checkpoint] = {}
        tasks, unseen = self.config.tasks, self.config.unseen
        self.unseen_configs: dict[str, UnseenConfig] = unseen if isinstance(unseen, dict) else {}
        if self.config.suite is None:
            assert self.config.encoder is not None and isinstance(tasks, dict)
            self.encoder_config, self.task_configs = self.config.encoder, tasks
            return
        assert not isinstance(tasks, dict)
        folder = self.suite_folder or Path(__file__).parents[1] / "data" / "digits_suite"
        self.encoder_config, self.task_configs = digits_files(folder, tasks)
        both = [name for name in unseen or () if name in self.task_configs]
        if both:
            raise UserError(f"unseen: expected tasks that are not merged, got {', '.join(both)}")
        for name, task in digits_files(folder, list(unseen or ()))[1].items():
            files = task.model_dump(include=set(UnseenConfig.model_fields))
            self.unseen_configs[name] = UnseenConfig.model_validate(files)

    @property
    def task_names(self) -> list[str]:
        """Return the tasks in the order of the preference's entries."""
        return list(self.task_configs)

    @cached_property
    def encoder_description(self) -> dict[str, Any]:
        """Return how to build the plain encoder (:func:`describe_encoder`), as the configuration or the file says."""
        architecture = self._given or self.checkpoint(self.encoder_config.pretrained).encoder
        if architecture is None:
            raise UserError("encoder.architecture: expected an open_clip model name or a JSON file, got none")
        return checks.describe_encoder(architecture, self.encoder_config, self.checkpoints())

    @property
    def assumption(self) -> str:
        """Return what nothing says and is assumed, in words for the user; or nothing."""
        settled = self._given is not None or self.encoder_config.quick_gelu is not None
        if settled or checks.first_stated(self.checkpoints(), "quick_gelu")[0] is not None:
            return ""
        return "no checkpoint says whether it has QuickGELU (as OpenAI's have) or GELU: GELU is assumed; set quick_gelu"

    @property
    def method(self) -> MethodSettings:
        """Return Pareto Merging's settings."""
        return self.config.method

    @property
    def workers(self) -> int:
        """Return how many processes load images, for each task."""
        return self.config.workers

    @property
    def tasks_at_once(self) -> TasksAtOnce:
        """Return whether a step of learning takes all tasks' images together."""
        return self.config.tasks_at_once

    def with_seed(self, seed: int) -> "Workspace":
        """Return the workspace of the same configuration with another seed."""
        method = self.config.method.model_copy(update={"seed": seed})
        return Workspace(self.config.model_copy(update={"method": method}), self.suite_folder)

    def sources(self) -> dict[str, Path | str]:
        """Return where the pretrained checkpoint and those of the tasks come from, by name."""
        tasks = {name: task.checkpoint for name, task in self.task_configs.items()}
        return {"pretrained": self.encoder_config.pretrained, **tasks}

    def checkpoints(self) -> list[Checkpoint]:
        """Return the pretrained checkpoint and those of the tasks, in order."""
        return [self.checkpoint(source) for source in self.sources().values()]

    @cached_property
    def _given(self) -> dict[str, Any] | None:
        """Return the configuration's own description of the encoder; None where the checkpoint tells."""
        architecture = self.encoder_config.architecture
        return None if architecture is None else encoders.describe(architecture)

    @cached_property
    def _given_names(self) -> tuple[str, ...]:
        if self._given is None:
            return ()
        with torch.device("meta"):
            return tuple(encoders.build(self._given).state_dict())

    def checkpoint(self, path: Path | str) -> Checkpoint:
        """Open a checkpoint of any format, once: headers and names, no weights."""
        if path not in self._opened:
            self._opened[path] = open_checkpoint(path, self._given_names)
        return self._opened[path]

    @cached_property
    def device(self) -> torch.device:
        """Return where the work is done; a CUDA GPU if there is one, by default."""
        return find_device(self.config.device)

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """Return how image files become the encoder's input, as the checkpoints say where they do."""
        settings = encoders.default_preprocessing(self.encoder_description)
        settings |= checks.first_stated(self.checkpoints(), "preprocessing")[0] or {}
        if self.config.suite is not None:
            from pareto_merging.data import digits

            mean, std = digits.normalisation()
            settings |= {"mean": [mean] * 3, "std": [std] * 3}
        return settings

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the frozen weights and the images."""
        return cast(torch.dtype, getattr(torch, self.config.dtype))

    def check_files(self) -> None:
        """Raise UserError if a checkpoint or head is missing or does not fit. Only headers and heads are read."""
        tasks = {name: self.checkpoint(task.checkpoint) for name, task in self.task_configs.items()}
        checks.check_copies(self.checkpoint(self.encoder_config.pretrained), tasks)
        skeleton = self.skeleton()
        for path in self.sources().values():
            self._fitting(path, skeleton)
        checks.first_stated(self.checkpoints(), "preprocessing")
        size = encoders.image_size(self.encoder_description)
        with user_errors("encoder"), torch.no_grad():
            try:
                width = cast(Tensor, skeleton(torch.empty(1, 3, size, size, device="meta"))).shape[-1]
            except RuntimeError as error:
                raise UserError(f"encoder: expected one that takes {size}×{size} images, got {error}") from error
        heads = [(name, task.head) for name, task in self.task_configs.items() if task.head is not None]
        heads += [(name, task.head) for name, task in self.unseen_configs.items()]
        for name, path in heads:
            got = list(read_head(path, name).weight.shape)
            if got[1] != width:
                raise UserError(f"{path}: expected a head of [classes, {width}] for this encoder, got {got}")

    def skeleton(self, *, only_shapes: bool = False) -> nn.Module:
        """Build the encoder without memory for weights. ``only_shapes``: of no checkpoint, where it is described."""
        given = self._given if only_shapes else None
        with torch.device("meta"):
            return encoders.build(self.encoder_description if given is None else given)

    def _fitting(self, path: Path | str, skeleton: nn.Module) -> Checkpoint:
        """Return one checkpoint. UserError if it does not fit the encoder."""
        checkpoint, pretrained = self.checkpoint(path), self.checkpoint(self.encoder_config.pretrained)
        expected = {name: list(t.shape) for name, t in skeleton.state_dict().items()}
        if checkpoint is not pretrained and "proj" not in checkpoint and "proj" in pretrained:
            # a vision model without a projection: the pretrained model's is used, as those who made it do
            expected.pop("proj", None)
        checks.check_tensors(path, checkpoint.shapes, expected)
        return checkpoint

    def load(self, path: Path | str) -> StoredTensors:
        """Return one checkpoint's tensors as stored, each read when it is asked for."""
        checkpoint = self._fitting(path, self.skeleton())
        pretrained = self.checkpoint(self.encoder_config.pretrained)
        return StoredTensors(checkpoint, self.device, {"proj": pretrained} if "proj" in pretrained else None)

    def encoder(self, path: Path | str) -> nn.Module:
        """Return the plain encoder with one checkpoint's weights, rounded to the run's dtype.

        One model of memory, and one tensor at a time. It remembers them as stored: :func:`remember_stored`.
        """
        tensors, model = self.load(path), self.skeleton()
        rounded = {name: self._rounded(name, tensors, path) for name in tensors}
        model.load_state_dict(rounded, assign=True)
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            # what the module computes for itself when it is made
            model = encoders.build(self.encoder_description).to(self.device, self.dtype)
            model.load_state_dict(rounded)
        return remember_stored(model, tensors)

    def _rounded(self, name: str, tensors: Mapping[str, Tensor], path: Path | str) -> Tensor:
        """Return one tensor in the run's dtype. UserError if that does not hold its numbers."""
        tensor = tensors[name]
        rounded = tensor.to(self.dtype)
        if rounded.dtype != tensor.dtype and not all(map(math.isfinite, extremes(rounded))):
            largest = max(map(abs, extremes(tensor)))
            raise UserError(f"{path}: expected numbers that {self.config.dtype} holds, got {largest:g} in {name}")
        return rounded

    def pretrained(self) -> nn.Module:
        """Return the pretrained encoder."""
        return self.encoder(self.encoder_config.pretrained)

    def finetuned(self) -> dict[str, StoredTensors]:
        """Return the fine-tuned weights by task name, as stored."""
        return {name: self.load(task.checkpoint) for name, task in self.task_configs.items()}

    def pareto_model(self) -> nn.Module:
        """Return a fresh Pareto model with the configuration's settings."""
        budget = self.config.memory_budget
        with user_errors():
            model = parametrize(self.pretrained(), self.finetuned(), copy=False, **self.method.model_arguments())
            set_strategy(model, self.config.strategy, memory_budget=None if budget is None else int(budget))
        return model

    def head(self, task: str) -> ZeroShotHead:
        """Return the frozen head of one task."""
        path = self.task_configs[task].head
        if path is None:
            raise UserError(f"tasks.{task}.head: expected a head, got none")
        return read_head(path, task).to(self.device)

    def merging_tasks(self) -> dict[str, Task]:
        """Return unlabelled images and heads. UserError naming a task without."""
        for name, task in self.task_configs.items():
            if task.merging is None:
                is_for_start = OBJECTIVES[self.method.objective].needs == "weights"
                use = f"start {self.method.start}" if is_for_start else f"the objective {self.method.objective}"
                raise UserError(f"tasks.{name}.merging: expected unlabelled images for {use}, got none")
        headless = OBJECTIVES[self.method.objective].needs != "images" and not self.method.entropy_weight
        return self._tasks("merging", headless=headless)

    def files(self) -> list[Path]:
        """Return what the run reads: files, and what is named besides (folders of images)."""
        named: list[Path | str | None] = [self.encoder_config.architecture]
        for entry in (*self.task_configs.values(), *self.unseen_configs.values()):
            named += [value for key, value in entry if key != "checkpoint"]
        for checkpoint in self.checkpoints():
            named += checkpoint.files
        return [Path(name) for name in dict.fromkeys(named) if name is not None]

    def fingerprint(self) -> dict[str, list[int]]:
        """Return size and time of last change of each file (not of image folders)."""
        stats = {str(path): path.stat() for path in self.files() if path.is_file()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def chance(self, names: Sequence[str]) -> list[float]:
        """Return what guessing would get on each task, in percent: 100 / its head's classes."""
        return [100.0 / self.head(name).weight.shape[0] for name in names]

    def available_merging_tasks(self) -> dict[str, Task]:
        """Return unlabelled images and heads of the tasks that have both."""
        return self._tasks("merging", only_with_head=True)

    def training_tasks(self) -> dict[str, Task]:
        """Return labelled training images and heads of the tasks that have both. UserError if the classes differ."""
        return self._tasks("training", only_with_head=True)

    def evaluation_tasks(self) -> dict[str, Task]:
        """Return labelled images and heads. UserError: none has them, one is without a head, or the classes differ."""
        tasks = self._tasks("evaluation")
        if not tasks:
            raise UserError("tasks: expected `evaluation` images for at least one task, got none")
        return tasks

    def _tasks(self, split: str, *, only_with_head: bool = False, headless: bool = False) -> dict[str, Task]:
        """Return images and heads of the tasks that have the split. ``headless``: where there are heads."""
        tasks = {
            name: Task(
                open_images(source, self.preprocessing),
                NoHead() if headless and task.head is None else self.head(name),
            )
            for name, task in self.task_configs.items()
            if (source := getattr(task, split)) is not None and not (only_with_head and task.head is None)
        }
        if split != "merging":
            checks.check_classes(tasks)
        return tasks

    def unseen_tasks(self) -> dict[str, tuple[Task, Task]]:
        """Return images of tasks without a checkpoint, to choose a model and judge it."""
        tasks = {}
        for name, task in self.unseen_configs.items():
            head = read_head(task.head, name).to(self.device)
            labelled = Task(open_images(task.evaluation, self.preprocessing), head)
            checks.check_classes({name: labelled})
            tasks[name] = Task(open_images(task.merging, self.preprocessing), head), labelled
        return tasks


def load_models(
    pretrained: str | Path,
    finetuned: Mapping[str, str | Path],
    *,
    quick_gelu: bool | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
) -> tuple[nn.Module, dict[str, StoredTensors]]:
    """Load a pretrained encoder and its fine-tuned copies, as :func:`parametrize` takes them, from any format.

    Args:
        pretrained: a file, a folder, a hub id (``openai/clip-vit-base-patch32``) or ``open_clip:NAME/TAG``.
        finetuned: likewise, by task name.
        quick_gelu: for checkpoints that do not say it themselves, such as bare state dicts; default: GELU.
        dtype: of the module, and so of a model that is made of it. device: ``auto`` is a CUDA GPU where there is one.

    Returns:
        The module, and for each task a mapping that reads a tensor from its file, as it is stored there, when it is
        asked for it. The module's weights are rounded to ``dtype``, but it remembers where they are as stored, so that
        every task vector is rounded once (:mod:`pareto_merging.model.stored`). With ``parametrize(*load_models(…),
        copy=False)`` a Pareto model takes K + 1 models of memory and one tensor.

    Raises:
        UserError: a checkpoint cannot be read, or does not belong to the pretrained one.
    """
    if not isinstance(finetuned, Mapping):
        raise TypeError(f"finetuned: expected a mapping from task name to checkpoint, got {type(finetuned).__name__}")
    tasks = {name: {"checkpoint": source} for name, source in finetuned.items()}
    encoder = {"pretrained": pretrained, "quick_gelu": quick_gelu}
    try:
        settings = {"encoder": encoder, "tasks": tasks, "dtype": dtype, "device": device}
        workspace = Workspace(RunConfig.model_validate(settings))
    except ValidationError as error:
        raise UserError(describe_validation(error)) from error
    workspace.check_files()
    if workspace.assumption:
        warnings.warn(workspace.assumption, stacklevel=2)
    return workspace.pretrained(), workspace.finetuned()
