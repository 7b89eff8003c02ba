"""``python -m benchmarks.checkpoints``: full-size models of every checkpoint format, from their files and back.

For each model and format a pretrained and K fine-tuned checkpoints with random weights are written by the libraries
that write the real ones, and deleted afterwards. A process of their own then does what ``pareto-merging train`` and
``export`` do with a configuration of them, and measures it:

* building the Pareto model: the rise of the process's peak resident memory, beside K + 1 models in the storage dtype,
  the learned parameters, and one tensor;
* one training step on the CPU;
* a merged model exported to safetensors, open_clip and Hugging Face, read again by this library (bit by bit) and by
  open_clip and transformers (features of images beside the merged module's).

What fails is a row with its error. The exit code is 1 if there is one.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.checkpoints.measuring import measure, run_row
from benchmarks.checkpoints.rows import HEAD, MODELS, TINY, Row, cells, planned
from benchmarks.checkpoints.writers import FORMATS
from benchmarks.common.arguments import command_parser
from pareto_merging.system.progress import progress_bar
from pareto_merging.system.tables import print_table

QUICK_FORMATS = ("huggingface-vision", "task-vectors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a row failed."""
    parser = command_parser("benchmarks.checkpoints", __doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS), help="default: both")
    formats = f"default: all ({', '.join(FORMATS)})"
    parser.add_argument("--formats", nargs="+", choices=sorted(FORMATS), metavar="FORMAT", help=formats)
    parser.add_argument("--work", type=Path, help="where checkpoints are written and deleted again, 8 GB at a time")
    parser.add_argument("--quick", action="store_true", help="a tiny model in two formats: proves that it runs")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: in benchmarks/results)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.measure is not None:
        measure(chosen.measure)
        return 0
    import transformers

    torch.set_num_threads(1)
    # the writers say something of old formats, and have progress bars of their own
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.jit")
    report = results.header(["python -m benchmarks.checkpoints", *(sys.argv[1:] if arguments is None else arguments)])
    report |= {"suite": "checkpoints", "quick": chosen.quick, "environment": results.machine()}
    kept = Path(tempfile.gettempdir()) if chosen.quick else results.RESULTS
    out = chosen.out or kept / f"checkpoints-{report['date']}.json"
    models, known = ([TINY], QUICK_FORMATS) if chosen.quick else (chosen.models, tuple(FORMATS))
    rows = planned(models, chosen.formats or known)
    finished: list[Row] = []
    start = time.perf_counter()
    if chosen.work is not None:
        Path(chosen.work).mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="checkpoints-", dir=chosen.work) as work,
        progress_bar("checkpoints", len(rows)) as advance,
    ):
        for number, row in enumerate(rows, start=1):

            def say(what: str, done: int = number - 1, row: Row = row) -> None:
                advance(done, f"{row.model}, {row.format}: {what}")

            finished.append(run_row(row, Path(work) / "row", say))
            # what was measured is not lost to a later row
            results.write(out, report | {"rows": [asdict(each) for each in finished]})
            advance(number, f"{row.model}, {row.format}: {finished[-1].status}")
    report["environment"] = {**results.machine(), "seconds_in_all": round(time.perf_counter() - start, 1)}
    results.write(out, report | {"rows": [asdict(each) for each in finished]})
    print_table("Checkpoints", HEAD, [cells(row) for row in finished], left=(0, 1, len(HEAD) - 1))
    print(out)
    return 1 if any(row.status != "done" for row in finished) else 0
