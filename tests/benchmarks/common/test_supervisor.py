"""A run that is watched: workers that hang, die, and are told to stop, in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.record import Record
from benchmarks.common.supervisor import EXIT_COMPLETE, EXIT_LOST, EXIT_TIME, EXIT_UNUSABLE, EXIT_WRONG, supervise

ROOT = Path(__file__).parents[3]
# a worker that measures the units it is given, each a line of Python
WORKER = """
import sys, time, os, signal
from pathlib import Path
from benchmarks.common.record import Record
from benchmarks.common.session import Session
path = Path(sys.argv[1])
record = Record.read(path, "made-up")
record.resume()
session = Session(record, float(sys.argv[sys.argv.index("--until") + 1]), say=lambda line: None)
row = {"variant": "a", "ms": 1.0, "matched": True}

def unit(key, line, limit=60.0):
    def rows():
        # it is given up after that long
        record.begin(key, limit, time.monotonic())
        exec(line)
        return [row]
    session.measure(key, rows, 0.0)
"""


def run(path: Path, units: str, seconds: float = 60.0, said: list[str] | None = None) -> Any:
    if not path.exists():
        Record.new(path, {"suite": "made-up"}).write()
    finished: list[Record] = []
    say = (lambda line: None) if said is None else said.append
    outcome = supervise(path, "made-up", ["-c", WORKER + units, str(path)], seconds, finished.append, say)
    assert len(finished) == 1
    return outcome, json.loads(path.read_text())


def test_a_worker_that_measures_everything(tmp_path: Path) -> None:
    units = "unit('g/1', ''); unit('g/2', '')"
    outcome, data = run(tmp_path / "r.json", units)
    assert (outcome.code, data["ended"], list(data["units"])) == (EXIT_COMPLETE, "complete", ["g/1", "g/2"])
    outcome, data = run(tmp_path / "r.json", units)
    assert (outcome.code, len(data["rows"])) == (EXIT_COMPLETE, 2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("time.sleep(100)", "no answer for"),
        ("os._exit(7)", "its process ended with exit code 7"),
        (f"os._exit({EXIT_LOST})", "its process ended with a GPU that did not answer any more"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with signal SIGSEGV"),
    ],
)
def test_a_unit_that_takes_its_process_with_it_costs_nothing_else(tmp_path: Path, line: str, reason: str) -> None:
    said: list[str] = []
    units = f"unit('g/1', ''); unit('g/2', {line!r}, 0.3); unit('g/3', '')"
    outcome, data = run(tmp_path / "r.json", units, said=said)
    assert outcome.code == EXIT_WRONG and data["ended"] == "complete"
    assert list(data["units"]) == ["g/1", "g/2", "g/3"]
    by_unit = {row["unit"]: row for row in data["rows"]}
    assert by_unit["g/2"]["matched"] is False and by_unit["g/2"]["reason"].startswith(reason)
    assert by_unit["g/1"]["matched"] and by_unit["g/3"]["matched"]
    assert len(said) == 1 and said[0].startswith(f"g/2: {reason}")


def test_a_worker_that_never_measures_anything_is_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    outcome, data = run(tmp_path / "r.json", "raise SystemExit(5)", said=said)
    assert outcome.code == EXIT_UNUSABLE and data["units"] == {}
    assert said[-1].startswith("given up: its process ended with exit code 5")
    outcome, data = run(tmp_path / "r.json", f"raise SystemExit({EXIT_UNUSABLE})")
    assert (outcome.code, data["ended"]) == (EXIT_UNUSABLE, "not usable here")


def test_the_time_limit_ends_a_worker_that_does_not_look_at_the_clock(tmp_path: Path) -> None:
    # ignoring SIGTERM helps it nothing
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    outcome, data = run(tmp_path / "r.json", f"unit('g/1', ''); unit('g/2', {stubborn!r}, 1000)", seconds=4.0)
    assert (outcome.code, data["ended"]) == (EXIT_TIME, "time limit")
    assert list(data["units"]) == ["g/1"] and data["not_reached"] == ["g/2"] and data["running"] is None
    outcome, data = run(tmp_path / "r.json", "unit('g/1', ''); unit('g/2', '')")
    assert (outcome.code, list(data["units"])) == (EXIT_COMPLETE, ["g/1", "g/2"])


def started(path: Path, units: str) -> subprocess.Popen[bytes]:
    """A process that supervises, once its worker is in its second unit."""
    Record.new(path, {"suite": "made-up"}).write()
    program = f"""
import sys
from pathlib import Path
from benchmarks.common.supervisor import supervise
command = ["-c", {WORKER + units!r}, {str(path)!r}]
sys.exit(supervise(Path({str(path)!r}), "made-up", command, 600.0, lambda record: None).code)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while "g/1" not in Record.read(path, "made-up").data["units"]:
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_run_with_what_there_is(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "r.json"
    process = started(path, "unit('g/1', ''); unit('g/2', 'time.sleep(1000)', 1000)")
    process.send_signal(number)
    assert process.wait() == 128 + number
    data = json.loads(path.read_text())
    assert data["ended"] == f"signal {number.name}" and list(data["units"]) == ["g/1"]
    assert data["not_reached"] in (["g/2"], [])


@pytest.mark.skipif(sys.platform != "linux", reason="a worker learns of its parent's death on Linux only")
def test_a_worker_does_not_outlive_who_watches_it(tmp_path: Path) -> None:
    path, note = tmp_path / "r.json", tmp_path / "pid"
    process = started(path, f"Path({str(note)!r}).write_text(str(os.getpid())); unit('g/1', ''); time.sleep(1000)")
    process.kill()
    process.wait()
    worker = int(note.read_text())
    while _alive(worker):
        time.sleep(0.05)
    assert Record.read(path, "made-up").data["ended"] == "running"


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    # a zombie waits for whoever adopted it
    return state != "Z"


def test_nothing_heavy_is_imported_by_who_watches() -> None:
    """The file must be there before anything can go wrong, and PyTorch takes seconds to import."""
    program = "import sys, benchmarks.goals.cli; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ}).returncode == 0
