"""Served layers: a wrong one, and their bound."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import pmkernels
from benchmarks.serving import layers, suite, summary

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_wrong_layer_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = pmkernels.preference_linear

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        y = correct(*arguments, **options)
        y[-1, -1] *= 1.01
        return y

    layer = next(layer for _, layer in layers.projections(quick=True))
    for function, right in ((correct, True), (wrong, False)):
        monkeypatch.setattr(pmkernels, "preference_linear", function)
        rates = {"float32": 1e12, "copy": 1e9}
        rows = list(layers.layer_rows("tiny ViT", layer, torch.float32, CPU, suite.QUICK_EFFORT, rates))
        assert {row.matched for row in rows if row.variant == "auto"} == {right}
        assert all((row.ms is not None) == row.matched for row in rows)
    assert "wrong: error" in summary.layers_markdown([asdict(row) for row in rows])


def test_the_bound_of_a_layer_follows_from_the_rates() -> None:
    _, layer = next(found for found in layers.projections(quick=False) if found[1].items == 32)
    rows, n, d = 32 * 50, 2304, 768
    assert (layer.items * layer.tokens, layer.n, layer.d) == (rows, n, d)
    operations = 2 * rows * (n * d + 16 * (n + d))
    fast = {"bfloat16": 1e12, "copy": 1e30}
    assert layers.bound_ms(layer, fast, torch.bfloat16) == pytest.approx(1e3 * operations / 1e12, rel=1e-3)
    slow = {"bfloat16": 1e30, "copy": 1e12}
    least = 2 * (rows * (n + d) + n * d)
    assert least < layers.bound_ms(layer, slow, torch.bfloat16) * 1e9 < 1.3 * least  # type: ignore[operator]
    assert layers.bound_ms(layer, None, torch.float32) is None
