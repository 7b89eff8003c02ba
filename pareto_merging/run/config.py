"""A run as a YAML file: typed settings. Unknown keys are errors."""

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ByteSize, Field, ValidationError, ValidationInfo, field_validator, model_validator

from pareto_merging.errors import UserError
from pareto_merging.learn.settings import MethodSettings, Strict


class Files(Strict):
    """Settings that name files, from the configuration's folder where they are read from one."""

    @field_validator("*")
    @classmethod
    def _place(cls, value: Any, info: ValidationInfo) -> Any:
        # hub ids and open_clip's names stay as they are
        key, folder = info.field_name, (info.context or {}).get("folder")
        is_name = key == "quick_gelu" or (key == "architecture" and not str(value).endswith(".json"))
        # the embedded images are no file either
        is_name = is_name or (key in ("merging", "evaluation", "training") and str(value).startswith("digits:"))
        if folder is None or value is None or is_name:
            return value
        if key in ("pretrained", "checkpoint"):
            # it takes PyTorch's seconds, which the help of the keys need not wait for
            from pareto_merging.checkpoints.hub import remote

            place, elsewhere = folder / os.path.expanduser(value), remote(value)
            return place if elsewhere is None or (elsewhere != value and place.exists()) else elsewhere
        return folder / value if key == "head" else str(folder / value)


class EncoderConfig(Files):
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


class TaskConfig(Files):
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


class UnseenConfig(Files):
    """A task that no fine-tuned model is there for."""

    head: Path = Field(description="its zero-shot head, as of a task")
    merging: str = Field(description="unlabelled images, by which the front's model of least entropy is chosen")
    evaluation: str = Field(description="labelled images")


class RunConfig(Strict):
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
    strategy: str = Field(
        "auto",
        description="how layers are computed; auto: by shape and device; cached: merged weights are kept while they "
        "stand still; streamed: one layer's merged weight at a time; fused: on a GPU, no merged weight is ever in "
        "memory; eager: plain PyTorch; or one of your own that is registered",
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

    @field_validator("strategy")
    @classmethod
    def _check_strategy(cls, name: str, info: ValidationInfo) -> str:
        # it takes PyTorch's seconds, which the help of the keys need not wait for
        from pareto_merging.model.strategy import strategy_names

        if name not in strategy_names() and not (info.context or {}).get("learned"):
            raise ValueError(f"expected one of {', '.join(strategy_names())}")
        return name

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
    def _check(self) -> "RunConfig":
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
        # it takes PyTorch's seconds, which the help of the keys need not wait for
        from pareto_merging.preferences import RESERVED_WORDS

        for name in (*(self.tasks or ()), *(self.unseen or ())):
            if name == "pretrained":
                raise ValueError("tasks: expected other names than pretrained, which is the model they came from")
            if not name.strip() or any(c in name for c in ",;=[]\n") or name.split(":")[0] in RESERVED_WORDS:
                raise ValueError(f"tasks: expected names that preferences can be given by, got {name!r}")
        if isinstance(self.tasks, list) and len(set(self.tasks)) != len(self.tasks):
            raise ValueError("tasks: expected each task once")
        return self


def read_config(path: Path, *, learned: bool = False) -> RunConfig:
    """Read and validate a run's YAML file; paths in it are relative to the file. UserError: every wrong key is named.

    ``learned``: of a finished run, whose objective, scalarisation and strategy need not be registered here.
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
        return RunConfig.model_validate(values, context={"folder": path.parent.resolve(), "learned": learned})
    except ValidationError as error:
        raise UserError(f"{path}: {describe_validation(error)}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, to which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"the key {', '.join(twice)} twice")
        return super().construct_mapping(node, deep)


_GROUPS = (RunConfig, EncoderConfig, TaskConfig, UnseenConfig, MethodSettings)
_KEYS = sorted({name for group in _GROUPS for name in group.model_fields})


def describe_validation(error: ValidationError) -> str:
    """Return one line that names every offending key."""
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


def digits_files(folder: Path, tasks: list[str] | None) -> tuple[EncoderConfig, dict[str, TaskConfig]]:
    """Return the encoder and tasks of the embedded suite as files in ``folder``. By default all eight tasks."""
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


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML for :func:`read_config`, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
