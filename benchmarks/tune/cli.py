"""``python -m benchmarks.tune``: measure launch configurations and strategies on this GPU; the library picks them up.

What is written is ``pmkernels/configs/<gpu>.json``: the rates of the GPU, launch configurations where one is faster
than what the library has, and the faster strategy of each layer where the cost model would take the other one. A
configuration has a time only if the compiler accepts it without spilling and its outputs, in memory that was filled
with NaN, match float64; before it is taken it is checked again on the ranks, K, types and sizes it will be used for.

In order of value: what the hot path launches (the reduction of dW, the widening, the served layer, the merge), then the
strategies of ViT-L/14 and ViT-B/32, then the rest. What `python -m benchmarks.budget` would refuse is never timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.common.ceilings import measured_rates
from benchmarks.common.session import Lost
from benchmarks.common.towers import TINY_LAYERS, Layer
from benchmarks.suites import layers
from benchmarks.tune.bench import Bench
from benchmarks.tune.candidates import describe
from benchmarks.tune.choosing import tune
from benchmarks.tune.compiling import Compiler, Target
from benchmarks.tune.files import lines, validate
from benchmarks.tune.groups import HOT, OPS, TUNED, Group, groups
from benchmarks.tune.strategies import Strategies, choices, measure_strategies
from benchmarks.tune.summary import recorded, table
from benchmarks.tune.trials import active
from pmkernels import configs, dispatch
from pmkernels.launch import INTERPRETING

CONFIGS = Path(configs.__file__).parent / "configs"
# of the time budget, in this order: the hot operations, the strategies of the transformers, the other operations, the
# strategies of the other layers
HOT_SHARE, STRATEGY_SHARE, OTHERS_SHARE, REST_SHARE = 0.4, 0.25, 0.3, 0.05
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two candidates each: proves that it runs")
    parser.add_argument(
        "--out", type=Path, help="the file to write (default: pmkernels/configs/<gpu>.json; --quick: a temporary file)"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="stop after that long, with what there is (default: 8)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="processes that compile; 0: none, each first launch compiles (default: one per core but one)",
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=Path(),
        help="also write every candidate's times (default path: benchmarks/results/tune-<gpu>-<date>.json)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 1 if something the library would use is wrong, 2 if nothing can run."""
    chosen = parse(arguments)
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
        return _tune(
            chosen, compiler, ["python -m benchmarks.tune", *(sys.argv[1:] if arguments is None else arguments)]
        )
    finally:
        compiler.close()


def _target(device: torch.device) -> tuple[str, str, Target]:
    """The GPU's name for people and for files, and what there is for it besides a file of its own."""
    if device.type != "cuda":
        return "rehearsal", "rehearsal", Target(90, 132, "default")
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}"
    base = arch if arch in dispatch.in_force().files else "default"
    target = Target(10 * major + minor, dispatch.multiprocessors(device), base)
    return torch.cuda.get_device_name(device), dispatch.gpu_name(device.index), target


