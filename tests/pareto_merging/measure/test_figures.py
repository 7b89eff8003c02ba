"""Pictures: written whole, with everything they were given in them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from pareto_merging.measure.figures import (
    Set,
    compare_pictures,
    fronts,
    pairwise_projections,
    parallel_coordinates,
    simplex_scatter,
    ternary,
    two_task_front,
)

LATTICE = [[a / 7, b / 7, (7 - a - b) / 7] for a in range(8) for b in range(8 - a)]
WRITTEN = {
    1: [],
    2: ["front.png"],
    3: ["ternary.png", "simplex.png", "parallel.png"],
    4: ["parallel.png", "projections.png"],
    8: ["parallel.png", "projections.png"],
    12: ["parallel.png", "projections.png"],
    20: ["parallel.png", "projections.png"],
}
WIDTHS = {"parallel.png": 3.4, "front.png": 7, "ternary.png": 7, "simplex.png": 7, "projections.png": 7}


@pytest.fixture(name="saved")
def fixture_saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, in their final layout."""
    figures: list[Figure] = []
    save = Figure.savefig

    def look(self: Figure, *args: object, **kwargs: object) -> None:
        save(self, *args, **kwargs)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", look)
    return figures


def task_names(tasks: int) -> list[str]:
    return [f"TASK_{k}" for k in range(tasks)]


def a_set(name: str, tasks: int, solutions: int, seed: int = 0) -> Set:
    rng = np.random.default_rng(seed)
    gammas = rng.dirichlet(np.ones(tasks), solutions)
    gammas[0] = 1 / tasks
    return Set(name, (70 + 20 * gammas + rng.uniform(0, 5, gammas.shape)).tolist(), gammas.tolist())


def a_model(name: str, tasks: int, seed: int = 0) -> Set:
    return Set(name, np.random.default_rng(seed).uniform(50, 90, (1, tasks)).tolist())


def many(tasks: int) -> list[Set]:
    return [a_set("Ours", tasks, 12), a_set("Other set", tasks, 9, 1)] + [
        a_model(f"Method {n}", tasks, n) for n in range(16)
    ]


def individuals(tasks: int) -> dict[str, list[float]]:
    return {name: [95.0 if k == j else 30.0 for j in range(tasks)] for k, name in enumerate(task_names(tasks))}


def drawn(axes: Axes, label: str) -> set[tuple[float, ...]]:
    """Every point of the artists with this label."""
    points = [np.column_stack(line.get_data()) for line in axes.lines if line.get_label() == label]
    points += [np.asarray(c.get_offsets()) for c in axes.collections if c.get_label() == label]
    return {tuple(point) for point in np.concatenate(points).round(9).tolist()}


def projected(one: Set, x: int, y: int) -> set[tuple[float, ...]]:
    return {tuple(point) for point in np.asarray(one.accuracies)[:, (x, y)].round(9).tolist()}


def legends(figure: Figure) -> list[Any]:
    return [legend for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)) if legend is not None]


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for legend in legends(figure) for text in legend.get_texts()]


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


def test_front(tmp_path: Path, saved: list[Figure]) -> None:
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
    seen = texts(saved[0])
    assert {"Pareto Merging", "AdaMerging", "fine-tuned on MNIST", "γ₁ = 0", "γ₁ = 1"} <= seen
    assert "MNIST: held-out accuracy (%)" in seen
    assert "DTD: held-out accuracy (%)" in seen
    assert not plt.get_fignums(), "the figure is closed"


@pytest.mark.parametrize("tasks", WRITTEN)
def test_every_comparison(tmp_path: Path, saved: list[Figure], tasks: int) -> None:
    names, sets = task_names(tasks), many(tasks)
    paths = compare_pictures(tmp_path / "new", names, sets, individuals(tasks))
    assert [path.name for path in paths] == WRITTEN[tasks]
    assert sorted(path.name for path in tmp_path.glob("*/*")) == sorted(WRITTEN[tasks])
    for path, figure in zip(paths, saved, strict=True):
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            # many methods want the width of the page everywhere
            assert picture.width == 2100
            colours = picture.convert("RGB").getcolors(1 << 24)
        assert len([count for count, _ in colours if count > 20]) > 12
        assert all(text.get_fontsize() >= 7 for text in figure.findobj(Text) if text.get_text()), path.name
        seen = " ".join(texts(figure))
        assert all(name in seen for name in names), path.name
        if path.name != "ternary.png":
            shown = legend_texts(figure)
            assert [name for name in (one.name for one in sets[1:]) if not any(t.startswith(name) for t in shown)] == []


