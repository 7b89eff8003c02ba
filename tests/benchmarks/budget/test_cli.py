"""The budget's command. In processes of their own: kernels are interpreted in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(program: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


@pytest.mark.slow
def test_what_compiles_within_the_limits_passes(tmp_path: Path) -> None:
    out = tmp_path / "budget.json"
    done = run(
        "import sys; from benchmarks.budget import cli; "
        f"sys.exit(cli.main(['--arch', 'sm_90', '--limit', '4', '--jobs', '1', '--out', {str(out)!r}]))"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| linear_fwd | bfloat16 |" in done.stdout
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    assert all(row["registers"] > 16 and row["instructions"] > 100 and 0 < row["occupancy"] <= 1 for row in rows)
    product = next(row for row in rows if row["kernel"] == "linear_fwd_kernel")
    assert product["tensor_core"] > 0
    assert product["shared"] > 0


def test_interpreting_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.budget"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 2
    assert "expected unset" in done.stderr
