"""The demo, with a few steps: everything it promises is there and consistent."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pareto_merging.data import digits
from pareto_merging.errors import UserError
from pareto_merging.measure.metrics import hypervolume
from pareto_merging.model.files import read_header
from pareto_merging.run.demo import run_demo

METHODS = (
    "Individual",
    "Weight averaging",
    "Task arithmetic",
    "AdaMerging",
    "Pareto Merging (equal preference)",
    "Pareto Merging (one-hot preference)",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    run_demo(out, quick=True, progress=False)
    return out


@pytest.mark.slow
def test_report(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    assert report["tasks"] == list(digits.TASKS)
    for method in METHODS:
        entry = report["methods"][method]
        assert set(entry["per_task"]) == set(digits.TASKS)
        assert entry["average"] == pytest.approx(sum(entry["per_task"].values()) / 8, abs=0.01)
        assert entry["seconds"] >= 0
        assert entry["peak_bytes"] >= 0
    averages = {name: entry["average"] for name, entry in report["methods"].items()}
    assert averages["Individual"] >= averages["Task arithmetic"] + 8, "the conflict between the tasks is real"
    assert averages["Task arithmetic"] > averages["Pretrained"] + 4, "the models are linearly connected"
    assert [row["gamma"][0] for row in report["front"]] == pytest.approx([i / 10 for i in range(11)])
    volumes = report["hypervolume"]
    points = [row["accuracy"] for row in report["front"]]
    assert volumes["pareto_merging"] == pytest.approx(hypervolume(points, volumes["reference_point"]))
    gammas = [tuple(row["gamma"]) for row in report["preferences"]]
    assert len(set(gammas)) == len(gammas) == 17, "equal, and each task's priority and one-hot"
    own = report["methods"]["Pareto Merging (one-hot preference)"]["per_task"]
    for k, task in enumerate(digits.TASKS):
        row = report["preferences"][gammas.index(tuple(float(k == j) for j in range(8)))]
        assert row["accuracy"][task] == pytest.approx(own[task], abs=0.01)
    assert report["environment"]["torch"]
    assert report["settings"]["steps"] == 5


@pytest.mark.slow
def test_files(demo: Path) -> None:
    with Image.open(demo / "front.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 600
    header = read_header(demo / "pareto_set.safetensors", "pareto-set")
    assert header["tasks"] == 8
    page = (demo / "index.html").read_text()
    report = json.loads((demo / "report.json").read_text())
    assert all(method in page for method in METHODS)
    assert f"{report['methods']['AdaMerging']['average']:.1f}" in page
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="http', page), "the page needs the network"


@pytest.mark.slow
def test_it_replaces_only_an_earlier_demo(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path, *_: Any) -> dict[str, Any]:
        shutil.copytree(demo, folder, dirs_exist_ok=True)
        return {**json.loads((folder / "report.json").read_text()), "settings": {"steps": 7}}

    # what it computes is above
    monkeypatch.setattr("pareto_merging.run.demo._run", run)
    earlier = shutil.copytree(demo, tmp_path / "runs" / "run")
    with pytest.raises(UserError, match="existing folder"):
        run_demo(earlier, quick=True, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="expected an earlier demo to replace"):
        run_demo(tmp_path / "mine", overwrite=True, quick=True, progress=False)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    run_demo(earlier, overwrite=True, quick=True, progress=False)
    assert json.loads((earlier / "report.json").read_text())["settings"] == {"steps": 7}
    assert sorted(path.name for path in earlier.iterdir()) == sorted(path.name for path in demo.iterdir())
    assert [path.name for path in earlier.parent.iterdir()] == ["run"]
