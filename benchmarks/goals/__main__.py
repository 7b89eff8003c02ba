"""Start the command line."""

import sys

from benchmarks.goals.cli import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # before anything was begun, or after all was written
        sys.exit(130)
