"""Start the command line."""

import sys

from benchmarks.goals.cli import main

if __name__ == "__main__":
    sys.exit(main())
