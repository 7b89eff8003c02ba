"""Start the command line."""

import sys

from benchmarks.limits.page import main

if __name__ == "__main__":
    sys.exit(main())
