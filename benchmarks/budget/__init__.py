"""``python -m benchmarks.budget``: every kernel compiled without a GPU, and what it takes."""
