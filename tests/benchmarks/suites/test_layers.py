"""The layer grid, on tiny shapes and on made-up times."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import pmkernels
from benchmarks.common import layer_case
from benchmarks.common.layer_case import LIMIT
from benchmarks.suites import layers
from pmkernels import linear


@pytest.fixture(scope="module")
def rehearsal() -> dict[str, Any]:
    return layers.run(quick=True)


def test_every_variant_of_every_point_runs_and_is_right(rehearsal: dict[str, Any]) -> None:
    found = {(r["layer"], r["rows"], r["op"], r["variant"]) for r in rehearsal["rows"]}
    expected = set()
    for layer in ("tiny", "tiny MLP"):
        for rows in (1, 15):
            for op in ("forward", "dx", "weight gradient"):
                names = [LIMIT, "fused", "streamed", "auto", *(["cached"] if op != "weight gradient" else [])]
                expected |= {(layer, rows, op, name) for name in names}
    assert found == expected
    assert len(rehearsal["rows"]) == len(expected)
    wrong = [(r["op"], r["layer"], r["variant"], r["error"]) for r in rehearsal["rows"] if not r["matched"]]
    assert wrong == []
    assert all(r["ms"] > 0 and r["p20"] <= r["ms"] <= r["p80"] for r in rehearsal["rows"])
    assert all((r["chosen"] in ("fused", "streamed")) == (r["variant"] == "auto") for r in rehearsal["rows"])
    assert {r["layer"]: r["rank"] for r in rehearsal["rows"]} == {"tiny": 16, "tiny MLP": 0}


def test_a_rehearsal_predicts_nothing_and_is_drawn(rehearsal: dict[str, Any], tmp_path: Path) -> None:
    text = layers.markdown(rehearsal)
    assert text.count("(–)") == len(rehearsal["crossovers"]) == 6
    written = layers.draw(rehearsal, tmp_path / "pictures")
    assert [path.name for path in written] == [f"layers-{op}.png" for op in ("forward", "dx", "weight-gradient")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def points(op: str, layer: int = 0) -> list[layers.GridRow]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    case = layer_case.Case.make(layers.TINY_LAYERS[layer], 2, 5, dtype, device)
    with torch.no_grad():
        return list(layers.points(case, op, 5))


def test_a_wrong_forward_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = pmkernels.pareto_linear
    monkeypatch.setattr(pmkernels, "pareto_linear", lambda *a, **k: correct(*a, **k) * 1.01)
    rows = points("forward")
    assert {row.variant for row in rows if not row.matched} == {"fused", "streamed", "auto", "cached"}
    assert all((row.ms is None) == (row.variant != LIMIT) for row in rows)
    report = {"rank": 16, "rates": None, "skipped": [], "rows": [asdict(row) for row in rows]}
    report["crossovers"] = layers.crossovers(report["rows"], None, "default")
    assert "4 outputs were wrong and have no time" in layers.markdown({**report, "crossovers": []})
    assert layers.ratios(report) == []
    assert report["crossovers"][0]["measured"] is None


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("wrong", [1, 2, 3, 4])
def test_one_wrong_gradient_is_seen(wrong: int, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of dλ, dA, dG and dB by one per cent; without a low-rank term there is dλ alone."""
    correct = linear.linear_backward_operator

    def backward(*arguments: Any) -> list[torch.Tensor]:
        return [g * 1.01 if index == wrong else g for index, g in enumerate(correct(*arguments))]

    monkeypatch.setattr(linear, "linear_backward_operator", backward)
    seen = {row.variant for row in points("weight gradient", layer) if not row.matched}
    assert seen == (set() if layer == 1 and wrong > 1 else {"fused", "streamed", "auto"})


