"""The kernels suite on tiny shapes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pmkernels
from benchmarks import run
from benchmarks.suites import kernels


def test_the_kernels_suite_is_rehearsed_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiny shapes, interpreted: every variant of every operation runs and matches float64."""

    def other_suite(name: str) -> Any:
        # each has a rehearsal of its own, in its own tests
        module = SimpleNamespace(run=lambda quick, save: {"rows": []}, markdown=lambda suite: f"| {name} |")
        return SimpleNamespace(measuring=module, showing=module)

    for name in ("training", "layers", "serving"):
        monkeypatch.setitem(run.SUITES, name, other_suite(name))
    out = tmp_path / "rehearsal.json"
    assert run.main(["--suite", "all", "--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report["suites"]) == ["kernels", "training", "layers", "serving"]
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in ("training", "layers", "serving"))
    rows = report["suites"]["kernels"]["rows"]
    variants = {(row["op"], row["variant"]) for row in rows}
    for op in ("forward", "dx", "forward and backward", "forward, 3 preferences"):
        assert {(op, "fused"), (op, "streamed"), (op, "auto"), (op, "PyTorch")} <= variants
        assert any(variant.startswith("limit") for name, variant in variants if name == op)
    for op in ("weight gradient", "low-rank gradient, λ frozen", "merge", "softmax entropy, forward and backward"):
        assert {(op, "fused"), (op, "PyTorch")} <= variants
    for variant in ("merge again for each request", "loop over the preferences' adapters"):
        assert ("forward, 3 preferences", variant) in variants
    assert all(row["matched"] and row["ms"] > 0 and row["bound_ms"] > 0 for row in rows)
    text = kernels.markdown(report["suites"]["kernels"])
    assert all(f"**{op}**" in text for op, _ in variants)
    # a rehearsal is nobody's result
    assert report["quick"]


def test_a_wrong_result_has_no_time_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = pmkernels.merge_weight
    monkeypatch.setattr(pmkernels, "merge_weight", lambda *a, **k: correct(*a, **k) * 1.01)
    out = tmp_path / "wrong.json"
    assert run.main(["--suite", "kernels", "--quick", "--out", str(out)]) == 1
    suite = json.loads(out.read_text())["suites"]["kernels"]
    wrong = [row for row in suite["rows"] if not row["matched"]]
    assert {(row["op"], row["variant"]) for row in wrong} == {("merge", "fused")}
    assert all(row["ms"] is None for row in wrong)
    assert "wrong: error" in kernels.markdown(suite)