def _tune(chosen: argparse.Namespace, compiler: Compiler, command: Sequence[str]) -> int:
    start = time.monotonic()
    end = start + 60 * chosen.minutes

    def say(line: str) -> None:
        now = time.monotonic()
        print(f"[{now - start:4.0f} s, {max(end - now, 0):4.0f} s left] {line}", flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        # captures may collect garbage, thousands of times: what was imported need not be looked through
        gc.freeze()
    title, name, target = _target(device)
    compiler.target = target
    out = chosen.out or (_temporary() if chosen.quick else CONFIGS / f"{name}.json")
    previous = out.read_text(encoding="utf-8") if out.exists() and out.stat().st_size else None
    bench, strategies = Bench(device, compiler), Strategies()
    untuned: list[str] = []
    if chosen.quick:
        say("a rehearsal: tiny shapes, nothing is measured")
    report = results.header(command) | {"suite": "tune", "quick": chosen.quick, "gpu": name}
    report["clocks_before"] = results.clocks()
    rates = measured_rates(device, chosen.quick)
    say("rates measured")
    with active(target.name):
        # what is not asked for is not tried, but a file without any line is none
        batches = groups(target, [op for op in TUNED if op in chosen.ops] or TUNED[:1], previous, chosen.quick)
    found = [group for batch in batches for group in batch]
    head = {
        "gpu": f"{'a rehearsal, in which nothing was measured' if chosen.quick else f'{title}, as measured'} by "
        "python -m benchmarks.tune",
        "architectures": [f"sm_{target.capability}"] if device.type == "cuda" else [],
    }
    machine = {key: value for key, value in results.machine().items() if key in ("gpu", "driver", "torch", "triton")}

    def file(written: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        kept = [] if previous is None else [e for e in json.loads(previous)["entries"] if e["op"] not in chosen.ops]
        own = lines(found) if set(chosen.ops) & set(TUNED) or not kept else []
        tuned = {**results.header(command), **machine, "untuned": untuned}
        return {**head, "tuned": tuned, "rates": rates, "entries": [*own, *kept], "strategies": [*written]}

    def tune_batches(batches: Sequence[Sequence[Group]], until: float) -> None:
        for i, batch in enumerate(batches):
            now, left = time.monotonic(), sum(len(b) for b in batches[i:])
            with active(target.name):
                tune(batch, bench, now + (until - now) * len(batch) / left, say)

    def compare_strategies(among: Sequence[Layer], until: float) -> None:
        text = json.dumps(file())
        compiler.target = replace(target, name=name, text=text)
        with active(name, text):
            measure_strategies(strategies, bench, among, chosen.quick, until, say)
        compiler.target = target

    wanted = batches if set(chosen.ops) & set(TUNED) else []
    hot = [batch for batch in wanted if batch[0].kind == "16-bit" and batch[0].op in HOT]
    others = [batch for batch in wanted if batch not in hot]
    among = TINY_LAYERS if chosen.quick else layers.LAYERS
    # ViT-L/14 before ViT-B/32
    transformers = [layer for layer in among if layer.tokens > 1]
    transformers.sort(key=lambda layer: layer.tokens, reverse=True)
    phases: list[tuple[float, Callable[[float], None]]] = []
    if hot:
        phases.append((HOT_SHARE, lambda until: tune_batches(hot, until)))
    if "strategies" in chosen.ops:
        phases.append((STRATEGY_SHARE, lambda until: compare_strategies(transformers, until)))
    if others:
        phases.append((OTHERS_SHARE, lambda until: tune_batches(others, until)))
    if "strategies" in chosen.ops:
        no_transformers = [layer for layer in among if layer not in transformers]
        phases.append((REST_SHARE, lambda until: compare_strategies(no_transformers, until)))
    try:
        for number, (share, phase) in enumerate(phases):
            now, later = time.monotonic(), sum(other for other, _ in phases[number:])
            # what an earlier phase leaves is for those after it
            phase(now + share / later * (end - now))
    except Lost as error:
        untuned.append(f"everything after the GPU was lost: {error}")
    untuned += strategies.missing
    done = ("tuned", "as before")
    untuned += [f"{g.name}: {g.state}" for g in found if g.op in chosen.ops and g.state not in done]
    with active(name, json.dumps(file())):
        written, labels = choices(strategies.times, bench.like)
    if "strategies" not in chosen.ops and previous is not None:
        written = json.loads(previous).get("strategies", [])
    results.write(out, file(written))
    faults = validate(name, out.read_text(encoding="utf-8"), found, target.name, labels, bench.like)
    say(f"written and read again: {out}")
    wrong = [*strategies.wrong]
    wrong += [f"{group.name}: {group.rejected[group.present]}" for group in found if _uses_a_wrong_one(group)]
    if chosen.record is not None:
        path = chosen.record if chosen.record != Path() else results.RESULTS / f"tune-{name}-{report['date']}.json"
        report |= {"rates": rates, "groups": [recorded(group) for group in found], "wrong": wrong, "untuned": untuned}
        report["strategies"] = [
            {**asdict(point), "times": {str(m): list(us) for m, us in times.items()}, "best": labels.get(point, {})}
            for point, times in strategies.times.items()
        ]
        results.write(path, report | {"clocks_after": results.clocks(), "environment": results.machine()})
        say(f"every candidate: {path}")
    print(table(found, labels, rates, len(written)))
    notes = [f"REJECTED {g.name}, {describe(c)}: {why}" for g in found for c, why in g.rejected.items() if _wrong(why)]
    if compiler.failed:
        notes.append(f"from then on kernels were compiled by their first launch: {compiler.failed}")
    if compiler.futures:
        notes.append(f"{len(compiler.futures)} kernels compiled ahead; {bench.slow} trial launches took over 0.3 s")
    notes += [f"UNTUNED {line}" for line in untuned] + [f"WRONG {line}" for line in (*wrong, *faults)]
    if chosen.quick:
        notes.append("a rehearsal: none of these figures is a measurement")
    print("\n".join(notes))
    return 1 if wrong or faults else 0


def _wrong(reason: str) -> bool:
    return reason.startswith("wrong")


def _uses_a_wrong_one(group: Group) -> bool:
    return group.chosen is None and _wrong(group.rejected.get(group.present, ""))


def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="pmkernels-tune-")) / "rehearsal.json"
