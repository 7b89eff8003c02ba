"""The table of methods, and how one is run by its name. :func:`register` adds one from outside."""

from typing import Any

from pareto_merging.methods import (
    adamerging,
    adamerging_preference,
    dare,
    data_free,
    fisher,
    individual,
    multitask,
    outer_product,
    pareto,
    pretrained,
    regmean,
    task_arithmetic,
    task_arithmetic_preference,
    ties,
    weight_averaging,
)
from pareto_merging.methods.interface import Merged, Method, Problem, check_needs

METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the table; ValueError if its key is taken."""
    if method.key in METHODS:
        raise ValueError(f"method: expected a new key, got {method.key!r}, which is taken")
    METHODS[method.key] = method
    return method


def run(name: str, problem: Problem, **choice: Any) -> Merged:
    """Run method ``name`` on a problem, with its published values where ``choice`` gives none.

    Raises:
        KeyError: no such method. ValueError: what the method needs is not there.
    """
    method = METHODS[name]
    check_needs(method, problem)
    published = method.choices(len(problem.task_names), problem.method)[0]
    return method.run(problem, {**published, **choice})


# in the order of tables
for method in (
    individual.METHOD,
    multitask.METHOD,
    pretrained.METHOD,
    weight_averaging.METHOD,
    fisher.METHOD,
    regmean.METHOD,
    task_arithmetic.METHOD,
    ties.METHOD,
    dare.METHOD,
    *adamerging.VARIANTS,
    task_arithmetic_preference.METHOD,
    adamerging_preference.METHOD,
    data_free.METHOD,
    *pareto.VARIANTS,
    *outer_product.VARIANTS,
):
    register(method)
