"""Pictures look the same twice, keep names as they are, and are written whole or not at all."""

from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.pictures import WIDTHS, a_model, a_set, legend_texts, legends, many, task_names, texts

from pareto_merging.measure.figures.chosen import compare_pictures
from pareto_merging.measure.figures.sets import Set


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
