"""What ``python -m benchmarks.run`` measures, and tables of what other commands measured."""
