"""Typed settings: of the method, and of a run as a YAML file. Unknown keys are errors."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from pareto_merging.checkpoints.hub import remote
from pareto_merging.errors import UserError

PRESETS: dict[str, dict[str, Any]] = {
    # Chen & Kwok, ICML 2025, experiment setup
    "icml2025": {"cosine": 0.0, "tensor_norm": 0.1, "concentration": 0.1},
    # arXiv 2408.12105 v1, section 4.1 and appendix 1
    "arxiv-v1": {"cosine": 0.1, "tensor_norm": 1.0, "concentration": 1.0},
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MethodSettings(_Strict):
    """How a Pareto set is learned. "Our reading" marks what the paper leaves open."""

    preset: Literal["icml2025", "arxiv-v1"] = Field("icml2025", description="where the fields not given come from")
    objective: Literal["entropy", "weight-distance"] = Field(
        "entropy", description="S_k: entropy of the predictions (unlabelled images), or ‖W(γ) − W_k‖² (no data)"
    )
    scalarization: Literal["smooth-tchebycheff", "tchebycheff", "linear"] = Field(
        "smooth-tchebycheff", description="how S_1 … S_K become one loss at γ"
    )
    mu: float = Field(
        0.1, gt=0, description="smoothing of the Tchebycheff scalarisation; our reading, the paper has none"
    )
    # the defaults are icml2025's; _fill_from_preset puts in another preset's
    cosine: float = Field(
        0.0, ge=0, description="β₁ of −cos(S, 1/γ); arxiv-v1: 0.1 (our reading of its order), icml2025: 0"
    )
    tensor_norm: float = Field(
        0.1, ge=0, description="β₂ of ‖A·C·Bᵀ‖_F; icml2025: its β = 0.1, arxiv-v1: 1 (both our reading)"
    )
    preference: Literal["dirichlet", "equal", "fixed"] = Field(
        "dirichlet", description="γ of each step: sampled, always equal (one trade-off, as AdaMerging), or `gamma`"
    )
    gamma: tuple[float, ...] | None = Field(None, description="the one γ learned for with `preference: fixed`")
    concentration: float = Field(
        0.1, gt=0, description="p of γ ~ Dirichlet(p·1); icml2025: p = 0.1 (our reading), arxiv-v1: 1, uniform"
    )
    preferences_per_step: int = Field(1, ge=1, description="γ per step; each costs a forward and backward per task")
    information_maximisation: float = Field(
        0.0, ge=0, description="weight of a reward for the entropy of the mean prediction; not in the paper"
    )
    normalize_distance: bool = Field(
        True, description="weight-distance in units of ‖τ_k‖², so that tasks count alike; our reading"
    )
    preprocess: Literal["none", "ties", "dare"] = Field(
        "none", description="of the task vectors: TIES's trimming and sign election (Pareto Merging++), or DARE's drops"
    )
    density: float = Field(0.2, gt=0, le=1, description="the share of its entries a task vector keeps under that")
    core: Literal["tensor", "outer-product", "outer-vector"] = Field(
        "tensor", description="how γ enters the low-rank term; the outer products are the paper's variations, rank K"
    )
    rank: int = Field(16, ge=1, le=4096, description="r of A·(G ×₃ γ)·Bᵀ")
    low_rank: Literal["attention", "in-projection", "all", "none"] = Field(
        "attention", description="which matrices have the low-rank term"
    )
    init_lambda: float = Field(0.3, description="where every λ starts")
    learn_lambda: bool = Field(True, description="false: λ stays where it starts")
    clamp_lambda: bool = Field(
        False, description="use λ clamped to [0, 1], as the published AdaMerging code does; outside it has no gradient"
    )
    granularity: Literal["tensor", "module", "block", "model"] = Field("tensor", description="what shares one λ vector")
    buffers: Literal["pretrained", "average"] = Field(
        "pretrained", description="batch norm's statistics: the pretrained model's, or the fine-tuned ones' average"
    )
    steps: int | None = Field(
        None, ge=0, description="optimiser steps; default 2000 for 2 tasks to 4000 for 8 or more, straight between"
    )
    batch_size: int = Field(32, ge=1, le=2**20, description="images per task and step")
    learning_rate: float = Field(1e-3, gt=0, description="Adam's")
    lambda_learning_rate: float | None = Field(
        None, gt=0, description="of λ, where it differs: short runs want it larger; default learning_rate, the paper's"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's momentum parameters")
    seed: int = Field(0, ge=0, lt=2**63, description="of the batches, the preferences, and the start of A and B")
    collapse_threshold: float = Field(
        0.5, ge=0, le=1, description="warn when a task's mean prediction keeps less than this share of its entropy"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            # an unknown preset is refused by its own field
            preset = str(values.get("preset", "icml2025"))
            return {**PRESETS.get(preset, PRESETS["icml2025"]), **values}
        return values

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("expected two numbers in [0, 1)")
        return betas

    @model_validator(mode="after")
    def _check_gamma(self) -> MethodSettings:
        if (self.gamma is not None) != (self.preference == "fixed"):
            raise ValueError("gamma: expected one with preference: fixed, and none without")
        return self

    def model_arguments(self) -> dict[str, Any]:
        """The settings that are the model's, as keyword arguments of :func:`pareto_merging.parametrize`."""
        names = ("rank", "low_rank", "init_lambda", "granularity", "buffers", "seed", "preprocess", "density", "core")
        return {name: getattr(self, name) for name in names}

    def steps_for(self, tasks: int) -> int:
        """``steps``, or the preset's: 2000 for two tasks, 4000 for eight (the paper's), straight between (ours)."""
        if self.steps is not None:
            return self.steps
        return 2000 + round(2000 * (min(max(tasks, 2), 8) - 2) / 6)


