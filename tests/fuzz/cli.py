"""``make fuzz``: damage checkpoints at random and look for anything but an error or the right answer.

Each reader gets a small valid file of its own and mutants of it: flipped bits, bytes set, slices deleted, doubled,
swapped or taken from another file, numbers replaced by interesting ones, the end cut off; and by structure: opcodes of
a pickle inserted, deleted, moved, records of a zip archive changed with their checksums made right again, values of a
JSON header replaced. A mutant is opened and every tensor read, in a worker process with little memory. It must give

- a UserError of one line and fewer than 500 characters, or
- the right answer: the original tensors, where one byte of a container with checksums was changed; where there are
  none, what the bytes at the tensor's place say; and always tensors that fit into the file, and inert objects.

Anything else (another exception, more than a second, too much memory, a crash, a file or process that the payload
made) is a finding; the mutant is kept. The same seed makes the same mutants. The exit code is 1 if there are findings.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from fuzz.readers import READERS
from fuzz.running import Summary, fuzz

from benchmarks import results
from pareto_merging.system.progress import progress_bar


def table(summaries: Sequence[Summary]) -> str:
    """One row per reader."""
    lines = ["| reader | mutants | refused | right answer | findings | ms each | slowest, ms |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for one in summaries:
        each = 1000 * one.seconds / max(one.mutations, 1)
        lines.append(
            f"| {one.reader} | {one.mutations} | {one.refused} | {one.right} | {one.found} | {each:.2f} | "
            f"{1000 * one.slowest:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if there are findings."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=2000, help="of each reader's file (default: 2000)")
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="repeatable (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same mutants (default: 0)")
    parser.add_argument("--keep", type=Path, help="a folder for mutants that are findings (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep = chosen.keep or Path(tempfile.gettempdir()) / f"fuzz-findings-{os.getpid()}"
    readers = chosen.reader or list(READERS)
    summaries: list[Summary] = []
    start = time.perf_counter()
    with progress_bar("fuzzing", chosen.mutations * len(readers)) as advance:
        for index, reader in enumerate(readers):

            def moved(done: int, reader: str = reader, before: int = index * chosen.mutations) -> None:
                advance(before + done, reader)

            summaries.append(fuzz(reader, chosen.mutations, chosen.seed, keep=keep, advance=moved))
    found = sum(summary.found for summary in summaries)
    if chosen.out is not None:
        report = results.header(["python -m fuzz", *(arguments if arguments is not None else sys.argv[1:])])
        report |= {"suite": "fuzz", "seed": chosen.seed, "rows": [asdict(summary) for summary in summaries]}
        results.write(chosen.out, {**report, "environment": results.machine()})
    for summary in summaries:
        for finding in summary.findings:
            print(f"FINDING {summary.reader} {finding.index} ({finding.kind}): {finding.what} {finding.path}")
    print(table(summaries))
    seconds = time.perf_counter() - start
    print(f"{sum(summary.mutations for summary in summaries)} mutants in {seconds:.0f} s, {found} findings")
    return 1 if found else 0
