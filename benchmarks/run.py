"""``python -m benchmarks.run``: measure a suite and write one JSON file with everything needed to judge it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import digits
from pareto_merging.checkpoints.files import write_json
from pareto_merging.demo import environment

RESULTS = Path(__file__).parent / "results"
SUITES = ("digits",)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--suite", choices=SUITES, default="digits", help="digits: every method on the embedded suite, on the CPU"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[3, 4, 5], help="suite seeds; 0 to 2 were seen in its design"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps: proves that it runs, measures nothing")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: in benchmarks/results)")
    chosen = parser.parse_args(arguments)
    start = time.perf_counter()
    report: dict[str, Any] = {
        "suite": chosen.suite,
        "command": " ".join(["python -m benchmarks.run", *(arguments if arguments is not None else sys.argv[1:])]),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "quick": chosen.quick,
        **digits.run(chosen.seeds, chosen.quick),
    }
    report["environment"] = {**environment(), "seconds_in_all": round(time.perf_counter() - start, 1)}
    out = chosen.out or RESULTS / f"{chosen.suite}-{report['date']}.json"
    write_json(out, report)
    print(digits.markdown(report))
    print(out)


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True, cwd=RESULTS.parent
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


if __name__ == "__main__":
    main()
