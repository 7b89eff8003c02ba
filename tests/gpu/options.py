"""Print pytest's options for a GPU machine: a process a core, and a time limit for each test.

``python tests/gpu/options.py [SECONDS]``; exits with 2 where torch sees no CUDA GPU. What is not installed is left out.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence

import torch

# of GPU memory: a context, the compiled kernels, and a full-size layer with its float64 reference
BYTES_EACH = 4 * 2**30


def options(cores: int, memory: int, seconds: int) -> list[str]:
    """Return the options for that many cores and bytes of GPU memory."""
    chosen = []
    if importlib.util.find_spec("xdist") is not None:
        chosen += ["-n", str(max(min(cores, memory // BYTES_EACH), 1))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # a kernel that hangs blocks in C, where no signal is handled: the process ends, and pytest-xdist starts another
        chosen += [f"--timeout={seconds}", "--timeout-method=thread"]
    return chosen


def main(arguments: Sequence[str]) -> int:
    """Run the command line; the exit code."""
    if not torch.cuda.is_available():
        print("expected a CUDA GPU that torch sees, got none", file=sys.stderr)
        return 2
    seconds = int(arguments[0]) if arguments else 60
    cores, memory = len(os.sched_getaffinity(0)), torch.cuda.get_device_properties(0).total_memory
    print(*options(cores, memory, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
