"""``python -m benchmarks.tune``: measure launch configurations and strategies on this GPU; the library picks them up.

What is written is ``pmkernels/configs/<gpu>.json``: the rates of the GPU, launch configurations where one is faster
than what the library has, and the faster strategy of each layer where the cost model would take the other one. A
configuration has a time only if the compiler accepts it without spilling and its outputs, in memory that was filled
with NaN, match float64; before it is taken it is checked again on the ranks, K, types and sizes it will be used for.

In order of value: what the hot path launches (the reduction of dW, the widening, the served layer, the merge), then the
strategies of ViT-L/14 and ViT-B/32, then the rest. What `python -m benchmarks.budget` would refuse is never timed.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.arguments import command_parser
from benchmarks.tune.compiling import Compiler
from benchmarks.tune.groups import OPS
from benchmarks.tune.tuning import Tuning
from pmkernels.launch import INTERPRETING

EPILOG = """\
examples:
  python -m benchmarks.tune                          eight minutes; the library uses the result from its next start on
  python -m benchmarks.tune --minutes 3 --ops linear strategies
                                                     part of it; other ops keep the lines that the file has
  python -m benchmarks.tune --out /tmp/gpu.json --record /tmp/record.json
                                                     leave the library as it is, and keep every candidate's times
  python -m benchmarks.tune --quick                  a rehearsal on any machine: tiny shapes, measures nothing

After it, `python -m benchmarks.budget` compiles every line of the file for its architecture and `make gpu` tests them.
What time did not suffice for keeps its defaults, and the file lists it under "untuned".
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. The exit code is 1 if what the library would use is wrong, 2 if nothing can run."""
    parser = command_parser("benchmarks.tune", __doc__, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two candidates each: proves that it runs")
    out_help = "the file to write (default: pmkernels/configs/<gpu>.json; --quick: a temporary file)"
    parser.add_argument("--out", type=Path, help=out_help)
    minutes_help = "stop after that long, with what there is (default: 8)"
    parser.add_argument("--minutes", type=float, default=8.0, help=minutes_help)
    jobs_help = "processes that compile; 0: none, each first launch compiles (default: one per core but one)"
    parser.add_argument("--jobs", type=int, help=jobs_help)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    record_help = "also write every candidate's times (default path: benchmarks/results/tune-<gpu>-<date>.json)"
    parser.add_argument("--record", nargs="?", type=Path, const=Path(), help=record_help)
    chosen = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not chosen.quick:
        print("tune: expected a CUDA GPU, got none (--quick rehearses on the CPU)", file=sys.stderr)
        return 2
    if on_gpu == INTERPRETING:
        wanted = "unset on a GPU" if on_gpu else "1 before the start, without a GPU"
        print(f"tune: TRITON_INTERPRET: expected {wanted}", file=sys.stderr)
        return 2
    jobs = max((os.cpu_count() or 2) - 1, 1) if chosen.jobs is None else max(chosen.jobs, 0)
    # forked before the GPU is in use
    compiler = Compiler(jobs if on_gpu else 0)
    try:
        command = ["python -m benchmarks.tune", *(sys.argv[1:] if arguments is None else arguments)]
        return Tuning(chosen, compiler, command).run()
    finally:
        compiler.close()
