"""Measurements that are committed: `python -m benchmarks.run --help`."""
