"""``python -m benchmarks.goals``: the project's goals on a GPU, measured in order of value."""
