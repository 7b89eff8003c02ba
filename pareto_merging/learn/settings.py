"""How a Pareto set is learned: typed settings, with the published presets. Unknown keys are errors.

The settings are given flat, ``MethodSettings(rank=4, steps=100)``, and so they stand in files; in code they are read by
group: ``settings.loss.mu``, ``settings.optimiser.learning_rate``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.scalarize import SCALARIZATIONS

PRESETS: dict[str, dict[str, Any]] = {
    # Chen & Kwok, ICML 2025, experiment setup
    "icml2025": {"cosine": 0.0, "tensor_norm": 0.1, "concentration": 0.1},
    # arXiv 2408.12105 v1, section 4.1 and appendix 1
    "arxiv-v1": {"cosine": 0.1, "tensor_norm": 1.0, "concentration": 1.0},
    # ours: docs/study.md says why each is what it is
    "expert": {
        "objective": "distillation",
        "scalarization": "linear",
        "cosine": 0.0,
        "tensor_norm": 0.0,
        "preference": "per-item",
        "concentration": 0.3,
        "constant_rank": 32,
        "start": "sequential",
        "steps": 200,
        "learning_rate": 1e-3,
        "lambda_learning_rate": 1e-2,
        "schedule": "cosine",
        "warm_up": 10,
        "few_images": "regularise",
    },
}
# under which learning at full rates follows the images and not the task: docs/study.md
FEW_IMAGES = 128
# as the keys stand in files, and everywhere: what is new comes last
_ORDER = (
    *("preset", "objective", "scalarization", "mu", "cosine", "tensor_norm", "preference", "gamma", "concentration"),
    *("preferences_per_step", "information_maximisation", "normalize_distance", "preprocess", "density", "core"),
    *("rank", "low_rank", "init_lambda", "learn_lambda", "clamp_lambda", "granularity", "buffers", "steps"),
    *("batch_size", "learning_rate", "lambda_learning_rate", "betas", "seed", "collapse_threshold"),
    *("checkpoint_every", "temperature", "entropy_weight", "features_weight", "teacher_outputs", "constant_rank"),
    *("start", "start_images", "ridge", "schedule", "warm_up", "few_images", "held_back"),
)


@dataclass(frozen=True)
class OneOf:
    """A field's annotation: its value is a name in a table. In a finished run (``context``) it may be any."""

    table: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str, info: ValidationInfo) -> str:
        if name not in self.table and not (info.context or {}).get("learned"):
            raise ValueError(f"expected one of {', '.join(self.table)}")
        return name


