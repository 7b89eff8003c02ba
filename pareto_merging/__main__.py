"""``python -m pareto_merging`` is ``pareto-merging``."""

from pareto_merging.cli import main

if __name__ == "__main__":
    main()
