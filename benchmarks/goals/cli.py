"""The command line of ``python -m benchmarks.goals``: its groups; it starts, watches and ends what measures them."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.common.arguments import command_parser
from benchmarks.common.record import COMPLETE, Record, RecordError
from benchmarks.common.supervisor import EXIT_UNUSABLE, supervise
from benchmarks.goals import table

SUITE = "goals"


@dataclass(frozen=True)
class Group:
    """Units that are measured together, and the function that measures them.

    ``seconds``: about what all of it takes on an H100. ``function``: ``module:name``, imported when it is its turn,
    because a machine may lack what a later group needs.
    """

    name: str
    about: str
    seconds: float
    function: str


# in order of value; the names are also those in keys
GROUPS = (
    Group("ceilings", "what this card does at best: a copy, an 8192³ product, L2, a launch", 15, "kernels:ceilings"),
    Group("correctness", "the hot kernels against float64, in memory full of NaN", 25, "kernels:correctness"),
    Group("reductions", "reduction of dW and weight gradient of six layers", 45, "kernels:reductions"),
    Group("served-layers", "projections and a block with 32 preferences, cold and warm", 25, "served:layers"),
    Group("serving", "ViT-L/14, 32 images with 32 preferences, and one image", 50, "serving:engine"),
    Group("training-L14", "an optimiser step of ViT-L/14, K = 8", 70, "training:vit_l_14"),
    Group("training-B32", "an optimiser step of ViT-B/32, K = 8", 45, "training:vit_b_32"),
    Group("float32", "the layer-wise computation in its own float32, 32, 16 and 8 images", 60, "training:float32"),
    Group("rest", "few bytes, a data-free run, the layer grid", 150, "kernels:rest"),
)
NAMES = tuple(group.name for group in GROUPS)

DESCRIPTION = """\
Measure what the project aims at on this GPU, in order of value, until time is up.

The results file is written again, whole, after every row. When the time limit or a signal comes, a kernel hangs, memory
ends or the GPU stops answering, what was measured stays, and --resume goes on from it. A row has a time only if its
output was right in this very run. Figures of two cards never get into one file."""

EPILOG = """\
groups, in order of value (about how long on an H100):
{groups}

exit codes:
  0        everything was measured and right
  1        something was wrong or failed: its rows have no time and say why
  2        nothing can be measured here: no GPU, another card than the file's, wrong arguments
  3        the time limit came first: --resume FILE goes on
  128 + N  signal N came first (SIGTERM: 143, Ctrl-C: 130): --resume FILE goes on

examples:
  python -m benchmarks.goals --minutes 8                     on a GPU; writes benchmarks/results/goals-<gpu>-<date>.json
  python -m benchmarks.goals --minutes 5 --resume FILE       what FILE does not have yet, into the same file
  python -m benchmarks.goals --only reductions served-layers
  python -m benchmarks.goals --quick                         a rehearsal on any machine: tiny shapes, measures nothing
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    lines = "\n".join(f"  {group.name:<14} {group.about} ({group.seconds:.0f} s)" for group in GROUPS)
    parser = command_parser("benchmarks.goals", DESCRIPTION, epilog=EPILOG.format(groups=lines), allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=8.0, help="end after that long, all included (default: 8)")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="GROUP", help="these groups, after the ceilings")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from a results file of this card")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: in benchmarks/results; see above)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, interpreted without a GPU: a rehearsal")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.minutes <= 24 * 60:
        parser.error(f"--minutes: expected more than 0 and at most a day, got {chosen.minutes:g}")
    return chosen


def open_record(chosen: argparse.Namespace, command: Sequence[str]) -> Record:
    """Begin a results file, or open the one to go on from.

    Raises:
        RecordError: the file to go on from is not one, or ``--out`` names a file that is there.
    """
    if chosen.out is not None and chosen.out != chosen.resume and chosen.out.exists():
        raise RecordError(
            f"{chosen.out}: --out: expected a new file, got one that is there (--resume goes on from one)"
        )
    header = results.header(command)
    if chosen.resume is None:
        path = chosen.out
        if path is None and chosen.quick:
            path = Path(tempfile.gettempdir()) / f"pareto-merging-rehearsal-goals-{header['date']}.json"
        elif path is None:
            name = results.gpu_name_of_driver() or "gpu"
            path = results.unused(results.RESULTS / f"goals-{name}-{header['date']}.json")
        record = Record.new(path, {**header, "suite": SUITE, "quick": chosen.quick})
    else:
        record = Record.read(chosen.resume, SUITE)
        if bool(record.data.get("quick")) != chosen.quick:
            kind = "a rehearsal" if record.data.get("quick") else "a measurement"
            raise RecordError(f"{chosen.resume}: --quick: expected as in the file, which is {kind}")
        record.resume()
        if chosen.out is not None:
            record.path = chosen.out
    record.data["runs"].append({**header, "minutes": chosen.minutes})
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    chosen = parse(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    start = time.monotonic()
    try:
        record = open_record(chosen, ["python -m benchmarks.goals", *given])
        # there before anything is measured: from here on there is a file to go on from
        record.write()
    except (RecordError, OSError) as error:
        print(f"goals: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    print(f"results go to {record.path}", flush=True)
    command = ["-m", "benchmarks.goals.worker", "--out", str(record.path), *(["--quick"] if chosen.quick else [])]
    command += ["--only", *chosen.only] if chosen.only else []

    def finish(record: Record) -> None:
        run: dict[str, Any] = record.data["runs"][-1]
        run |= {"clocks_after": results.clocks(), "seconds": round(time.monotonic() - start, 1)}
        record.data["goals"] = [vars(goal) for goal in table.goals(record.data)]

    had_rows = bool(record.data["rows"])
    outcome = supervise(record.path, SUITE, command, 60 * chosen.minutes, finish)
    if outcome.code == EXIT_UNUSABLE and not had_rows and not Record.read(record.path, SUITE).data["rows"]:
        # nothing can be measured here, so there is no result
        record.path.unlink(missing_ok=True)
        return outcome.code
    print(last_lines(Record.read(record.path, SUITE), outcome.how, chosen.only or NAMES), flush=True)
    return outcome.code


def last_lines(record: Record, ended: str, wanted: Sequence[str] = NAMES) -> str:
    """Return the last words of a run: faults, the goals, and how to go on."""
    data = record.data
    lines = [f"WRONG {row['unit']}: {row['variant']}: {row.get('reason') or 'wrong output'}" for row in record.wrong]
    clocks = data["runs"][-1].get("clocks_after") or {}
    lines += ["clocks at the end: " + (", ".join(f"{name} {value}" for name, value in clocks.items() if value) or "–")]
    commits = list(dict.fromkeys(run["commit"] for run in data["runs"]))
    if len(commits) > 1:
        lines.append(f"rows of several commits: {', '.join(commits)}")
    lines += ["", table.text(data), ""]
    lines.append(f"{len(data['units'])} units measured, ended by: {ended}")
    begun = {key.partition("/")[0] for key in data["units"]}
    left = [*data["not_reached"], *(f"all of {name}" for name in wanted if name not in begun)]
    if ended != COMPLETE and left:
        lines.append(f"not reached: {'; '.join(left)}")
    if data["quick"]:
        lines.append("a rehearsal: none of these figures is a measurement")
    if ended != COMPLETE:
        quick = " --quick" if data["quick"] else ""
        lines.append(f"to go on: python -m benchmarks.goals{quick} --resume {record.path}")
    return "\n".join([*lines, str(record.path)])
