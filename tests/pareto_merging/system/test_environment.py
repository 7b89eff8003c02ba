"""Where figures were measured, and how much memory a piece of work takes."""

import json
import subprocess
import sys

from pareto_merging.system.environment import environment


def test_environment_is_json_with_versions() -> None:
    found = environment()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["torch"].startswith("2.") and found["threads"] == 1 and found["cpu"]


def test_measured_sees_memory() -> None:
    """In a process of its own: this one's allocator may serve 256 MiB from what earlier tests have left."""
    code = (
        "from pareto_merging.system.environment import measured\n"
        "small, large = (measured(lambda: len(b'x' * size)) for size in (1, 256 * 2**20))\n"
        "assert large[0] == 256 * 2**20 and large[1] > 0\n"
        "print(large[2] - small[2])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(finished.stdout) >= 200 * 2**20
