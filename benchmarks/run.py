"""``python -m benchmarks.run``: measure a suite and write one JSON file with everything needed to judge it.

On a GPU the file is written again after every row, and SIGTERM or the time limit end the run with what there is. What
the project aims at, in minutes and in order of value, is ``python -m benchmarks.goals``. ``--base REV`` times one
operation in this tree against another commit instead.
"""

import argparse
import functools
import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import base, results
from benchmarks.common.arguments import command_parser
from benchmarks.common.suites import SUITES, measured_on
from benchmarks.common.supervisor import EXIT_TIME, EXIT_UNUSABLE, EXIT_WRONG, Ended, ended_by

# on the GPU, in one file named after it; the others run on the CPU, each in a file named after itself
GPU_SUITES, CPU_SUITES, SUITES_OF_BOTH = (measured_on(device) for device in ("gpu", "cpu", "both"))

EPILOG = """\
examples:
  python -m benchmarks.run --suite serving
  python -m benchmarks.run --base main --operation merge --layer 4096x1024
                                            merge_weight of this tree against that of main, in turn

exit codes:
  0    everything was measured and right
  1    something was wrong: its rows have no time and say why; the outputs of two commits differ
  2    no such commit, or one of the two cannot do what is to be timed
  3    the time limit came first; the file has every row until then
  128 + N  signal N came first; the file has every row until then
"""


