"""Every method on one suite of checkpoints, under the same rules: what the demo shows and the benchmarks repeat.

No choice looks at a label. Where a method has something to choose, :meth:`Study.label_free_score` chooses it on the
merging split.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pareto_merging.baselines import adamerging, task_arithmetic, weight_averaging
from pareto_merging.config import MethodSettings
from pareto_merging.evaluation import EvaluationTask, Scores, evaluate_model, evaluate_preferences
from pareto_merging.metrics import hypervolume, non_dominated, spearman
from pareto_merging.parametrize import merge
from pareto_merging.preferences import equal_preference, one_hot_preferences, two_task_grid
from pareto_merging.training import learn_pareto_set
from pareto_merging.workspace import Workspace

COEFFICIENTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
LEARNING_RATES = (3e-3, 1e-2)
# a model that is right by chance on ten classes
CHANCE = 10.0


@dataclass
class Entry:
    """One method: its scores, what it cost, and what was chosen for it; ``model`` is the merged model, if any."""

    scores: Scores
    seconds: float
    peak_bytes: int
    chosen: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None

    def to_json(self) -> dict[str, Any]:
        """``per_task`` and ``average`` accuracy in percent, ``seconds``, ``peak_bytes``, entropies, choices."""
        return {
            "per_task": {name: round(value, 2) for name, value in self.scores.accuracy.items()},
            "average": round(self.scores.average, 2),
            "seconds": round(self.seconds, 2),
            "peak_bytes": self.peak_bytes,
            "entropy": {name: round(value, 4) for name, value in self.scores.entropy.items()},
            **({"chosen": self.chosen} if self.chosen else {}),
        }


class Study:
    """The methods on one workspace.

    Args:
        workspace: checkpoints, heads and images; ``config.method`` sets Pareto Merging, and the steps and batch size of
            AdaMerging.
        coefficients, learning_rates: what task arithmetic and AdaMerging choose from.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        coefficients: Sequence[float] = COEFFICIENTS,
        learning_rates: Sequence[float] = LEARNING_RATES,
        progress: bool = True,
    ) -> None:
        self.workspace, self.progress = workspace, progress
        self.method = workspace.config.method
        self.coefficients, self.learning_rates = coefficients, learning_rates
        self.pretrained = workspace.pretrained()
        self.finetuned = workspace.finetuned()
        self.evaluation = workspace.evaluation_tasks()
        self.merging = workspace.merging_tasks()
        self._unlabelled = {
            name: EvaluationTask(_WithoutLabels(task.images), task.head) for name, task in self.merging.items()
        }

    def label_free_score(self, model: nn.Module) -> float:
        """What a choice minimises on the merging split: the mean over tasks of H(prediction) − H(mean prediction).

        That is minus the mutual information of image and prediction. The first term alone, what AdaMerging minimises,
        would reward a model that puts every image into one class.
        """
        scores = evaluate_model(model, self._unlabelled)
        return math.fsum(scores.entropy[k] - scores.mean_prediction_entropy[k] for k in scores.entropy) / len(
            scores.entropy
        )

    def label_free_set_score(self, model: nn.Module) -> float:
        """The same for a Pareto model: the mean of its score at the equal preference and of each task's own score at
        that task's one-hot preference."""
        names = self.workspace.task_names
        equal = self.label_free_score(merge(model, equal_preference(len(names))))
        own = 0.0
        for name, gamma in zip(names, one_hot_preferences(len(names)), strict=True):
            scores = evaluate_model(merge(model, gamma), {name: self._unlabelled[name]})
            own += (scores.entropy[name] - scores.mean_prediction_entropy[name]) / len(names)
        return (equal + own) / 2

    def individual(self) -> Entry:
        """Each fine-tuned model on its own task: the upper bound, at the price of K models."""
        parts = []
        start = time.perf_counter()
        for name, task in self.evaluation.items():
            model = self.workspace.encoder(self.workspace.task_configs[name].checkpoint)
            parts.append(evaluate_model(model, {name: task}))
        scores = Scores(
            _joined(part.accuracy for part in parts),
            _joined(part.entropy for part in parts),
            _joined(part.mean_prediction_entropy for part in parts),
        )
        return Entry(scores, time.perf_counter() - start, 0)

    def individual_models(self) -> dict[str, Scores]:
        """Each fine-tuned model on every task: what one gets by not merging."""
        return {
            name: evaluate_model(self.workspace.encoder(task.checkpoint), self.evaluation)
            for name, task in self.workspace.task_configs.items()
        }

    def generalist(self) -> Entry:
        """The pretrained model on every task."""
        return self._entry(lambda: (self.pretrained, {}))

    def weight_averaging(self) -> Entry:
        """Nothing to choose."""
        return self._entry(lambda: (weight_averaging.merge(self.pretrained, self.finetuned), {}))

    def task_arithmetic(self) -> Entry:
        """λ from ``coefficients``; the seconds include the search."""

        def search() -> tuple[nn.Module, dict[str, Any]]:
            models = {
                c: task_arithmetic.merge(self.pretrained, self.finetuned, coefficient=c) for c in self.coefficients
            }
            best = min(models, key=lambda c: self.label_free_score(models[c]))
            return models[best], {"coefficient": best}

        return self._entry(search)

    def adamerging(self) -> Entry:
        """Learning rate from ``learning_rates``; seconds and peak are those of the chosen run."""
        runs = []
        for rate in self.learning_rates:
            method = self.method.model_copy(update={"learning_rate": rate, "lambda_learning_rate": None})

            def learn(method: MethodSettings = method) -> tuple[nn.Module, dict[str, Any]]:
                model = adamerging.merge(
                    self.pretrained, self.finetuned, tasks=self.merging, method=method, progress=self.progress
                )
                return model, {"learning_rate": method.learning_rate}

            runs.append(measured(learn))
        (model, chosen), seconds, peak = min(runs, key=lambda run: self.label_free_score(run[0][0]))
        return Entry(evaluate_model(model, self.evaluation), seconds, peak, chosen, model)

    def learn(self, method: MethodSettings | None = None) -> tuple[nn.Module, float, int]:
        """Pareto Merging with ``method``, by default the workspace's: (Pareto model, seconds, peak bytes)."""
        method = self.method if method is None else method

        def work() -> nn.Module:
            model = self.workspace.pareto_model()
            learn_pareto_set(model, self.merging, method, progress=self.progress)
            return model

        return measured(work)

    def pareto_entries(self, model: nn.Module, seconds: float, peak: int) -> dict[str, Entry]:
        """A learned Pareto model at the equal preference, and each task at its own one-hot preference."""
        names = self.workspace.task_names
        tasks = len(names)
        merged = merge(model, equal_preference(tasks))
        equal = Entry(evaluate_model(merged, self.evaluation), seconds, peak, model=merged)
        parts = [
            evaluate_model(merge(model, gamma), {name: self.evaluation[name]})
            for name, gamma in zip(names, one_hot_preferences(tasks), strict=True)
        ]
        one_hot = Scores(
            _joined(part.accuracy for part in parts),
            _joined(part.entropy for part in parts),
            _joined(part.mean_prediction_entropy for part in parts),
        )
        return {
            "Pareto Merging (equal preference)": equal,
            "Pareto Merging (one-hot preference)": Entry(one_hot, seconds, peak),
        }

    def baselines(self) -> dict[str, Entry]:
        """Every method but Pareto Merging, by the name tables show."""
        return {
            "Individual": self.individual(),
            "Pretrained": self.generalist(),
            "Weight averaging": self.weight_averaging(),
            "Task arithmetic": self.task_arithmetic(),
            "AdaMerging": self.adamerging(),
        }

    def front(self, model: nn.Module, points: int = 11) -> list[dict[str, Any]]:
        """A two-task Pareto model at ``points`` preferences from γ₁ = 0 to 1: gamma, accuracy (%), entropy (nats)."""
        gammas = two_task_grid(points)
        scores = evaluate_preferences(model, self.evaluation, list(gammas), progress=self.progress)
        return [
            {
                "gamma": [round(value, 6) for value in gamma.tolist()],
                "accuracy": list(score.accuracy.values()),
                "entropy": list(score.entropy.values()),
            }
            for gamma, score in zip(gammas, scores, strict=True)
        ]

    def _entry(self, work: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> Entry:
        (model, chosen), seconds, peak = measured(work)
        return Entry(evaluate_model(model, self.evaluation), seconds, peak, chosen, model)


def front_metrics(front: Sequence[Mapping[str, Any]], others: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Hypervolumes of a two-task front and of other models' points above one reference point, and rank correlations.

    The reference point is chance (10 % on both tasks): fixed beforehand, below everything, the same for all.
    """
    reference = [CHANCE, CHANCE]
    points = [row["accuracy"] for row in front]
    first = [row["gamma"][0] for row in front]
    singles = [list(point) for point in others.values()]
    return {
        "reference_point": reference,
        "pareto_merging": hypervolume(points, reference),
        "baselines": {name: hypervolume([list(point)], reference) for name, point in others.items()},
        "all_baselines_together": hypervolume(singles, reference) if singles else 0.0,
        "non_dominated_points": int(non_dominated(points).sum()),
        "spearman_gamma1_entropy1": spearman(first, [row["entropy"][0] for row in front]),
        "spearman_gamma1_accuracy1": spearman(first, [row["accuracy"][0] for row in front]),
        "spearman_gamma2_entropy2": spearman([-g for g in first], [row["entropy"][1] for row in front]),
        "spearman_gamma2_accuracy2": spearman([-g for g in first], [row["accuracy"][1] for row in front]),
    }


def _joined(parts: Any) -> dict[str, float]:
    return {name: value for part in parts for name, value in part.items()}


class _WithoutLabels(Dataset[Any]):
    """A dataset with every label replaced by 0, so that no choice made with it can have seen one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.dataset[index]
        return (item[0] if isinstance(item, tuple | list) else item), 0


def measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """The result of ``work``, its seconds, and its peak memory in bytes.

    With a CUDA GPU the peak is what torch had allocated there; without, it is the resident memory of the whole process
    (libraries included), so compare differences and not ratios.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    _resident(reset=True)
    start = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return result, seconds, torch.cuda.max_memory_allocated() if on_gpu else _resident()


def _resident(reset: bool = False) -> int:
    """The process's peak resident memory in bytes; ``reset`` lets the peak start from now where the system can."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        # not Linux, or not allowed: the peak since the process began
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
