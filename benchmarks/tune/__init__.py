"""``python -m benchmarks.tune``: launch configurations and strategies measured on this GPU."""
