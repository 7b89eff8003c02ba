"""A comparison in a folder: what is kept, what it goes on from, and what it refuses."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparisons import SUITE, own_config, suite_config, without_times

from pareto_merging.data import digits
from pareto_merging.errors import UserError
from pareto_merging.measure.comparison import result_name
from pareto_merging.methods.registry import METHODS
from pareto_merging.run.compare import chosen_methods, compare_run
from pareto_merging.run.config import RunConfig


def test_a_task_without_evaluation_images_is_left_out(tmp_path: Path) -> None:
    config = own_config({"upright": {"evaluation": None}})
    report = compare_run(
        config, tmp_path / "out", methods="task-arithmetic-preference", effort=1, progress=False
    ).to_json()
    assert (report["tasks"], report["evaluated_tasks"]) == (["upright", "rotated"], ["rotated"])
    entry = report["methods"]["task-arithmetic-preference"]
    assert list(entry["per_task"]) == ["rotated"]
    assert entry["one_hot"]["mean"] == pytest.approx(93.3, abs=0.5), "the preference of rotated is the second"
    assert entry["cosine"]["mean"] is None
    assert "- upright: no evaluation images" in (tmp_path / "out" / "compare.md").read_text()
    assert not list((tmp_path / "out").glob("*.png"))
    nothing = own_config({name: {"evaluation": None} for name in ("upright", "rotated")})
    with pytest.raises(UserError, match="expected `evaluation` images for at least one task, got none"):
        compare_run(nothing, tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def test_one_task(tmp_path: Path) -> None:
    methods = "individual,ties,adamerging-preference,pareto"
    report = compare_run(
        suite_config(["upright"]), tmp_path / "out", methods=methods, effort=2, progress=False
    ).to_json()
    assert all(entry["seeds"] == 1 for entry in report["methods"].values())
    entry = report["methods"]["pareto"]
    assert entry["equal"] == entry["one_hot"] == entry["priority"]
    assert entry["points"]["mean"] == 1
    assert not any("preference" in line for line in report["answer"])
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_head_of_one_class(tmp_path: Path) -> None:
    """A constant objective: entropy 0 and accuracy 100 whatever the weights, and no box to dominate a share of."""
    from safetensors.torch import load_file, save_file

    save_file(
        {"weight": load_file(SUITE / "heads.safetensors")["upright"][:1].contiguous()}, tmp_path / "head.safetensors"
    )
    images, _ = digits.images("upright", "evaluation")
    labels = torch.zeros(20, dtype=torch.int64)
    save_file({"images": images[:20].contiguous(), "labels": labels}, tmp_path / "images.safetensors")
    change = {"head": tmp_path / "head.safetensors", "evaluation": str(tmp_path / "images.safetensors")}
    config = own_config({"upright": change})
    report = compare_run(
        config, tmp_path / "out", methods="regmean,adamerging,pareto", effort=1, progress=False
    ).to_json()
    assert report["reference_point"] == [100.0, 10.0]
    for entry in report["methods"].values():
        assert entry["seeds"] == 1, entry
        assert entry["per_task"]["upright"]["mean"] == 100
        assert entry["hypervolume"]["mean"] is None
        assert entry["igd_plus"]["mean"] >= 0
    stored = json.loads((tmp_path / "out" / result_name("pareto", 0)).read_text())
    assert all(point["entropy"][0] == 0 for point in stored["points"])


METHODS_TEXT = "weight-averaging,ties,adamerging,pareto"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    compare_run(suite_config(), folder, methods=METHODS_TEXT, effort=2, seeds=2, grid="equal", progress=False)
    return folder


def resumed(folder: Path, config: RunConfig | None = None, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"methods": METHODS_TEXT, "effort": 2, "seeds": 2, "grid": "equal", "progress": False}
    report = compare_run(config or suite_config(), folder, **{**arguments, "resume": True, **changes})
    return report.to_json()


def test_a_killed_comparison_keeps_what_it_had(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pareto_merging.measure import comparison as module
    from pareto_merging.run import compare as runs

    def stop(result: Any, done: int, total: int, left: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_tell", stop)
        with pytest.raises(KeyboardInterrupt):
            resumed(folder, resume=False, progress=True)
    done = sorted(path.name for path in folder.glob("*-seed-*.json"))
    assert len(done) == 3
    times = {name: (folder / name).stat().st_mtime_ns for name in done}
    ran: list[str] = []
    run = module.Comparison.run
    monkeypatch.setattr(module.Comparison, "run", lambda self, key: ran.append(key) or run(self, key))
    report = resumed(folder)
    assert ran == ["pareto", *METHODS_TEXT.split(",")], "the rest of the first seed, and the second"
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == times
    expected = json.loads((whole / "compare.json").read_text())
    assert without_times(report) == without_times(expected)
    assert without_times(json.loads((folder / "compare.json").read_text())) == without_times(expected)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    # nothing is missing any more
    ran.clear()
    assert without_times(resumed(folder)) == without_times(expected)
    assert ran == []


def test_a_resumed_report_keeps_what_is_not_asked_for_now(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    before = json.loads((tmp_path / "copy" / "compare.json").read_text())
    after = resumed(tmp_path / "copy", methods=next(iter(before["methods"])))
    assert list(after["methods"]) == list(before["methods"])
    assert without_times(after["methods"]) == without_times(before["methods"])


def test_seeds_differ(whole: Path) -> None:
    first, second = (json.loads((whole / result_name("pareto", seed)).read_text())["points"] for seed in (0, 1))
    assert [point["gamma"] for point in first] == [point["gamma"] for point in second]
    assert [point["entropy"] for point in first] != [point["entropy"] for point in second]
    report = json.loads((whole / "compare.json").read_text())
    assert len(set(report["methods"]["weight-averaging"]["equal"]["values"])) == 1
    assert report["methods"]["weight-averaging"]["equal"]["sd"] == 0
    assert report["choices"]["ties"].keys() == {"0", "1"}


def test_resume_may_add_methods_and_seeds(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    report = resumed(folder, methods="dare,ties", seeds=3)
    assert report["methods"]["dare"]["seeds"] == report["methods"]["ties"]["seeds"] == 3


@pytest.mark.parametrize(
    ("config", "arguments", "named"),
    [
        (suite_config(method={"mu": 0.2}), {}, "method.mu"),
        (suite_config(["rotated", "upright"]), {}, "order of tasks"),
        (suite_config(unseen=["mirrored"]), {}, "unseen"),
        (suite_config(), {"effort": 3}, "effort"),
        (suite_config(), {"grid": "grid:5"}, "preferences"),
        (suite_config(), {"resume": False}, "got a comparison that can go on with --resume"),
        (suite_config(), {"methods": "tees"}, "got 'tees'; near: ties"),
        (suite_config(method={"preference": "fixed", "gamma": [1.0]}), {}, r"preference: expected shape \[2\]"),
    ],
)
def test_resume_wants_the_same(whole: Path, config: RunConfig, arguments: dict[str, Any], named: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    with pytest.raises(UserError, match=named):
        resumed(whole, config, **arguments)
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize("name", ["finetuned_rotated.safetensors", "heads.safetensors", "encoder.json"])
def test_resume_notices_changed_files(name: str, tmp_path: Path) -> None:
    shutil.copytree(SUITE, tmp_path / "suite")
    config, folder = suite_config(), tmp_path / "out"
    arguments = {"methods": "weight-averaging", "effort": 1, "grid": "equal", "progress": False}
    compare_run(config, folder, suite_folder=tmp_path / "suite", **arguments)
    os.utime(tmp_path / "suite" / name, ns=(1, 1))
    with pytest.raises(UserError, match=f"{name} differs"):
        compare_run(config, folder, suite_folder=tmp_path / "suite", resume=True, **arguments)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "pareto-comparison-result"}', '{"status": "done"}'])
def test_a_spoilt_result_is_named(whole: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    (folder / "ties-seed-1.json").write_text(text)
    with pytest.raises(UserError, match=r"ties-seed-1\.json: expected a result of a comparison"):
        resumed(folder)


def test_chosen_methods() -> None:
    everything = list(METHODS)
    assert chosen_methods(None, 2) == chosen_methods("all", 8) == everything
    assert chosen_methods(None, 3) == [name for name in everything if name != "adamerging-preference"]
    assert chosen_methods(" pareto , ties,pareto,", 2) == ["pareto", "ties"]
    assert chosen_methods("all,-fisher,-ties", 2) == [n for n in everything if n not in ("fisher", "ties")]
    for text, message in (
        ("paretto", "got 'paretto'; near: pareto"),
        ("qqqq", "got 'qqqq' .all: individual"),
        ("-fisher", "expected at least one"),
        (",", "expected at least one"),
        ("all,-fischer", "near: fisher"),
    ):
        with pytest.raises(UserError, match=message):
            chosen_methods(text, 2)