class Strict(BaseModel):
    """Settings that cannot change and know all their keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Strict):
    """What :func:`pareto_merging.parametrize` is told."""

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
    constant_rank: int = Field(
        0,
        ge=0,
        le=4096,
        description="r_c of A_c·B_cᵀ, a term on every matrix that no preference changes; not published",
    )
    init_lambda: float = Field(0.3, description="where every λ starts")
    granularity: Literal["tensor", "module", "block", "model"] = Field("tensor", description="what shares one λ vector")
    buffers: Literal["pretrained", "average"] = Field(
        "pretrained", description="batch norm's statistics: the pretrained model's, or the fine-tuned ones' average"
    )


class StartSettings(Strict):
    """What learning begins with."""

    start: Literal["pretrained", "regmean", "sequential"] = Field(
        "pretrained",
        description="the base: the pretrained weights, RegMean's merge, or the sequential closed form, which finds the "
        "low-rank terms too; not published",
    )
    start_images: int = Field(400, ge=1, description="unlabelled images of each task that such a merge looks at")
    ridge: float = Field(1e-3, gt=0, description="ρ of the sequential closed form, in units of the mean diagonal")


class LossSettings(Strict):
    """What is minimised."""

    preset: Literal["icml2025", "arxiv-v1", "expert"] = Field(
        "icml2025", description="where the fields not given come from; expert is ours, the others are published"
    )
    objective: Annotated[str, OneOf(OBJECTIVES)] = Field(
        "entropy",
        description="S_k: entropy of the predictions, distance to the fine-tuned model's predictions (distillation) or "
        "features, all on unlabelled images; or ‖W(γ) − W_k‖² (no data)",
    )
    temperature: float = Field(4.0, gt=0, description="T of distillation: T²·KL of the softmax of logits / T")
    entropy_weight: float = Field(0.0, ge=0, description="weight of the entropy beside distillation or features")
    features_weight: float = Field(0.0, ge=0, description="weight of the features' cosine distance beside distillation")
    teacher_outputs: Literal["auto", "cached", "in-step"] = Field(
        "auto",
        description="what a fine-tuned model says of an image: computed once and kept, or in every step, for images "
        "that differ each time they are read; auto finds out",
    )
    scalarization: Annotated[str, OneOf(SCALARIZATIONS)] = Field(
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
    information_maximisation: float = Field(
        0.0, ge=0, description="weight of a reward for the entropy of the mean prediction; not in the paper"
    )
    normalize_distance: bool = Field(
        True, description="weight-distance in units of ‖τ_k‖², so that tasks count alike; our reading"
    )


class SamplingSettings(Strict):
    """What a step is given: preferences and images."""

    preference: Literal["dirichlet", "equal", "fixed", "per-item"] = Field(
        "dirichlet",
        description="γ of each step: sampled, always equal (one trade-off, as AdaMerging), or `gamma`; per-item: one "
        "for each image of task k from Dirichlet(p·1 + e_k), which is the linear scalarisation's gradient",
    )
    gamma: tuple[float, ...] | None = Field(None, description="the one γ learned for with `preference: fixed`")
    concentration: float = Field(
        0.1, gt=0, description="p of γ ~ Dirichlet(p·1); icml2025: p = 0.1 (our reading), arxiv-v1: 1, uniform"
    )
    preferences_per_step: int = Field(
        1,
        ge=1,
        description="γ per step; each costs a forward and backward per task; per-item where a model cannot: γ per "
        "task and step, at least 4",
    )
    batch_size: int = Field(32, ge=1, le=2**20, description="images per task and step")
    seed: int = Field(0, ge=0, lt=2**63, description="of the batches, the preferences, and the start of A and B")

    @model_validator(mode="after")
    def _check_gamma(self) -> "SamplingSettings":
        if (self.gamma is not None) != (self.preference == "fixed"):
            raise ValueError("gamma: expected one with preference: fixed, and none without")
        return self


class OptimiserSettings(Strict):
    """How what is learned is changed."""

    learn_lambda: bool = Field(True, description="false: λ stays where it starts")
    clamp_lambda: bool = Field(
        False, description="use λ clamped to [0, 1], as the published AdaMerging code does; outside it has no gradient"
    )
    steps: int | None = Field(
        None, ge=0, description="optimiser steps; default 2000 for 2 tasks to 4000 for 8 or more, straight between"
    )
    learning_rate: float = Field(1e-3, gt=0, description="Adam's")
    lambda_learning_rate: float | None = Field(
        None, gt=0, description="of λ, where it differs: short runs want it larger; default learning_rate, the paper's"
    )
    schedule: Literal["constant", "cosine"] = Field("constant", description="of both rates; cosine: to zero")
    warm_up: int = Field(
        0, ge=0, description="steps in which both rates rise: Adam's first are as large as any, whatever the gradient"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's momentum parameters")
    few_images: Literal["as-given", "regularise"] = Field(
        "as-given",
        description="regularise: where a task has fewer than 128 images, a stronger ridge, a tenth of the rates and a "
        "fifth of the images held back; the log says what was chosen",
    )
    held_back: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="share of each task's images kept aside; the state of best agreement there is kept",
    )

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("expected two numbers in [0, 1)")
        return betas


class LogSettings(Strict):
    """What is warned of and kept on the way; nothing of it changes the result."""

    collapse_threshold: float = Field(
        0.5, ge=0, le=1, description="warn when a task's mean prediction keeps less than this share of its entropy"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")


Kind = TypeVar("Kind", bound=Strict)


class _Group(Generic[Kind]):
    """An attribute: the fields of one group, as all settings have them."""

    def __init__(self, kind: type[Kind]) -> None:
        self.kind = kind

    def __get__(self, settings: Any, owner: Any = None) -> Kind:
        if settings is None:
            return self  # type: ignore[return-value]
        return self.kind.model_construct(**{name: getattr(settings, name) for name in self.kind.model_fields})


class MethodSettings(LogSettings, OptimiserSettings, SamplingSettings, StartSettings, ModelSettings, LossSettings):
    """How a Pareto set is learned. "Our reading" marks what the paper leaves open."""

    model: ClassVar[_Group[ModelSettings]] = _Group(ModelSettings)
    begin: ClassVar[_Group[StartSettings]] = _Group(StartSettings)
    loss: ClassVar[_Group[LossSettings]] = _Group(LossSettings)
    sampling: ClassVar[_Group[SamplingSettings]] = _Group(SamplingSettings)
    optimiser: ClassVar[_Group[OptimiserSettings]] = _Group(OptimiserSettings)
    log: ClassVar[_Group[LogSettings]] = _Group(LogSettings)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            # an unknown preset is refused by its own field
            preset = str(values.get("preset", "icml2025"))
            return {**PRESETS.get(preset, PRESETS["icml2025"]), **values}
        return values

    @model_validator(mode="after")
    def _check_together(self) -> "MethodSettings":
        kind = OBJECTIVES.get(self.objective)
        if kind is not None and self.held_back and not kind.has_teachers:
            what = f"0 with the objective {self.objective}, which has no teachers to agree with"
            raise ValueError(f"held_back: expected {what}, got {self.held_back:g}")
        if self.preference == "per-item":
            if kind is not None and kind.needs == "weights":
                what = f"another than per-item with the objective {self.objective}, which looks at no images"
                raise ValueError(f"preference: expected {what}")
            if self.scalarization != "linear":
                what = "linear with preference: per-item, which nothing else can be written as"
                raise ValueError(f"scalarization: expected {what}, got {self.scalarization}")
            if self.cosine:
                raise ValueError(f"cosine: expected 0 with preference: per-item, got {self.cosine:g}")
            if self.core != "tensor":
                raise ValueError(f"core: expected tensor with preference: per-item, got {self.core}")
        if self.start != "pretrained" and self.clamp_lambda:
            raise ValueError("clamp_lambda: expected false where start is a merge, from which λ is an offset, got true")
        return self

    def model_arguments(self) -> dict[str, Any]:
        """Return the settings that are the model's, as keyword arguments of :func:`pareto_merging.parametrize`."""
        return {**self.model.model_dump(), "seed": self.seed}

    def check_model(self, built: Mapping[str, Any], *, has_core: bool = True, start: str = "pretrained") -> None:
        """Raise ValueError if a setting that was given contradicts what a model was ``built`` with.

        What was not given contradicts nothing, but settings that were dumped and read again count as given. Nothing
        contradicts a function of the user's own. ``init_lambda`` is where λ started, wherever it is now; ``rank``
        counts where the model ``has_core`` of that size, ``density`` where task vectors were thinned; ``start`` is what
        the model's base is. The seed is that of the batches too, so it may differ.
        """
        given = self.model_fields_set & ModelSettings.model_fields.keys()
        if not has_core or built.get("core") != "tensor":
            given -= {"rank"}
        if built.get("preprocess") not in ("ties", "dare"):
            given -= {"density"}
        wrong = [
            f"{name} is {getattr(self, name)!r} and the model's {built[name]!r}"
            for name in ModelSettings.model_fields
            if name in given and built.get(name, "function") not in ("function", getattr(self, name))
        ]
        if "start" in self.model_fields_set and self.start != start:
            wrong.append(f"start is {self.start!r} and the model's {start!r}")
        if wrong:
            raise ValueError(f"settings: expected none that contradicts the model, but {', '.join(wrong)}")

    def for_images(self, images: int) -> "MethodSettings":
        """Return the settings for tasks of so many images or more, regularised where few."""
        if self.few_images != "regularise" or images >= FEW_IMAGES:
            return self
        slow = {"learning_rate": self.learning_rate / 10}
        if self.lambda_learning_rate is not None:
            slow["lambda_learning_rate"] = self.lambda_learning_rate / 10
        kept: dict[str, Any] = {"ridge": max(self.ridge, 0.1), "few_images": "as-given"}
        if OBJECTIVES[self.objective].has_teachers:
            kept["held_back"] = self.held_back or 0.2
        return self.model_copy(update={**slow, **kept})

    def steps_for(self, tasks: int) -> int:
        """Return ``steps``, or 2000 for two tasks to 4000 for eight. That is the paper's; straight between is ours."""
        if self.steps is not None:
            return self.steps
        return 2000 + round(2000 * (min(max(tasks, 2), 8) - 2) / 6)


# help, errors and files have one order, and it is not that of the classes
MethodSettings.__pydantic_fields__ = {name: MethodSettings.model_fields[name] for name in _ORDER}
MethodSettings.model_rebuild(force=True)
