"""Pictures of a comparison: written whole, with everything they were given in them."""

import itertools
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from support.pictures import WRITTEN, a_model, individuals, legend_texts, legends, many, task_names, texts

from pareto_merging.measure.figures.chosen import compare_pictures
from pareto_merging.measure.figures.sets import Set


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
