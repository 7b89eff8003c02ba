"""``python -m benchmarks.gpu_kernels_record``: what goals and the smoke tests launch on an H100 and an H200.

Each GPU takes strategies by its own rates, so both are recorded; what is the same is compiled once. A recording is kept
for as long as no source file changes. It is done on the CPU, with nothing computed: minutes on two cores.
"""

import argparse
import contextlib
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "pmkernels", "pareto_merging", "tests")


def digest() -> str:
    """Return the SHA-256 of every source and configuration file that decides what is launched."""
    sha = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json") and "results" not in path.parts:
                sha.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Run what is repeated to be timed once or twice. Every repetition launches the same."""
    import triton

    from benchmarks.common import timing
    from benchmarks.training import steps

    def do_bench(function: Callable[[], Any], *_: Any, quantiles: Sequence[float] | None = None, **__: Any) -> Any:
        function()
        return 1.0 if quantiles is None else [1.0] * len(quantiles)

    twice = mock.patch.object(timing.Effort, "suffices", lambda self, times: len(times) >= 2)
    with mock.patch.object(triton.testing, "do_bench", do_bench), twice, mock.patch.object(steps, "SECONDS", 0.0):
        yield


def goals(gpu: str, path: Path, only: Sequence[str] | None = None) -> None:
    """Record a whole run of ``python -m benchmarks.goals``. Units that fail are listed, as in its results file."""
    from benchmarks.common.record import Record
    from benchmarks.common.recording import recording
    from benchmarks.goals import cli, worker

    with tempfile.TemporaryDirectory() as folder, recording(gpu) as launches, once():
        results = Path(folder) / "goals.json"
        record = cli.open_record(cli.parse(["--out", str(results)]), [])
        record.write()
        chosen = [] if only is None else ["--only", *only]
        worker.main(["--out", str(results), "--until", str(time.monotonic() + 1e6), *chosen])
        rows = Record.read(results, record.data["suite"]).data["rows"]
        stopped = {str(row.get("unit")): str(row.get("reason")) for row in rows if row.get("reason")}
    launches.write(path, tests={"whole": len(rows) - len(stopped), "stopped": stopped})


def smoke(gpu: str, path: Path) -> None:
    """Record the smoke tests, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu and smoke", "-q", "--assert=plain"]
    command += ["-p", "benchmarks.common.recording_plugin", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    command += ["--record-launches", str(path), "--record-gpu", gpu]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not path.exists():
        raise RuntimeError(f"pytest: expected to record, got exit code {done.returncode}\n{done.stdout[-2000:]}")


RECORD: dict[str, Callable[[str, Path], None]] = {"smoke": smoke, "goals": goals}


def record(folder: Path, gpus: Sequence[str], sources: Sequence[str], again: bool = False) -> list[Path]:
    """Record what is missing or was recorded of other sources, and return the files. One process a core."""
    from benchmarks.common.recording import read
    from benchmarks.common.recording_plugin import stopped

    folder.mkdir(parents=True, exist_ok=True)
    now = digest()

    def up_to_date(source: str, gpu: str) -> Path:
        path, stamp = folder / f"launches-{source}-{gpu}.json", folder / f"launches-{source}-{gpu}.digest"
        if not again and path.exists() and stamp.exists() and stamp.read_text() == now:
            return path
        start = time.monotonic()
        print(f"recording {source} as on {gpu}", flush=True)
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu_kernels_record", "--folder", str(folder)]
        subprocess.run([*command, "--one", source, "--gpu", gpu], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        stamp.write_text(now)
        print(f"  {source}, {gpu}: {time.monotonic() - start:.0f} s", flush=True)
        return path

    # what takes longest first
    jobs = sorted(itertools.product(sources, gpus), key=lambda job: job[0] == "smoke")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        files = list(pool.map(lambda job: up_to_date(*job), jobs))
    for (source, gpu), path in zip(jobs, files, strict=True):
        whole, others = stopped(path)
        print(f"{source}, {gpu}: {len(read(path))} launches; {whole} recorded to their end, {len(others)} stopped")
        for name, why in others.items():
            print(f"  stopped: {name}: {why}")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels_record", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu-kernels", help="where launches-*.json go")
    parser.add_argument("--gpu", action="append", help="repeatable (default: nvidia-h100-80gb-hbm3 and nvidia-h200)")
    parser.add_argument("--source", action="append", choices=RECORD, help="repeatable (default: both)")
    parser.add_argument("--again", action="store_true", help="record also what is up to date")
    parser.add_argument("--one", choices=RECORD, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    from benchmarks.common.recording_cuda import GPUS

    gpus = chosen.gpu or list(GPUS)
    if chosen.one:
        # nothing is computed: a second thread costs more than it brings
        import torch

        torch.set_num_threads(1)
        RECORD[chosen.one](gpus[0], chosen.folder / f"launches-{chosen.one}-{gpus[0]}.json")
        return 0
    files = record(chosen.folder, gpus, chosen.source or list(RECORD), chosen.again)
    (chosen.folder / "launches.txt").write_text("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
