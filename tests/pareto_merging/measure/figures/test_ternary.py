"""Three tasks: triangles of preferences."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.pictures import LATTICE, texts

from pareto_merging.measure.figures.ternary import ternary


def test_ternary_holds_the_data(tmp_path: Path, saved: list[Figure]) -> None:
    accuracies = 60 + 30 * np.array(LATTICE)
    ternary(tmp_path / "t.png", ["A", "B", "C"], LATTICE, accuracies.tolist(), title="50% of $a_b$")
    triangles = [axes for axes in saved[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in triangles] == [f"accuracy on {n}" for n in "ABC"] + ["average accuracy"]
    assert "50% of $a_b$" in texts(saved[0])
    corners = {text.get_text(): text.xy for text in triangles[0].texts}
    for axes in triangles:
        dots = np.array(axes.lines[0].get_xydata())
        assert np.allclose(dots, np.array(LATTICE) @ np.array([corners[name] for name in "ABC"]))
    bars = [axes for axes in saved[0].axes if axes.get_ylabel() == "accuracy (%)"]
    assert len(bars) == 4
    assert bars[0].get_ylim()[0] <= 60 and bars[0].get_ylim()[1] >= 90
    # contours of task A are filled brighter towards its corner
    filled = triangles[0].collections[0]
    assert filled.get_array().size > 5
    assert filled.norm(90) > filled.norm(60)


@pytest.mark.parametrize(
    ("gammas", "filled"),
    [
        (LATTICE, True),
        (LATTICE * 2, True),
        (np.eye(3).tolist(), False),
        ([[a / 9, 1 - a / 9, 0] for a in range(10)], False),
        ([[1 / 3, 1 / 3, 1 / 3]], False),
        ([[0.2, 0.3, 0.5]] * 6, False),
    ],
)
@pytest.mark.parametrize("spread", [0, 1e-9, 10])
def test_ternary_of_little(
    tmp_path: Path, saved: list[Figure], gammas: list[list[float]], filled: bool, spread: float
) -> None:
    accuracies = 80 + spread * np.random.default_rng(0).random((len(gammas), 3))
    ternary(tmp_path / "t.png", ["A", "B", "C"], gammas, accuracies.tolist())
    axes = saved[0].axes[0]
    assert bool(axes.lines) == filled, "dots without colour lie on contours only"
    assert (len(axes.collections[0].get_offsets()) == len(gammas)) != filled
