"""Three tasks: pairwise projections, coloured by preference."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from support.pictures import LATTICE, a_model, a_set, drawn, legend_texts, projected

from pareto_merging.measure.figures.sets import Set
from pareto_merging.measure.figures.simplex import simplex_scatter


def test_simplex_scatter_holds_the_data(tmp_path: Path, saved: list[Figure]) -> None:
    ours = Set("Ours", (60 + 30 * np.array([*LATTICE, [1 / 3] * 3])).tolist(), [*LATTICE, [1 / 3] * 3])
    sets = [a_model("First", 3), ours, a_set("Later", 3, 4)]
    simplex_scatter(tmp_path / "s.png", ["A", "B", "C"], sets)
    for axes, (x, y) in zip(saved[0].axes, ((0, 1), (0, 2), (1, 2)), strict=False):
        assert axes.get_xlabel() == f"{'ABC'[x]} accuracy (%)"
        assert axes.get_ylabel() == f"{'ABC'[y]} accuracy (%)"
        for one in sets:
            assert drawn(axes, one.name) == projected(one, x, y)
        ours_drawn = [c for c in axes.collections if c.get_label() == "Ours"]
        # three favoured tasks, and none
        assert len({str(c.get_paths()[0].vertices.tolist()) for c in ours_drawn}) == 4
        colours = {
            tuple(point): to_hex(colour)
            for c in ours_drawn
            for point, colour in zip(c.get_offsets().tolist(), c.get_facecolors(), strict=True)
        }
        assert len(set(colours.values())) == len(set(map(tuple, LATTICE))) + 1
    corner = [90, 60, 60]
    first = next(c for c in saved[0].axes[0].collections if c.get_label() == "Ours")
    row = first.get_offsets().tolist().index(corner[:2])
    assert to_hex(first.get_facecolors()[row]) == "#0072b2", "all weight on one task is that corner's colour"
    for axes in saved[0].axes[:3]:
        greys = [to_hex(line.get_markerfacecolor()) for line in axes.lines]
        assert all(colour[1:3] == colour[3:5] == colour[5:7] for colour in greys)
    assert legend_texts(saved[0]) == ["First", "Later"]
