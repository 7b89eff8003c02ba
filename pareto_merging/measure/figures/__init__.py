"""Pictures that compare merging methods, one file a picture."""

from pareto_merging.measure.figures.chosen import compare_pictures
from pareto_merging.measure.figures.fronts import fronts, two_task_front
from pareto_merging.measure.figures.parallel import parallel_coordinates
from pareto_merging.measure.figures.projections import pairwise_projections
from pareto_merging.measure.figures.sets import Set
from pareto_merging.measure.figures.simplex import simplex_scatter
from pareto_merging.measure.figures.ternary import ternary

__all__ = [
    "Set",
    "compare_pictures",
    "fronts",
    "pairwise_projections",
    "parallel_coordinates",
    "simplex_scatter",
    "ternary",
    "two_task_front",
]
