"""How a Pareto set is learned: typed settings, with the published presets. Unknown keys are errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PRESETS: dict[str, dict[str, Any]] = {
    # Chen & Kwok, ICML 2025, experiment setup
    "icml2025": {"cosine": 0.0, "tensor_norm": 0.1, "concentration": 0.1},
    # arXiv 2408.12105 v1, section 4.1 and appendix 1
    "arxiv-v1": {"cosine": 0.1, "tensor_norm": 1.0, "concentration": 1.0},
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MethodSettings(Strict):
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
