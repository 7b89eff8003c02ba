"""Parallel coordinates."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from support.pictures import drawn, legend_texts, task_names

from pareto_merging.measure.figures.parallel import parallel_coordinates
from pareto_merging.measure.figures.sets import Set


def test_parallel_coordinates_hold_the_data(tmp_path: Path, saved: list[Figure]) -> None:
    gammas = [[0.7, 0.1, 0.1, 0.1], [0.25] * 4, [0, 0, 0, 1]]
    ours = Set("Ours", [[90, 80, 70, 60], [85, 84, 83, 82], [61, 62, 63, 92]], gammas)
    uneven = Set("Uneven", [[51, 52, 53, 54], [71, 72, 73, 74]], [[0.9, 0.1, 0, 0], [0.3, 0.3, 0.2, 0.2]])
    model = Set("Model", [[55, 56, 57, 58]])
    fine_tuned = {"x": [96, 20, 20, 20.0], "y": [20, 95, 94, 97.0]}
    parallel_coordinates(tmp_path / "p.png", task_names(4), [model, ours, uneven], fine_tuned)
    (axes,) = saved[0].axes
    lines = {label: [line for line in axes.lines if line.get_label() == label] for label in ("Ours", "Uneven", "Model")}
    assert sorted(np.array(line.get_ydata()).tolist() for line in lines["Ours"]) == sorted(ours.accuracies)
    thick = max(lines["Ours"], key=lambda line: line.get_linewidth())
    assert np.array(thick.get_ydata()).tolist() == [85, 84, 83, 82]
    assert to_hex(thick.get_color()) == "#000000"
    thin = {to_hex(line.get_color()) for line in lines["Ours"] if line is not thick}
    assert len(thin) == 2, "another colour for another favoured task"
    assert [np.array(line.get_ydata()).tolist() for line in lines["Uneven"]] == [[71, 72, 73, 74]]
    assert [np.array(line.get_ydata()).tolist() for line in lines["Model"]] == [[55, 56, 57, 58]]
    assert all(line.get_linestyle() != "-" for label in ("Uneven", "Model") for line in lines[label])
    assert drawn(axes, "best fine-tuned model of each task") == {(0, 96), (1, 95), (2, 94), (3, 97)}
    assert [label.get_text() for label in axes.get_xticklabels()] == task_names(4)
    low, high = axes.get_ylim()
    assert 50 < low < 55 and 97 < high < 101, "all that is drawn, and little more"
    assert {"Ours, equal preference", "Uneven (most even preference)", "Model"} <= set(legend_texts(saved[0]))