@pytest.mark.parametrize("tasks", [2, 3, 8, 12, 20])
def test_legends_and_titles_cover_nothing(tmp_path: Path, saved: list[Figure], tasks: int) -> None:
    compare_pictures(tmp_path, task_names(tasks), many(tasks), individuals(tasks))
    for figure in saved:
        for legend in legends(figure):
            box = legend.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
            others = [axes for axes in figure.axes if axes is not legend.axes]
            assert not [axes for axes in others if box.overlaps(axes.get_window_extent())]
        for one, other in itertools.combinations(figure.axes, 2):
            assert not one.get_window_extent().overlaps(other.get_window_extent())
        for axes in figure.axes:
            boxes = [t.get_window_extent() for t in (axes.title, *axes.texts) if t.get_text()]
            assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


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


@pytest.mark.parametrize(
    ("tasks", "pairs"),
    [
        (3, [(0, 1), (2, 0)]),
        (4, [(0, 1), (2, 3)]),
        (8, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (9, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 0)]),
        (12, [(k, k + 1) for k in range(0, 12, 2)]),
        (20, [(k, k + 1) for k in range(0, 20, 2)]),
    ],
)
def test_pairwise_projections_hold_the_data(
    tmp_path: Path, saved: list[Figure], tasks: int, pairs: list[tuple[int, int]]
) -> None:
    pairwise_projections(tmp_path / "p.png", task_names(tasks), many(tasks))
    assert len(saved[0].axes) == len(pairs)
    for axes, (x, y) in zip(saved[0].axes, pairs, strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == (f"TASK_{x} (%)", f"TASK_{y} (%)")
        for one in many(tasks):
            assert drawn(axes, one.name) == projected(one, x, y)
    assert legend_texts(saved[0]) == [one.name for one in many(tasks)]


def test_chosen_projections(tmp_path: Path, saved: list[Figure]) -> None:
    pairwise_projections(tmp_path / "p.png", task_names(5), many(5), [(4, 2)])
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in saved[0].axes] == [("TASK_4 (%)", "TASK_2 (%)")]
    for pairs in ([], [(1, 1)], [(0, 5)], [(-1, 0)], [(0, 1, 2)]):
        with pytest.raises(ValueError, match="pairs: expected pairs of different tasks from 0 to 4, got"):
            pairwise_projections(tmp_path / "q.png", task_names(5), many(5), pairs)


@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["only models", "one solution", "one corner"])
def test_little_to_draw(tmp_path: Path, tasks: int, kind: str) -> None:
    gamma = [1.0] + [0.0] * (tasks - 1) if kind == "one corner" else [1 / tasks] * tasks
    one = a_model("Model", tasks) if kind == "only models" else Set("Ours", [[80.0] * tasks], [gamma])
    paths = compare_pictures(tmp_path, task_names(tasks), [one])
    expected = [name for name in WRITTEN.get(tasks, WRITTEN[4]) if kind != "only models" or name != "ternary.png"]
    assert [path.name for path in paths] == expected
    assert all(path.stat().st_size > 1000 for path in paths)
    assert compare_pictures(tmp_path / "none", task_names(tasks), []) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_names_are_not_formulas(tmp_path: Path, saved: list[Figure], tasks: int) -> None:
    names = [*("100% of $x", "$\\frac{1}$", "_a_b"), *task_names(9)][:tasks]
    sets = [
        Set("_ours_ $\\x$ 5%", a_set("", tasks, 6).accuracies, a_set("", tasks, 6).gammas),
        a_model("_$m_1$", tasks),
    ]
    with matplotlib.rc_context({"text.usetex": True, "savefig.bbox": "tight", "savefig.dpi": 20}):
        paths = compare_pictures(tmp_path, names, sets, {"$t$": [99.0] * tasks})
    for path, figure in zip(paths, saved, strict=True):
        with Image.open(path) as picture:
            assert picture.width == round(300 * WIDTHS[path.name]), "the user's settings of matplotlib do not count"
        seen = " ".join(texts(figure))
        assert all(name in seen for name in names)
        if path.name != "ternary.png":
            assert "_$m_1$" in legend_texts(figure)


def test_long_names_stay_inside(tmp_path: Path, saved: list[Figure]) -> None:
    names = [f"{'a very long name of a task ' * 4}{k}" for k in range(8)]
    for tasks in (2, 3, 8):
        sets = [Set("long " * 30, a_set("", tasks, 6).accuracies, a_set("", tasks, 6).gammas), a_model("M", tasks)]
        compare_pictures(tmp_path, names[:tasks], sets, {"of length " * 9: [99.0] * tasks})
    for figure in saved:
        named = [*figure.texts, *(text for legend in legends(figure) for text in legend.get_texts())]
        for axes in figure.axes:
            named += [*axes.texts, *(axes.get_xticklabels() if len(figure.axes) == 1 else ())]
            named += [axes.title, axes.xaxis.label, axes.yaxis.label] if axes.axison else [axes.title]
        for text in named:
            if text.get_text():
                box = text.get_window_extent()
                assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text.get_text()
                assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text.get_text()


