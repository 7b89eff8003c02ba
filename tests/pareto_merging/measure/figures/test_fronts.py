"""Two tasks: fronts."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from support.pictures import a_model, a_set, drawn, many, projected, texts

from pareto_merging.measure.figures.fronts import fronts
from pareto_merging.measure.figures.sets import Set


def test_front(tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / "deep" / "front.png"
    sets = [Set("Pareto Merging", [[50, 90], [80, 60]], [[0, 1], [1, 0]]), Set("AdaMerging", [[60, 60]])]
    fronts(path, ("MNIST", "DTD"), sets, {"MNIST": [95, 10], "DTD": [10, 95]})
    with Image.open(path) as picture:
        assert picture.width > picture.height > 400
    seen = texts(saved[0])
    assert {"Pareto Merging", "AdaMerging", "fine-tuned on MNIST", "γ₁ = 0", "γ₁ = 1"} <= seen
    assert "MNIST: held-out accuracy (%)" in seen
    assert "DTD: held-out accuracy (%)" in seen
    assert not plt.get_fignums(), "the figure is closed"


def test_fronts_hold_the_data(tmp_path: Path, saved: list[Figure]) -> None:
    # out of order, and the solution of γ₁ = 0.5 is dominated
    ours = Set("Ours", [[90, 60], [70, 59], [60, 90]], [[1, 0], [0.5, 0.5], [0, 1]])
    far = Set("Far", [[5, 5]])
    fronts(tmp_path / "f.png", ["A", "B"], [ours, far, *many(2)[1:]], {"A": [99, 3], "B": [2, 98]})
    whole, near = saved[0].axes
    line = next(line for line in near.lines if line.get_label() == "Ours")
    assert np.array(line.get_xydata()).tolist() == [[60, 90], [70, 59], [90, 60]], "ascending in γ₁"
    hollow = [line for line in near.lines if line.get_label() == "Ours" and line.get_markerfacecolor() == "white"]
    assert [np.array(line.get_xydata()).tolist() for line in hollow] == [[[70, 59]]]
    assert drawn(whole, "fine-tuned on A") == {(99, 3)}
    assert not [line for line in near.lines if str(line.get_label()).startswith("fine-tuned")]
    for one in (ours, *many(2)[1:]):
        assert drawn(whole, one.name) == drawn(near, one.name) == projected(one, 0, 1)
    assert whole.get_xlim()[0] < 0 and whole.get_xlim()[1] > 100 and near.get_xlim()[0] > 20
    assert near.get_title() == "enlarged (1 outside)"


def test_fronts_differ_in_more_than_colour(tmp_path: Path, saved: list[Figure]) -> None:
    sets = [a_set(f"set {n}", 2, 4, n) for n in range(5)] + [a_model(f"model {n}", 2, n) for n in range(25)]
    fronts(tmp_path / "f.png", ["A", "B"], sets)
    handles = [h for h in saved[0].legends[0].legend_handles if isinstance(h, Line2D)][:30]
    assert len({(str(h.get_marker()), to_hex(h.get_color())) for h in handles}) == 30
    assert len({str(h.get_marker()) for h in handles[:17]}) == 17
    assert len({str(h._unscaled_dash_pattern) for h in handles[:5]}) == 5
