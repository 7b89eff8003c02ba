"""The pictures that fit a number of tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pareto_merging.measure.figures.fronts import fronts
from pareto_merging.measure.figures.parallel import parallel_coordinates
from pareto_merging.measure.figures.projections import pairwise_projections
from pareto_merging.measure.figures.sets import Set, checked, first_front
from pareto_merging.measure.figures.simplex import simplex_scatter
from pareto_merging.measure.figures.ternary import ternary


def compare_pictures(
    folder: Path,
    task_names: Sequence[str],
    sets: Sequence[Set],
    individuals: Mapping[str, Sequence[float]] | None = None,
) -> list[Path]:
    """Write the pictures that fit K tasks into ``folder`` and return their paths.

    None for K = 1 or without sets; ``front.png`` for K = 2; ``ternary.png`` (of the first set with preferences, if
    there is one), ``simplex.png`` and ``parallel.png`` for K = 3; ``parallel.png`` and ``projections.png`` from K = 4.

    ``individuals``: fine-tuned model -> accuracies [K]. Raises ValueError as :func:`.checked`.
    """
    methods = checked(task_names, sets, at_least=1) if sets else []
    if not methods or len(task_names) == 1:
        return []
    if len(task_names) == 2:
        fronts(folder / "front.png", task_names, sets, individuals)
        return [folder / "front.png"]
    written = []
    if len(task_names) == 3:
        first = first_front(methods)
        if first is not None:
            written.append(folder / "ternary.png")
            ternary(written[-1], task_names, first.gammas.tolist(), first.accuracies.tolist(), first.name)
        written.append(folder / "simplex.png")
        simplex_scatter(written[-1], task_names, sets)
    written.append(folder / "parallel.png")
    parallel_coordinates(written[-1], task_names, sets, individuals)
    if len(task_names) > 3:
        written.append(folder / "projections.png")
        pairwise_projections(written[-1], task_names, sets)
    return written
