"""``python -m benchmarks.run``: measure a suite and write one JSON file with everything needed to judge it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results

# on the GPU, in one file named after it; the others run on the CPU, each in a file named after itself
GPU_SUITES = ("kernels", "training")
CPU_SUITES = ("digits",)
# on the GPU as those for it if there is one, else on the CPU as those for that
SUITES_OF_BOTH = ("serving",)


def suite_module(name: str) -> Any:
    """``benchmarks.<suite>``, imported when it runs: a GPU machine need not have what the CPU suites need."""
    return importlib.import_module(f"benchmarks.{name}")


def _default_path(report: dict[str, Any]) -> Path:
    if report["quick"] and report.get("suite") not in CPU_SUITES:
        # a rehearsal is nobody's result
        return Path(tempfile.gettempdir()) / f"pareto-merging-rehearsal-{report['date']}.json"
    if "suite" in report:
        return results.RESULTS / f"{report['suite']}-{report['date']}.json"
    from pmkernels import dispatch

    return results.RESULTS / f"{dispatch.gpu_name(0)}-{report['date']}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--suite",
        choices=(*CPU_SUITES, *GPU_SUITES, *SUITES_OF_BOTH, "all"),
        default="digits",
        help="digits: every method on the embedded suite, on the CPU; on a CUDA GPU kernels: every kernel beside its "
        "baselines, training: an optimiser step of ViT-B/32 and ViT-L/14 beside its limit and baselines, and a grid of "
        "layers; serving: a preference per image beside the plain model and other ways to serve many, on a GPU or, a "
        "smaller grid, on the CPU; all: every suite for a GPU (default: digits)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[3, 4, 5, 6, 7],
        help="digits: suite seeds; 0 to 2 were seen in its design",
    )
    parser.add_argument("--work", type=Path, help="digits: where partial results are kept, to go on from")
    parser.add_argument("--jobs", type=int, default=1, help="digits: processes, one core each (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a few steps or tiny shapes: proves that it runs")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: in benchmarks/results)")
    chosen = parser.parse_args(arguments)
    start = time.perf_counter()
    report = results.header(["python -m benchmarks.run", *(arguments if arguments is not None else sys.argv[1:])])
    report["quick"] = chosen.quick
    if chosen.suite in CPU_SUITES:
        report |= {
            "suite": chosen.suite,
            **suite_module(chosen.suite).run(chosen.seeds, chosen.quick, work=chosen.work, jobs=chosen.jobs),
        }
        tables = suite_module(chosen.suite).markdown(report)
    elif chosen.suite in SUITES_OF_BOTH and not torch.cuda.is_available():
        report |= {
            "suite": chosen.suite,
            "environment": results.machine(),
            **suite_module(chosen.suite).run(chosen.quick),
        }
        tables = suite_module(chosen.suite).markdown(report)
    else:
        if chosen.quick and not torch.cuda.is_available():
            # before a kernel is imported: without a GPU a rehearsal interprets them
            os.environ["TRITON_INTERPRET"] = "1"
        report["environment"] = results.machine()
        report["clocks_before"] = results.clocks()
        names = (*GPU_SUITES, *SUITES_OF_BOTH) if chosen.suite == "all" else (chosen.suite,)
        report["suites"], lacking = {}, []
        for name in names:
            try:
                suite = suite_module(name)
            except ImportError as error:
                if chosen.suite != "all":
                    raise
                lacking.append(f"{name}: not run, for want of {error.name}")
                continue
            report["suites"][name] = suite.run(chosen.quick)
            # what was measured is not lost to a later suite's failure
            results.write(chosen.out or _default_path(report), report)
        report["clocks_after"] = results.clocks()
        tables = "\n".join(
            [*(suite_module(name).markdown(found) for name, found in report["suites"].items()), *lacking]
        )
    report["environment"] = {**results.machine(), "seconds_in_all": round(time.perf_counter() - start, 1)}
    out = chosen.out or _default_path(report)
    results.write(out, report)
    print(tables)
    print(out)
    measured = [report, *report.get("suites", {}).values()]
    wrong = [row for suite in measured for row in suite.get("rows", ()) if not row["matched"]]
    for row in wrong:
        print(f"WRONG {row['op']}, {row['layer']}, {row['dtype']}, {row['variant']}: error {row['error']:.2e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