def test_points_that_do_not_fit_are_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = layers.TINY_LAYERS[0]
    enough = layer_case.needed_memory(tiny, 2, 1)
    monkeypatch.setattr(layers, "TINY_LAYERS", (tiny,))
    monkeypatch.setattr(layers, "free_memory", lambda device: enough)
    report = layers.run(quick=True)
    assert {row["rows"] for row in report["rows"]} == {1}
    assert report["skipped"] == [{"layer": "tiny", "tasks": 2, "rows": 15}]
    assert "1 do not fit in memory" in layers.markdown(report)
    monkeypatch.setattr(layers, "free_memory", lambda device: enough - 1)
    report = layers.run(quick=True)
    assert report["rows"] == [] and len(report["skipped"]) == 2
    assert "No point" in layers.markdown(report)


def test_where_streamed_overtakes_for_good() -> None:
    assert layers.crossover({1: (1.0, 2.0), 64: (3.0, 2.0), 8: (2.0, 2.0), 512: (9.0, 2.0)}) == 64
    assert layers.crossover({1: (3.0, 2.0), 8: (1.0, 2.0), 64: (3.0, 2.0)}) == 64, "once and not again does not count"
    assert layers.crossover({1: (3.0, 2.0), 8: (3.0, 2.0)}) == 1
    assert layers.crossover({1: (3.0, 2.0), 8: (1.0, 2.0)}) is None
    assert layers.crossover({}) is None


def made_up(rows: int, **ms: float) -> list[dict[str, Any]]:
    shape = {"op": "forward", "layer": "7B projection", "n": 4096, "d": 4096, "tasks": 8, "rank": 16, "rows": rows}
    common = {**shape, "dtype": "bfloat16", "matched": True, "chosen": "streamed", "graph": True}
    return [{**common, "variant": LIMIT if name == "limit" else name, "ms": value} for name, value in ms.items()]


def test_the_worst_choice_and_the_crossover_are_reported() -> None:
    rows = [
        *made_up(1, limit=0.01, fused=0.02, streamed=0.05, auto=0.03, cached=0.01),
        *made_up(64, limit=0.01, fused=0.03, streamed=0.05, auto=0.03, cached=0.01),
        *made_up(512, limit=0.1, fused=0.4, streamed=0.2, auto=0.21, cached=0.1),
        *made_up(16384, limit=0.1, fused=4.0, streamed=0.2, auto=0.2, cached=0.1),
    ]
    gpu = "nvidia-h200"
    report: dict[str, Any] = {"rank": 16, "gpu": gpu, "rates": gpu, "rows": rows, "skipped": []}
    found = layers.ratios(report)
    assert [entry["rows"] for entry in found][:2] == [1, 512]
    assert [round(entry["ratio"], 3) for entry in found] == [1.5, 1.05, 1.0, 1.0]
    assert found[0]["best"] == "fused" and found[1]["best"] == "streamed"
    report["crossovers"] = layers.crossovers(rows, gpu, "default")
    (entry,) = report["crossovers"]
    assert entry["measured"] == 512
    assert entry["predicted"] in (64, 512, 16384), "at one row nothing is cheaper than reading everything once"
    report["crossovers"] += [{**entry, "op": op} for op in ("dx", "weight gradient")]
    text = layers.markdown(report)
    assert "| forward | 4 | 3 | 1.50× | 7B projection, K = 8, M = 1 | streamed | fused |" in text
    assert f"| 7B projection | 8 | 512 ({entry['predicted']}) |" in text
    assert "| 7B projection | 8 | 512 | 100.0 | 4.00× | 2.00× | 1.00× | 2.10× |" in text


def test_the_grid_has_five_powers_of_two_and_the_models_own_rows() -> None:
    assert len(layers.LAYERS) == 9 and len(layers.POWERS) == 5
    own = {"ViT-B/32": 1600, "ViT-L/14": 8224}
    for layer in layers.LAYERS:
        rows = layers.grid(layer, layers.POWERS)
        assert [m for m in rows if not m & (m - 1)] == list(layers.POWERS)
        assert [m for m in rows if m & (m - 1)] == [own[name] for name in own if layer.name.startswith(name)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none"):
        layers.run(quick=False)
