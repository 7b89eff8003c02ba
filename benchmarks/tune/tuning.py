"""One run: phases in order of value, their configuration file, and a summary."""

import argparse
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.common.ceilings import measured_rates
from benchmarks.common.session import Lost
from benchmarks.common.towers import TINY_LAYERS, Layer
from benchmarks.suites import layers
from benchmarks.tune.choosing import Bench, tune
from benchmarks.tune.compiling import Compiler, Target, active
from benchmarks.tune.files import lines, recorded, table, validate
from benchmarks.tune.groups import HOT, TUNED, Group, describe, groups
from benchmarks.tune.strategies import Point, Strategies, choices, measure_strategies
from pmkernels import configs, dispatch

CONFIGS = Path(configs.__file__).parent / "configs"


def _target(device: torch.device) -> tuple[str, str, Target]:
    """Return the GPU's name for people and for files, and its compile target."""
    if device.type != "cuda":
        return "rehearsal", "rehearsal", Target(90, 132, "default")
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}"
    base = arch if arch in dispatch.in_force().files else "default"
    target = Target(10 * major + minor, dispatch.multiprocessors(device), base)
    return torch.cuda.get_device_name(device), dispatch.gpu_name(device.index), target


class Tuning:
    """One run on one device: what was asked for, and what is known so far."""

    def __init__(self, chosen: argparse.Namespace, compiler: Compiler, command: Sequence[str]) -> None:
        self.start = time.monotonic()
        self.end = self.start + 60 * chosen.minutes
        self.chosen, self.compiler, self.command = chosen, compiler, command
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            # captures may collect garbage, thousands of times: what was imported need not be looked through
            gc.freeze()
        self.title, self.name, self.target = _target(device)
        compiler.target = self.target
        self.out: Path = chosen.out or CONFIGS / f"{self.name}.json"
        if chosen.quick and chosen.out is None:
            self.out = Path(tempfile.mkdtemp(prefix="pmkernels-tune-")) / "rehearsal.json"
        has_file = self.out.exists() and self.out.stat().st_size
        self.previous = self.out.read_text(encoding="utf-8") if has_file else None
        self.bench, self.strategies, self.untuned = Bench(device, compiler), Strategies(), list[str]()
        if chosen.quick:
            self.say("a rehearsal: tiny shapes, nothing is measured")
        self.report = results.header(command) | {"suite": "tune", "quick": chosen.quick, "gpu": self.name}
        self.report["clocks_before"] = results.clocks()
        self.rates = measured_rates(device, chosen.quick)
        self.say("rates measured")
        ops = [op for op in TUNED if op in chosen.ops]
        self.tunes = bool(ops)
        with active(self.target.name):
            # what is not asked for is not tried, but a file without any line is none
            self.batches = groups(self.target, ops or TUNED[:1], self.previous, chosen.quick)
        self.groups = [group for batch in self.batches for group in batch]

    def say(self, line: str) -> None:
        """Say a line with the time since the start and the time left."""
        now = time.monotonic()
        print(f"[{now - self.start:4.0f} s, {max(self.end - now, 0):4.0f} s left] {line}", flush=True)

    def file(self, written: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Return the configuration file as it would be now, with these lines of strategies."""
        before = [] if self.previous is None else json.loads(self.previous)["entries"]
        kept = [entry for entry in before if entry["op"] not in self.chosen.ops]
        own = lines(self.groups) if self.tunes or not kept else []
        machine = results.machine()
        about = {key: machine[key] for key in ("gpu", "driver", "torch", "triton") if key in machine}
        measured = "a rehearsal, in which nothing was measured" if self.chosen.quick else f"{self.title}, as measured"
        return {
            "gpu": f"{measured} by python -m benchmarks.tune",
            "architectures": [f"sm_{self.target.capability}"] if self.bench.device.type == "cuda" else [],
            "tuned": {**results.header(self.command), **about, "untuned": self.untuned},
            "rates": self.rates,
            "entries": [*own, *kept],
            "strategies": [*written],
        }

    def _tune_batches(self, batches: Sequence[Sequence[Group]], until: float) -> None:
        for i, batch in enumerate(batches):
            now, left = time.monotonic(), sum(len(b) for b in batches[i:])
            with active(self.target.name):
                tune(batch, self.bench, now + (until - now) * len(batch) / left, self.say)

    def _compare_strategies(self, among: Sequence[Layer], until: float) -> None:
        with active(self.name, json.dumps(self.file())):
            measure_strategies(self.strategies, self.bench, among, self.chosen.quick, until, self.say)

    def _phases(self) -> list[tuple[float, Callable[[float], None]]]:
        """Return the phases in order of value, with their shares of the time."""
        wanted: Sequence[Sequence[Group]] = self.batches if self.tunes else []
        hot = [batch for batch in wanted if batch[0].kind == "16-bit" and batch[0].op in HOT]
        others = [batch for batch in wanted if batch not in hot]
        among = TINY_LAYERS if self.chosen.quick else layers.LAYERS
        # ViT-L/14 before ViT-B/32
        transformers = sorted((layer for layer in among if layer.tokens > 1), key=lambda layer: -layer.tokens)
        rest = [layer for layer in among if layer.tokens <= 1]
        compares = "strategies" in self.chosen.ops
        phases = [
            (0.4, bool(hot), functools.partial(self._tune_batches, hot)),
            (0.25, compares, functools.partial(self._compare_strategies, transformers)),
            (0.3, bool(others), functools.partial(self._tune_batches, others)),
            (0.05, compares, functools.partial(self._compare_strategies, rest)),
        ]
        return [(share, phase) for share, asked, phase in phases if asked]

    def _measure(self) -> None:
        """Go through the phases, as far as time goes. What an earlier one leaves is for those after it."""
        phases = self._phases()
        try:
            for number, (share, phase) in enumerate(phases):
                now, later = time.monotonic(), sum(other for other, _ in phases[number:])
                phase(now + share / later * (self.end - now))
        except Lost as error:
            self.untuned.append(f"everything after the GPU was lost: {error}")
        done = ("tuned", "as before")
        self.untuned += self.strategies.missing
        self.untuned += [f"{g.name}: {g.state}" for g in self.groups if g.op in self.chosen.ops and g.state not in done]

    def run(self) -> int:
        """Measure, write the file and read it again; the exit code."""
        self._measure()
        like = torch.empty(0, dtype=torch.bfloat16, device=self.bench.device)
        with active(self.name, json.dumps(self.file())):
            written, labels = choices(self.strategies.times, like)
        if "strategies" not in self.chosen.ops and self.previous is not None:
            written = json.loads(self.previous).get("strategies", [])
        results.write(self.out, self.file(written))
        text = self.out.read_text(encoding="utf-8")
        faults = validate(self.name, text, self.groups, self.target.name, labels, like)
        self.say(f"written and read again: {self.out}")
        used = ((g.name, g.rejected.get(g.present, "")) for g in self.groups if g.chosen is None)
        wrong = [*self.strategies.wrong, *(f"{name}: {why}" for name, why in used if why.startswith("wrong"))]
        if self.chosen.record is not None:
            self._record(labels, wrong)
        print(table(self.groups, labels, self.rates, len(written)))
        print("\n".join([*self._notes(), *(f"WRONG {line}" for line in (*wrong, *faults))]))
        if self.chosen.quick:
            print("a rehearsal: none of these figures is a measurement")
        return 1 if wrong or faults else 0

    def _record(self, labels: Mapping[Point, Mapping[int, str]], wrong: Sequence[str]) -> None:
        """Write every candidate's times."""
        path = self.chosen.record
        if path == Path():
            path = results.RESULTS / f"tune-{self.name}-{self.report['date']}.json"
        self.report |= {"rates": self.rates, "groups": list(map(recorded, self.groups)), "wrong": wrong}
        self.report |= {"untuned": self.untuned, "clocks_after": results.clocks(), "environment": results.machine()}
        self.report["strategies"] = [
            {**asdict(point), "times": {str(m): list(us) for m, us in times.items()}, "best": labels.get(point, {})}
            for point, times in self.strategies.times.items()
        ]
        results.write(path, self.report)
        self.say(f"every candidate: {path}")

    def _notes(self) -> Iterator[str]:
        for group in self.groups:
            for config, reason in group.rejected.items():
                if reason.startswith("wrong"):
                    yield f"REJECTED {group.name}, {describe(config)}: {reason}"
        if self.compiler.failed:
            yield f"from then on kernels were compiled by their first launch: {self.compiler.failed}"
        if self.compiler.futures:
            ahead = len(self.compiler.futures)
            yield f"{ahead} kernels compiled ahead; {self.bench.slow} trial launches took over 0.3 s"
        yield from (f"UNTUNED {line}" for line in self.untuned)