def _default_path(report: dict[str, Any]) -> Path:
    if report["quick"] and report.get("suite") not in CPU_SUITES:
        # a rehearsal is nobody's result
        return Path(tempfile.gettempdir()) / f"pareto-merging-rehearsal-{report['date']}.json"
    if "suite" in report:
        return results.RESULTS / f"{report['suite']}-{report['date']}.json"
    from pmkernels import dispatch

    return results.RESULTS / f"{dispatch.gpu_name(0)}-{report['date']}.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser("benchmarks.run", __doc__, epilog=EPILOG)
    add = parser.add_argument
    add(
        "--suite",
        choices=(*CPU_SUITES, *GPU_SUITES, *SUITES_OF_BOTH, "all"),
        default="digits",
        help="digits: every method on the embedded suite, on the CPU; on a CUDA GPU kernels: every kernel beside its "
        "baselines, training: an optimiser step of ViT-B/32 and ViT-L/14 beside its limit and baselines, layers: each "
        "strategy over a grid of layers and rows; serving: a preference per image beside the plain model and other "
        "ways to serve many, on a GPU or, a smaller grid, on the CPU; expert: what each part of expert-guided Pareto "
        "Merging gives; speed: what a step of it costs beside a published one; all: every suite for a GPU (default: "
        "digits)",
    )
    seen = "digits, expert, speed (the first): suite seeds; 0 to 2 were seen in its design"
    add("--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7], help=seen)
    add("--work", type=Path, help="digits, expert: where partial results are kept, to go on from")
    add("--jobs", type=int, default=1, help="digits, expert: processes, one core each (default: 1)")
    add("--methods", nargs="+", help="digits: these methods alone, and no ablations")
    add("--models", type=int, nargs="+", choices=(2, 3, 8), help="digits: how many are merged (default: 2, 3 and 8)")
    add("--join", type=Path, help="digits: an earlier results file, whose other methods join")
    add("--minutes", type=float, help="end after that long with what there is (default: no limit)")
    add("--quick", action="store_true", help="a few steps or tiny shapes: proves that it runs")
    add("--out", type=Path, help="the JSON file to write (default: in benchmarks/results)")
    base.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    if chosen.minutes is not None and not chosen.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {chosen.minutes:g}")
    return chosen


class Run:
    """One run of a suite, or of all for a GPU. Its report is written to a file as it grows.

    ``alone``: of one suite, in a file of its own; else suites of a GPU stand in a file named after it.
    """

    def __init__(self, chosen: argparse.Namespace, command: Sequence[str]) -> None:
        self.chosen, self.start, self.lacking = chosen, time.perf_counter(), list[str]()
        on_gpu = torch.cuda.is_available()
        self.alone = chosen.suite in CPU_SUITES or (chosen.suite in SUITES_OF_BOTH and not on_gpu)
        self.report: dict[str, Any] = {**results.header(command), "quick": chosen.quick}
        if self.alone:
            self.report["suite"] = chosen.suite
        elif chosen.quick and not on_gpu:
            # before a kernel is imported: without a GPU a rehearsal interprets them
            os.environ["TRITON_INTERPRET"] = "1"

    @functools.cached_property
    def path(self) -> Path:
        """Return the file that is written."""
        return self.chosen.out or _default_path(self.report)

    def save(self, figures: dict[str, Any]) -> None:
        """Write what there is so far; raise Ended when the time is up."""
        self.report.update(figures)
        results.write(self.path, {**self.report, "ended": "running"})
        minutes = self.chosen.minutes
        if minutes is not None and time.perf_counter() - self.start > 60 * minutes:
            raise Ended("time limit", EXIT_TIME)

    def measure(self) -> int:
        """Measure everything and write it; the exit code."""
        code = 0
        with ended_by(signal.SIGTERM):
            try:
                self._alone() if self.alone else self._on_gpu()
                self.report["ended"] = "complete"
            except Ended as end:
                self.report["ended"], code = end.how, end.code
            finally:
                gc.unfreeze()
        seconds = round(time.perf_counter() - self.start, 1)
        self.report["environment"] = {**results.machine(), "seconds_in_all": seconds}
        results.write(self.path, self.report)
        return code

    def _alone(self) -> None:
        chosen, suite = self.chosen, SUITES[self.chosen.suite].measuring
        if chosen.suite in CPU_SUITES:
            of_digits = {"methods": chosen.methods, "join": chosen.join, "models": chosen.models}
            more = {name: value for name, value in of_digits.items() if value is not None}
            self.report |= suite.run(chosen.seeds, chosen.quick, work=chosen.work, jobs=chosen.jobs, **more)
        else:
            self.report["environment"] = results.machine()
            self.report |= suite.run(chosen.quick, self.save)

    def _on_gpu(self) -> None:
        suites: dict[str, Any] = {}
        self.report |= {"environment": results.machine(), "clocks_before": results.clocks(), "suites": suites}
        # captures may collect garbage, thousands of times: what was imported need not be looked through
        gc.collect()
        gc.freeze()
        every = self.chosen.suite == "all"
        for name in (*GPU_SUITES, *SUITES_OF_BOTH) if every else (self.chosen.suite,):

            def keep(figures: dict[str, Any], name: str = name) -> None:
                suites[name] = figures
                self.save({})

            try:
                suite = SUITES[name].measuring
            except ImportError as error:
                if not every:
                    raise
                self.lacking.append(f"{name}: not run, for want of {error.name}")
                continue
            keep(suite.run(self.chosen.quick, keep))
        self.report["clocks_after"] = results.clocks()

    def tables(self) -> Iterator[str]:
        """Yield the tables of what was measured."""
        if not self.alone:
            for name, figures in self.report.get("suites", {}).items():
                yield SUITES[name].showing.markdown(figures)
        elif self.report["ended"] == "complete" or "rows" in self.report:
            # a suite that was ended before its first row has nothing to say
            yield SUITES[self.chosen.suite].showing.markdown(self.report)


def _compare(chosen: argparse.Namespace, command: Sequence[str]) -> int:
    """Time one operation against another commit; the exit code."""
    try:
        comparison = base.compare(chosen.base, base.asked(chosen), rounds=chosen.rounds)
    except base.BaseError as error:
        print(f"run: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    print(comparison)
    if chosen.out is not None:
        report = {**results.header(command), "suite": "base", "environment": results.machine()}
        results.write(chosen.out, report | asdict(comparison))
        print(chosen.out)
    return 0 if comparison.matched else EXIT_WRONG


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a result was wrong."""
    chosen = parse(arguments)
    command = ["python -m benchmarks.run", *(arguments if arguments is not None else sys.argv[1:])]
    if chosen.base is not None:
        return _compare(chosen, command)
    run = Run(chosen, command)
    code = run.measure()
    print("\n".join([*run.tables(), *run.lacking]))
    print(run.path)
    if code:
        print(f"ended by {run.report['ended']}: the file has every row until then")
    measured = [run.report, *run.report.get("suites", {}).values()]
    wrong = [row for suite in measured for row in suite.get("rows", ()) if not row["matched"]]
    for row in wrong:
        print(f"WRONG {row['op']}, {row['layer']}, {row['dtype']}, {row['variant']}: error {row['error']:.2e}")
    return EXIT_WRONG if wrong else code


if __name__ == "__main__":
    sys.exit(main())
