"""``python -m benchmarks.limits``: what layers and models cost at the least."""
