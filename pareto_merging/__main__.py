"""``python -m pareto_merging`` is ``pareto-merging``."""

from pareto_merging.cli.app import main

if __name__ == "__main__":
    main()