class EncoderConfig(_Strict):
    architecture: str | None = Field(
        None,
        description="an open_clip model name (ViT-B-32), or a JSON file of VisionTransformer's arguments; default: as "
        "the pretrained checkpoint says",
    )
    pretrained: Path | str = Field(
        description="the vision encoder all tasks were fine-tuned from: a file or folder of any format, a hub id "
        "(openai/clip-vit-base-patch32), or open_clip:NAME/TAG"
    )
    quick_gelu: bool | None = Field(
        None,
        description="QuickGELU, as OpenAI's weights want it; default: as the checkpoint says, false where it does not",
    )


class TaskConfig(_Strict):
    checkpoint: Path | str = Field(description="the fine-tuned vision encoder, as `pretrained`")
    head: Path | None = Field(
        None,
        description="the zero-shot head: safetensors with `weight` [classes, dim] and metadata `logit_scale`, or the "
        "task-vectors release's head_<Dataset>Val.pt",
    )
    merging: str | None = Field(
        None,
        description="unlabelled images: a folder, or a safetensors file with normalised `images` [n, 3, H, W]; not "
        "needed for weight-distance",
    )
    evaluation: str | None = Field(
        None, description="labelled images: a folder with one sub-folder per class, or safetensors with `labels` too"
    )
    training: str | None = Field(
        None,
        description="labelled images for `compare`'s multi-task training, the upper bound; nothing else reads them",
    )


class UnseenConfig(_Strict):
    """A task that no fine-tuned model is there for."""

    head: Path = Field(description="its zero-shot head, as of a task")
    merging: str = Field(description="unlabelled images, by which the front's model of least entropy is chosen")
    evaluation: str = Field(description="labelled images")


