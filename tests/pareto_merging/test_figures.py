"""Pictures: written whole, with everything they were given in them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pareto_merging.figures import two_task_front


def test_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    save = Figure.savefig

    def look(self: Figure, *args: object, **kwargs: object) -> None:
        seen.extend(text.get_text() for legend in self.legends for text in legend.get_texts())
        seen.extend(text.get_text() for axes in self.axes for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label))
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", look)
    path = tmp_path / "deep" / "front.png"
    two_task_front(
        path,
        ("MNIST", "DTD"),
        [[50, 90], [80, 60]],
        [[0, 1], [1, 0]],
        {"AdaMerging": [60, 60]},
        {"MNIST": [95, 10], "DTD": [10, 95]},
    )
    with Image.open(path) as picture:
        assert picture.width > picture.height > 400
    assert {"Pareto Merging", "AdaMerging", "fine-tuned on MNIST", "γ₁ = 0", "γ₁ = 1"} <= set(seen)
    assert "MNIST: held-out accuracy (%)" in seen
    assert "DTD: held-out accuracy (%)" in seen
    assert not plt.get_fignums(), "the figure is closed"
