"""Microbenchmarks of each operation for pytest-benchmark: ``pytest benchmarks/micro --benchmark-only``."""
