"""AdaMerging + preference: min_λ Σ_k γ_k S_k, one run for every γ.

Equation 4 of arXiv 2408.12105: linear scalarisation at a fixed preference; the equal preference is AdaMerging. It costs
a run and a model per preference.
"""

import time
from collections.abc import Mapping
from typing import Unpack

from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import adamerging
from pareto_merging.methods.interface import Copies, Merged, Method, Run, learning, learning_rates, task_names


def merge(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    tasks: Mapping[str, Task],
    method: MethodSettings | None = None,
    **run: Unpack[Run],
) -> Merged:
    """Learn a model for every preference when it is first asked for, and keep it.

    Arguments as :func:`adamerging.merge`. ``facts`` counts the ``runs`` and their ``seconds``. Each run keeps its
    checkpoint in a folder of its own under ``folder``.
    """
    method = adamerging.settings() if method is None else method
    known: dict[tuple[float, ...], nn.Module] = {}
    facts = {"runs": 0, "seconds": 0.0}

    def at(gamma: Tensor) -> nn.Module:
        key = tuple(round(value, 6) for value in gamma.tolist())
        if key not in known:
            start = time.perf_counter()
            own = run.copy()
            if (folder := run.get("folder")) is not None:
                own["folder"] = folder / "-".join(f"{value:.6g}" for value in key)
            fixed = method.model_copy(update={"preference": "fixed", "gamma": tuple(gamma.tolist())})
            known[key] = adamerging.merge(pretrained, finetuned, tasks=tasks, method=fixed, **own).model()
            facts["runs"] += 1
            facts["seconds"] += time.perf_counter() - start
        return known[key]

    return Merged(task_names(finetuned), at, preference_aware=True, facts=facts)


METHOD = Method(
    "adamerging-preference",
    "AdaMerging + preference",
    "images",
    learning(merge, adamerging.settings_of),
    learning_rates(1e-3),
    stores="1 model per preference",
    runs_per_preference=True,
    learns=True,
)