def test_same_picture_twice(tmp_path: Path) -> None:
    for tasks in (2, 3, 4):
        once = compare_pictures(tmp_path / "a", task_names(tasks), many(tasks))
        again = compare_pictures(tmp_path / "b", task_names(tasks), many(tasks))
        assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_arrays_are_taken_too(tmp_path: Path) -> None:
    one = a_set("Ours", 3, 5)
    sets: Any = [Set("Ours", np.array(one.accuracies), np.array(one.gammas))]
    assert len(compare_pictures(tmp_path, task_names(3), sets)) == 3


@pytest.mark.parametrize("old", [None, b"old"])
def test_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None) -> None:
    def fail(self: Figure, path: Path, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    for tasks, name in ((2, "front.png"), (3, "ternary.png"), (4, "parallel.png")):
        if old is not None:
            (tmp_path / name).write_bytes(old)
        with pytest.raises(OSError, match="disk full"):
            compare_pictures(tmp_path, task_names(tasks), many(tasks))
        assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if old is None else [old])
        (tmp_path / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Set("x", [[1.0, 2, 3]]), r"sets\[1\]\.accuracies: expected \[n, 4\], n ≥ 1, got \[1, 3\]"),
        (Set("x", []), r"sets\[1\]\.accuracies: expected \[n, 4\], n ≥ 1, got \[0\]"),
        (Set("x", [[1.0, 2, 3, 4], [1.0]]), r"sets\[1\]\.accuracies: expected numbers \[n, 4\], n ≥ 1, got \[\[1"),
        (Set("x", [[1.0, 2, 3, float("nan")]]), r"sets\[1\]\.accuracies: expected finite numbers \[n, 4\], n ≥ 1, got"),
        (Set("x", [[1.0] * 4], [[0.5, 0.5]]), r"sets\[1\]\.gammas: expected \[1, 4\], got \[1, 2\]"),
        (Set("x", [[1.0] * 4], [[0.25] * 4] * 2), r"sets\[1\]\.gammas: expected \[1, 4\], got \[2, 4\]"),
        (Set("x", [[1.0] * 4], [[0.5] * 4]), r"sets\[1\]\.gammas: expected weights of at least 0 that sum to 1, got"),
        (Set("x", [[1.0] * 4], [[2, -1, 0, 0]]), r"sets\[1\]\.gammas: expected weights of at least 0 that sum to 1"),
    ],
)
def test_wrong_sets(tmp_path: Path, bad: Set, message: str) -> None:
    for draw in (compare_pictures, parallel_coordinates, pairwise_projections):
        with pytest.raises(ValueError, match=message):
            draw(tmp_path / "x", task_names(4), [a_model("Fine", 4), bad])
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for draw, tasks, expected in (
        (fronts, 3, "2 names, got 3"),
        (simplex_scatter, 4, "3 names, got 4"),
        (parallel_coordinates, 2, "at least 3 names, got 2"),
        (pairwise_projections, 2, "at least 3 names, got 2"),
    ):
        with pytest.raises(ValueError, match=f"task_names: expected {expected}"):
            draw(path, task_names(tasks), [a_model("Model", tasks)])
    for draw, tasks in ((fronts, 2), (simplex_scatter, 3), (parallel_coordinates, 3), (pairwise_projections, 3)):
        with pytest.raises(ValueError, match="sets: expected at least one, got none"):
            draw(path, task_names(tasks), [])
    for draw, tasks in ((fronts, 2), (parallel_coordinates, 5)):
        with pytest.raises(ValueError, match=rf"individuals\['a'\]: expected \[{tasks}\], got \[1\]"):
            draw(path, task_names(tasks), [a_model("Model", tasks)], {"a": [1.0]})
    with pytest.raises(ValueError, match=r"^task_names: expected 3 names, got 2"):
        ternary(path, ["A", "B"], [[0.5, 0.5]], [[1, 2]])
    with pytest.raises(ValueError, match=r"^gammas: expected \[2, 3\], got \[1, 3\]"):
        ternary(path, ["A", "B", "C"], [[1, 0, 0]], [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=r"^accuracies: expected \[n, 3\], n ≥ 1, got \[1, 2\]"):
        ternary(path, ["A", "B", "C"], [[1, 0, 0]], [[1, 2]])
    assert list(tmp_path.iterdir()) == []
