"""``python -m benchmarks.run``: measure a suite and write one JSON file with everything needed to judge it.

On a GPU the file is written again after every row, and SIGTERM or the time limit end the run with what there is. What
the project aims at, in minutes and in order of value, is ``python -m benchmarks.goals``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.common.suites import SUITES, Save, measured_on

# on the GPU, in one file named after it; the others run on the CPU, each in a file named after itself
GPU_SUITES, CPU_SUITES, SUITES_OF_BOTH = (measured_on(device) for device in ("gpu", "cpu", "both"))
EXIT_WRONG, EXIT_TIME = 1, 3

EPILOG = """\
exit codes:
  0    everything was measured and right
  1    something was wrong: its rows have no time and say why
  3    the time limit came first; the file has every row until then
  128 + N  signal N came first; the file has every row until then
"""


class Ended(BaseException):
    """The time limit or a signal: what is there is all there will be."""

    def __init__(self, how: str, code: int) -> None:
        super().__init__(how)
        self.how, self.code = how, code


def _default_path(report: dict[str, Any]) -> Path:
    if report["quick"] and report.get("suite") not in CPU_SUITES:
        # a rehearsal is nobody's result
        return Path(tempfile.gettempdir()) / f"pareto-merging-rehearsal-{report['date']}.json"
    if "suite" in report:
        return results.RESULTS / f"{report['suite']}-{report['date']}.json"
    from pmkernels import dispatch

    return results.RESULTS / f"{dispatch.gpu_name(0)}-{report['date']}.json"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Ended(f"signal {signal.Signals(number).name}", 128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        # not the main thread, where nothing is sent
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(report: dict[str, Any], names: Sequence[str], quick: bool, all_of_them: bool, save: Save) -> list[str]:
    """Measure suites into ``report``; what could not be, for want of a package."""
    lacking = []
    for name in names:

        def keep(suite: dict[str, Any], name: str = name) -> None:
            report["suites"][name] = suite
            save(report)

        try:
            suite = SUITES[name].measuring
        except ImportError as error:
            if not all_of_them:
                raise
            lacking.append(f"{name}: not run, for want of {error.name}")
            continue
        keep(suite.run(quick, keep))
    return lacking


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite",
        choices=(*CPU_SUITES, *GPU_SUITES, *SUITES_OF_BOTH, "all"),
        default="digits",
        help="digits: every method on the embedded suite, on the CPU; on a CUDA GPU kernels: every kernel beside its "
        "baselines, training: an optimiser step of ViT-B/32 and ViT-L/14 beside its limit and baselines, layers: each "
        "strategy over a grid of layers and rows; serving: a preference per image beside the plain model and other "
        "ways to serve many, on a GPU or, a smaller grid, on the CPU; all: every suite for a GPU (default: digits)",
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
    parser.add_argument("--minutes", type=float, help="end after that long with what there is (default: no limit)")
    parser.add_argument("--quick", action="store_true", help="a few steps or tiny shapes: proves that it runs")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: in benchmarks/results)")
    chosen = parser.parse_args(arguments)
    if chosen.minutes is not None and not chosen.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {chosen.minutes:g}")
    start = time.perf_counter()
    report = results.header(["python -m benchmarks.run", *(arguments if arguments is not None else sys.argv[1:])])
    report["quick"] = chosen.quick
    of_suite = chosen.suite in CPU_SUITES or (chosen.suite in SUITES_OF_BOTH and not torch.cuda.is_available())
    if of_suite:
        report["suite"] = chosen.suite
    elif chosen.quick and not torch.cuda.is_available():
        # before a kernel is imported: without a GPU a rehearsal interprets them
        os.environ["TRITON_INTERPRET"] = "1"
    code, lacking = 0, list[str]()
    out = chosen.out

    def save(found: dict[str, Any]) -> None:
        nonlocal out
        out = out or _default_path(report)
        report.update(found)
        results.write(out, {**report, "ended": "running"})
        if chosen.minutes is not None and time.perf_counter() - start > 60 * chosen.minutes:
            raise Ended("time limit", EXIT_TIME)

    with _ended_by_signals():
        try:
            if chosen.suite in CPU_SUITES:
                report |= SUITES[chosen.suite].measuring.run(
                    chosen.seeds, chosen.quick, work=chosen.work, jobs=chosen.jobs
                )
            elif of_suite:
                report["environment"] = results.machine()
                report |= SUITES[chosen.suite].measuring.run(chosen.quick, lambda suite: save(report | suite))
            else:
                report |= {"environment": results.machine(), "clocks_before": results.clocks(), "suites": {}}
                names = (*GPU_SUITES, *SUITES_OF_BOTH) if chosen.suite == "all" else (chosen.suite,)
                # captures may collect garbage, thousands of times: what was imported need not be looked through
                gc.collect()
                gc.freeze()
                lacking = _measure(report, names, chosen.quick, chosen.suite == "all", save)
                report["clocks_after"] = results.clocks()
            report["ended"] = "complete"
        except Ended as end:
            report["ended"], code = end.how, end.code
        finally:
            gc.unfreeze()
    report["environment"] = {**results.machine(), "seconds_in_all": round(time.perf_counter() - start, 1)}
    out = out or _default_path(report)
    results.write(out, report)
    # a suite that was ended before its first row has nothing to say
    tables = () if of_suite and code and "rows" not in report else _tables(report, chosen.suite, of_suite)
    print("\n".join([*tables, *lacking]))
    print(out)
    if code:
        print(f"ended by {report['ended']}: the file has every row until then")
    measured = [report, *report.get("suites", {}).values()]
    wrong = [row for suite in measured for row in suite.get("rows", ()) if not row["matched"]]
    for row in wrong:
        print(f"WRONG {row['op']}, {row['layer']}, {row['dtype']}, {row['variant']}: error {row['error']:.2e}")
    return EXIT_WRONG if wrong else code


def _tables(report: dict[str, Any], suite: str, of_suite: bool) -> Iterator[str]:
    if of_suite:
        yield SUITES[suite].showing.markdown(report)
        return
    for name, found in report.get("suites", {}).items():
        yield SUITES[name].showing.markdown(found)


if __name__ == "__main__":
    sys.exit(main())
