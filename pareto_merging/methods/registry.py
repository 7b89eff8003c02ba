"""The table of methods, and how one is run by its name. :func:`register` adds one from outside."""

import importlib
from typing import Any

from pareto_merging.methods import FILES
from pareto_merging.methods.interface import Merged, Method, Problem, check_needs
from pareto_merging.system.register import add_member

METHODS: dict[str, Method] = {}


def register(method: Method, *, replace: bool = False) -> Method:
    """Add a method to the table by its key. Raises ValueError as :func:`.register.add_member`."""
    return add_member(METHODS, "method", method.key, method, replace=replace)


def run(name: str, problem: Problem, **choice: Any) -> Merged:
    """Run method ``name`` on a problem, with its published values where ``choice`` gives none.

    Raises KeyError for no such method, ValueError where what the method needs is not there.
    """
    method = METHODS[name]
    check_needs(method, problem)
    published = method.choices(len(problem.task_names), problem.method)[0]
    return method.run(problem, {**published, **choice})


for key, file in FILES.items():
    module: Any = importlib.import_module(f"pareto_merging.methods.{file}")
    own: tuple[Method, ...] = module.VARIANTS if hasattr(module, "VARIANTS") else (module.METHOD,)
    register({method.key: method for method in own}[key])