class RunConfig(_Strict):
    """A run: which checkpoints and images, and how the Pareto set is learned."""

    suite: Literal["digits"] | None = Field(
        None, description="an embedded suite instead of `encoder` and `tasks` of files"
    )
    encoder: EncoderConfig | None = None
    tasks: list[str] | dict[str, TaskConfig] | None = Field(
        None, description="by name; of a suite, a list of its tasks"
    )
    unseen: list[str] | dict[str, UnseenConfig] | None = Field(
        None, description="tasks without a checkpoint, for `compare`; of a suite, a list of its other tasks"
    )
    method: MethodSettings = Field(default_factory=lambda: MethodSettings.model_validate({}))
    device: str = Field("auto", description="auto: a CUDA GPU where there is one, otherwise the CPU")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="of the frozen weights and the images; task vectors are made of weights as stored and rounded once",
    )
    strategy: Literal["auto", "cached", "fused", "streamed", "eager"] = Field(
        "auto",
        description="how layers are computed; cached: merged weights are kept while they stand still; fused: on a GPU, "
        "no merged weight is ever in memory",
    )
    memory_budget: ByteSize | None = Field(
        None,
        ge=0,
        description="what kept merged weights may take (6 GiB), with strategy auto or cached; by default no limit, and "
        "with auto on a GPU half of what is free",
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto", description="on a GPU, capture a training step once and replay it; auto: where the model can be"
    )
    tasks_at_once: Literal["one", "all"] = Field(
        "one", description="all: one forward and backward of all tasks' images, faster at K times the activation memory"
    )
    workers: int = Field(0, ge=0, le=64, description="processes that load images, for each task")

    @field_validator("cuda_graphs", mode="before")
    @classmethod
    def _read_on_and_off(cls, value: Any) -> Any:
        # YAML reads a bare on and off as true and false
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _refuse_true_and_false(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("expected a number of bytes (6 GiB)")
        return value

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.suite is not None:
            if self.encoder is not None:
                raise ValueError("expected either suite or encoder, got both")
            if isinstance(self.tasks, dict):
                raise ValueError("tasks: expected a list of the suite's tasks, got a mapping")
        else:
            if self.encoder is None:
                raise ValueError("expected suite: digits, or encoder and tasks; got neither")
            if not isinstance(self.tasks, dict):
                raise ValueError("tasks: expected a mapping from task name to checkpoint, head and images")
        if self.memory_budget is not None and self.strategy not in ("auto", "cached"):
            raise ValueError(f"memory_budget: expected None for strategy {self.strategy!r}, which keeps nothing")
        if self.unseen is not None and isinstance(self.unseen, dict) != (self.suite is None):
            raise ValueError("unseen: expected a list of the suite's tasks, or a mapping where there is no suite")
        both = sorted(set(self.unseen or ()) & set(self.tasks or ()))
        if both:
            raise ValueError(f"unseen: expected tasks that are not merged, got {', '.join(both)}")
        if self.tasks is not None and len(self.tasks) < 1:
            raise ValueError("tasks: expected at least one")
        for name in (*(self.tasks or ()), *(self.unseen or ())):
            bad = [c for c in ",;=[]\n" if c in name]
            if name == "pretrained":
                raise ValueError("tasks: expected other names than pretrained, which is the model they came from")
            words = ("equal", "one-hot", "priority", "grid", "lattice", "energy", "dirichlet")
            if not name.strip() or bad or name.split(":")[0] in words:
                raise ValueError(f"tasks: expected names that preferences can be given by, got {name!r}")
        if isinstance(self.tasks, list) and len(set(self.tasks)) != len(self.tasks):
            raise ValueError("tasks: expected each task once")
        return self


def read_config(path: Path) -> RunConfig:
    """Read and validate a run's YAML file; relative paths in it are relative to the file.

    Raises:
        UserError: the file is missing, is no YAML mapping, has an unknown key or a value out of range: all are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: expected a YAML file, got {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a YAML file, got bytes that are not UTF-8 text") from error
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    try:
        return _absolute(RunConfig.model_validate(values), path.parent.resolve())
    except ValidationError as error:
        raise UserError(f"{path}: {describe_validation(error)}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key given twice is an error and not a matter of order."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"the key {', '.join(twice)} twice")
        return super().construct_mapping(node, deep)


_KEYS = sorted(
    {
        name
        for group in (RunConfig, EncoderConfig, TaskConfig, UnseenConfig, MethodSettings)
        for name in group.model_fields
    }
)


def describe_validation(error: ValidationError) -> str:
    """One line that names every offending key."""
    lines = []
    # unknown keys are what to mend first
    for item in sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden"):
        if isinstance(item["input"], dict) and item["loc"] and item["loc"][-1] == "list[str]":
            # the other half of what `tasks` may be
            continue
        # pydantic adds the member of a union to the location
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("list[", "dict[")))
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
            lines.append(f"unknown key {where}" + (f" (near: {near[0]})" if near else ""))
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = repr(item["input"])
            got = got if len(got) <= 80 else f"{got[:77]}…"
            lines.append(f"{where}: {message}, got {got}" if where else message)
    return "; ".join(dict.fromkeys(lines))


def _absolute(config: RunConfig, base: Path) -> RunConfig:
    if config.encoder is None or not isinstance(config.tasks, dict):
        return config
    architecture = config.encoder.architecture
    is_file = architecture is not None and architecture.endswith(".json")
    encoder = {
        "pretrained": _checkpoint(base, config.encoder.pretrained),
        "architecture": str(base / architecture) if architecture is not None and is_file else architecture,
    }
    tasks = {
        name: task.model_copy(
            update={
                "checkpoint": _checkpoint(base, task.checkpoint),
                "head": None if task.head is None else base / task.head,
                "merging": None if task.merging is None else str(base / task.merging),
                "evaluation": None if task.evaluation is None else str(base / task.evaluation),
                "training": None if task.training is None else str(base / task.training),
            }
        )
        for name, task in config.tasks.items()
    }
    unseen = config.unseen
    if isinstance(unseen, dict):
        unseen = {
            name: task.model_copy(
                update={
                    "head": base / task.head,
                    "merging": str(base / task.merging),
                    "evaluation": str(base / task.evaluation),
                }
            )
            for name, task in unseen.items()
        }
    files = {"encoder": config.encoder.model_copy(update=encoder), "tasks": tasks, "unseen": unseen}
    return config.model_copy(update=files)


def _checkpoint(base: Path, source: Path | str) -> Path | str:
    """Relative to the configuration's folder, unless it is a hub id (written out then) or an open_clip tag."""
    place, elsewhere = base / os.path.expanduser(source), remote(source)
    if elsewhere is None or (elsewhere != source and place.exists()):
        return place
    return elsewhere


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, with every default written out; :func:`read_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
