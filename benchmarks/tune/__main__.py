"""Start the command line."""

import os
import sys

import torch

if __name__ == "__main__":
    if "--quick" in sys.argv and not torch.cuda.is_available():
        # before a kernel is imported: without a GPU a rehearsal interprets them
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.tune.cli import main

    sys.exit(main())
