"""``python -m benchmarks.checkpoints``: full-size models of every format, from their files and back."""
