"""The groups by name."""

from benchmarks.goals.groups import GROUPS


def test_every_groups_function_is_there() -> None:
    import importlib

    for group in GROUPS:
        module, _, name = group.function.partition(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.goals.{module}"), name)), group.name
