"""A run's configuration turned into what the rest works with: encoder, weights, heads and images."""

from __future__ import annotations

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
from pareto_merging.data.heads import ZeroShotHead, read_head
from pareto_merging.data.sources import FolderImages, open_images
from pareto_merging.data.tasks import Task
from pareto_merging.errors import UserError, user_errors
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.pieces import extremes
from pareto_merging.model.stored import StoredTensors, remember_stored
from pareto_merging.model.strategy import set_strategy
from pareto_merging.run.config import EncoderConfig, RunConfig, TaskConfig, UnseenConfig, describe_validation
from pareto_merging.system.devices import find_device


def digits_files(folder: Path, tasks: list[str] | None) -> tuple[EncoderConfig, dict[str, TaskConfig]]:
    """The embedded suite in ``folder`` as a user's configuration would name its files; all eight tasks by default."""
    # seconds to import, for those who have their own models
    from pareto_merging.data import digits

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
        self._opened: dict[Path | str, Checkpoint] = {}
        if self.config.suite is not None:
            chosen = self.config.tasks
            assert chosen is None or isinstance(chosen, list)
            folder = self.suite_folder or Path(__file__).parents[1] / "data" / "digits_suite"
            self.encoder_config, self.task_configs = digits_files(folder, chosen)
        else:
            assert self.config.encoder is not None and isinstance(self.config.tasks, dict)
            self.encoder_config, self.task_configs = self.config.encoder, self.config.tasks

        self.unseen_configs = self._unseen()

    def _unseen(self) -> dict[str, UnseenConfig]:
        unseen = self.config.unseen
        if unseen is None or isinstance(unseen, dict):
            return unseen or {}
        folder = Path(self.encoder_config.pretrained).parent
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
        """How to build the plain encoder: see :func:`.encoders.describe`.

        The configuration's architecture or else the pretrained checkpoint's; QuickGELU as the checkpoint says.
        """
        if self._given is not None:
            description = self._given
        else:
            found = self.checkpoint(self.encoder_config.pretrained)
            if found.encoder is None:
                raise UserError("encoder.architecture: expected an open_clip model name or a JSON file, got none")
            description = dict(found.encoder)
        said, source = self._said("heads")
        heads = description.get("arguments", {}).get("heads")
        if None not in (heads, said) and heads != said:
            raise UserError(f"encoder: expected {said} attention heads as {source} says, got {heads}")
        said, source = self._said("quick_gelu")
        named = encoders.has_quick_gelu(self._given) if self._given is not None else None
        for key, value in (("quick_gelu", self.encoder_config.quick_gelu), ("architecture", named or None)):
            if None not in (said, value) and said != value:
                expected, got = (("QuickGELU" if gelu else "GELU") for gelu in (said, value))
                raise UserError(f"encoder.{key}: expected {expected} as {source} says, got {got}")
        chosen = self.encoder_config.quick_gelu
        if named and chosen is False:
            raise UserError("encoder.quick_gelu: expected true as the architecture has it, got false")
        return {**description, "quick_gelu": bool(said if chosen is None else chosen) or bool(named)}

    @property
    def assumption(self) -> str:
        """What no checkpoint and no setting says and is therefore assumed, in words for the user; empty for nothing."""
        if (
            self._given is not None
            or self.encoder_config.quick_gelu is not None
            or self._said("quick_gelu")[0] is not None
        ):
            return ""
        return "no checkpoint says whether it has QuickGELU (as OpenAI's have) or GELU: GELU is assumed; set quick_gelu"

    def _said(self, what: str) -> tuple[Any, str]:
        """What the checkpoints say of themselves, and which said it; None where none does. UserError if two differ."""
        first: tuple[Any, str] = None, ""
        for found in self.checkpoints():
            value = getattr(found, what)
            if value is None:
                continue
            if first[0] is not None and value != first[0]:
                raise UserError(f"{found.source}: expected {what} {first[0]} as {first[1]} says, got {value}")
            first = first if first[0] is not None else (value, found.source)
        return first

    def checkpoints(self) -> list[Checkpoint]:
        """The pretrained checkpoint and those of the tasks, in order."""
        return [self.checkpoint(source) for source in self._sources()]

    def _sources(self) -> list[Path | str]:
        return [self.encoder_config.pretrained, *(task.checkpoint for task in self.task_configs.values())]

    @cached_property
    def _given(self) -> dict[str, Any] | None:
        """The configuration's own description of the encoder; None where the pretrained checkpoint tells."""
        architecture = self.encoder_config.architecture
        return None if architecture is None else encoders.describe(architecture)

    @cached_property
    def _given_names(self) -> tuple[str, ...]:
        if self._given is None:
            return ()
        with torch.device("meta"):
            return tuple(encoders.build(self._given).state_dict())

    def checkpoint(self, path: Path | str) -> Checkpoint:
        """A checkpoint of any format, opened once: headers and names, no weights."""
        if path not in self._opened:
            self._opened[path] = open_checkpoint(path, self._given_names)
        return self._opened[path]

    @cached_property
    def device(self) -> torch.device:
        """Where the work is done: a CUDA GPU where there is one, unless the configuration says otherwise."""
        return find_device(self.config.device)

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """How image files become the encoder's input: see :func:`.encoders.default_preprocessing`.

        As the checkpoints say, where they do.
        """
        found = encoders.default_preprocessing(self.encoder_description)
        found |= self._said("preprocessing")[0] or {}
        if self.config.suite is not None:
            from pareto_merging.data import digits

            mean, std = digits.normalisation()
            found |= {"mean": [mean] * 3, "std": [std] * 3}
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and the images."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.config.dtype]

    def check_files(self) -> None:
        """UserError if a checkpoint or head is missing or does not fit the encoder; reads only headers and heads."""
        self._check_different()
        self._check_copies()
        skeleton = self.skeleton()
        for path in self._sources():
            self._fitting(path, skeleton)
        self._said("preprocessing")
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

    def skeleton(self, *, only_shapes: bool = False) -> nn.Module:
        """The encoder without memory for its weights; ``only_shapes``: if it is described, no checkpoint is opened."""
        given = self._given if only_shapes else None
        with torch.device("meta"):
            return encoders.build(self.encoder_description if given is None else given)

    def _check_different(self) -> None:
        """UserError if two tasks have one and the same checkpoint file."""
        tasks = {
            name: {path.resolve() for path in self.checkpoint(task.checkpoint).weights}
            for name, task in self.task_configs.items()
        }
        for name, paths in tasks.items():
            same = [other for other, its in tasks.items() if its == paths]
            if len(same) > 1:
                where = self.checkpoint(self.task_configs[name].checkpoint).source
                raise UserError(f"tasks.{name}: expected a checkpoint for each task, got {where} for {', '.join(same)}")

    def _check_copies(self) -> None:
        """UserError naming a task whose checkpoint is of another architecture than the pretrained one."""
        pretrained = self.checkpoint(self.encoder_config.pretrained)
        for name, task in self.task_configs.items():
            found = self.checkpoint(task.checkpoint)
            if found.architecture is None or pretrained.architecture is None:
                continue
            expected, got = (
                f"{a.width} wide, {a.layers} layers, {a.image_size} px in patches of {a.patch_size}"
                for a in (pretrained.architecture, found.architecture)
            )
            if got != expected:
                what = f"expected a fine-tuned copy of the pretrained model ({expected}), got {found.source} ({got})"
                raise UserError(f"tasks.{name}: {what}")
            if pretrained.architecture.output_dim is None and found.architecture.output_dim is not None:
                what = f"expected a projection, as {found.source} has, got a vision model without (give the whole CLIP)"
                raise UserError(f"{pretrained.source}: {what}")

    def _fitting(self, path: Path | str, skeleton: nn.Module) -> Checkpoint:
        """One checkpoint, compared with the encoder."""
        found, pretrained = self.checkpoint(path), self.checkpoint(self.encoder_config.pretrained)
        expected = {name: list(t.shape) for name, t in skeleton.state_dict().items()}
        if found is not pretrained and "proj" not in found and "proj" in pretrained:
            # a vision model without a projection: the pretrained model's is used, as those who made it do
            expected.pop("proj", None)
        check_tensors(path, found.shapes, expected)
        return found

    def load(self, path: Path | str) -> StoredTensors:
        """One checkpoint's tensors as stored, on the run's device, each read when it is asked for."""
        found, pretrained = self._fitting(path, self.skeleton()), self.checkpoint(self.encoder_config.pretrained)
        return StoredTensors(found, self.device, {"proj": pretrained} if "proj" in pretrained else None)

    def encoder(self, path: Path | str) -> nn.Module:
        """The plain encoder with the weights of one checkpoint, rounded to the run's dtype.

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
        """One tensor in the run's dtype; UserError if that does not hold its numbers."""
        tensor = tensors[name]
        rounded = tensor.to(self.dtype)
        if rounded.dtype != tensor.dtype and not all(map(math.isfinite, extremes(rounded))):
            largest = max(map(abs, extremes(tensor)))
            raise UserError(f"{path}: expected numbers that {self.config.dtype} holds, got {largest:g} in {name}")
        return rounded

    def pretrained(self) -> nn.Module:
        """The pretrained encoder."""
        return self.encoder(self.encoder_config.pretrained)

    def finetuned(self) -> dict[str, StoredTensors]:
        """The fine-tuned weights by task name, as stored."""
        return {name: self.load(task.checkpoint) for name, task in self.task_configs.items()}

    def pareto_model(self) -> nn.Module:
        """A fresh Pareto model with the configuration's settings."""
        method = self.config.method
        with user_errors():
            model = parametrize(self.pretrained(), self.finetuned(), copy=False, **method.model_arguments())
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

    def merging_tasks(self) -> dict[str, Task]:
        """Unlabelled images and heads; UserError naming a task without."""
        for name, task in self.task_configs.items():
            if task.merging is None:
                raise UserError(f"tasks.{name}.merging: expected unlabelled images for the entropy, got none")
        return {
            name: Task(open_images(str(task.merging), self.preprocessing), self.head(name))
            for name, task in self.task_configs.items()
        }

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of last change of each file (not of image folders): whether they are the ones they were."""
        named: list[Path | str | None] = [self.encoder_config.architecture]
        for task in self.task_configs.values():
            named += [task.head, task.merging, task.evaluation, task.training]
        for unseen in self.unseen_configs.values():
            named += [unseen.head, unseen.merging, unseen.evaluation]
        for found in self.checkpoints():
            named += found.files
        paths = [Path(name) for name in dict.fromkeys(named) if name is not None]
        return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()}

    def chance(self, names: Sequence[str]) -> list[float]:
        """What guessing would get on each task, in percent: 100 / its head's number of classes."""
        return [100.0 / self.head(name).weight.shape[0] for name in names]

    def available_merging_tasks(self) -> dict[str, Task]:
        """Unlabelled images and heads of the tasks that have both."""
        return {
            name: Task(open_images(task.merging, self.preprocessing), self.head(name))
            for name, task in self.task_configs.items()
            if task.merging is not None and task.head is not None
        }

    def training_tasks(self) -> dict[str, Task]:
        """Labelled training images and heads of the tasks that have both; UserError if the classes differ."""
        tasks = {
            name: Task(open_images(task.training, self.preprocessing), self.head(name))
            for name, task in self.task_configs.items()
            if task.training is not None and task.head is not None
        }
        for name, entry in tasks.items():
            _check_classes(name, entry, self.head(name))
        return tasks

    def unseen_tasks(self) -> dict[str, tuple[Task, Task]]:
        """The tasks without a checkpoint: unlabelled images to choose a model by, and labelled ones to judge it."""
        found = {}
        for name, task in self.unseen_configs.items():
            head = read_head(task.head, name).to(self.device)
            labelled = Task(open_images(task.evaluation, self.preprocessing), head)
            _check_classes(name, labelled, head)
            found[name] = Task(open_images(task.merging, self.preprocessing), head), labelled
        return found

    def evaluation_tasks(self) -> dict[str, Task]:
        """Labelled images and heads of the tasks that have them; UserError if none has, or if the classes differ."""
        tasks = {
            name: Task(open_images(task.evaluation, self.preprocessing), self.head(name))
            for name, task in self.task_configs.items()
            if task.evaluation is not None
        }
        if not tasks:
            raise UserError("tasks: expected `evaluation` images for at least one task, got none")
        for name, entry in tasks.items():
            _check_classes(name, entry, self.head(name))
        return tasks


def load_models(
    pretrained: str | Path,
    finetuned: Mapping[str, str | Path],
    *,
    quick_gelu: bool | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
) -> tuple[nn.Module, dict[str, StoredTensors]]:
    """A pretrained encoder and its fine-tuned copies from checkpoints of any format: what :func:`parametrize` takes.

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


def _check_classes(name: str, task: Task, head: ZeroShotHead) -> None:
    classes = head.weight.shape[0]
    if isinstance(task.images, FolderImages) and len(task.images.classes) != classes:
        raise UserError(
            f"{task.images.root}: expected {classes} sub-folders, one for each class of {name}'s head in its order, "
            f"got {len(task.images.classes)}"
        )


def check_tensors(path: Path | str, shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """UserError naming the tensors of ``path`` that are missing, extra or of another shape than ``expected``."""
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
