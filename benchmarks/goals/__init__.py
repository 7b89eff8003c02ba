"""``python -m benchmarks.goals``: what the project aims at on a GPU, measured in order of value until time is up."""
