"""Results as they stand in files: the same back, with keys of another version, and not without keys of ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pareto_merging.errors import UserError
from pareto_merging.measure.results import FORMAT, Measured, read_result

ABOUT: dict[str, Any] = {"method": "ties", "title": "TIES", "seed": 3, "is_bound": False, "tasks": ["a"]}
ABOUT |= {"reference_point": [10]}
TRIED = [{"choice": {"density": 0.2}, "seconds": 1.5, "peak_bytes": 7, "score": None}]
TRIED += [{"choice": {"density": 0.5}, "warnings": ["slow"], "error": "NaN"}]
FILES: dict[str, dict[str, Any]] = {
    "skipped": {**ABOUT, "status": "skipped", "reason": "no images"},
    "failed": {**ABOUT, "candidates": TRIED, "tuning_seconds": 2.5, "status": "failed", "reason": "NaN"},
    "done": {
        **ABOUT,
        "candidates": TRIED,
        "tuning_seconds": 2.5,
        "status": "done",
        "preference_aware": True,
        "choice": {"density": 0.2},
        "seconds": 1.5,
        "peak_bytes": 7,
        "facts": {"thresholds": [0.1]},
        "points": [{"kinds": ["equal"], "gamma": [1], "accuracy": [50], "entropy": [0.5]}],
        "unseen": {"b": {"accuracy": 40.0, "entropy": 0.25, "gamma": None}},
    },
}


def written(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"format": FORMAT, **value}))
    return path


@pytest.mark.parametrize("status", FILES)
def test_a_result_comes_back_as_it_was_written(status: str, tmp_path: Path) -> None:
    path = written(tmp_path / "result.json", FILES[status])
    result = read_result(path)
    assert result is not None and isinstance(result, Measured) == (status == "done")
    assert json.dumps(result.to_json()) == path.read_text()
    assert read_result(tmp_path / "none.json") is None


def test_keys_of_another_version_are_read_and_kept(tmp_path: Path) -> None:
    new = {"new": {"deep": [1]}}
    value = {**FILES["done"], **new, "unseen": {"b": {**FILES["done"]["unseen"]["b"], **new}}}
    for name in ("candidates", "points"):
        value[name] = [{**entry, **new} for entry in value[name]]
    result = read_result(written(tmp_path / "result.json", value))
    assert isinstance(result, Measured) and result.point("equal") == result.points[0]
    assert result.to_json() == {"format": FORMAT, **value}


@pytest.mark.parametrize(
    ("place", "optional"),
    [
        (lambda value: value, {"title", "facts", "candidates", "tuning_seconds", "unseen"}),
        (lambda value: value["candidates"][0], {"warnings", "seconds", "peak_bytes", "score", "error"}),
        (lambda value: value["points"][0], {"entropy"}),
        (lambda value: value["unseen"]["b"], set()),
    ],
    ids=["result", "candidate", "point", "unseen"],
)
def test_a_missing_key_is_one_sentence(
    place: Callable[[dict[str, Any]], dict[str, Any]], optional: set[str], tmp_path: Path
) -> None:
    for missing in list(place(FILES["done"])):
        value = json.loads(json.dumps(FILES["done"]))
        del place(value)[missing]
        path = written(tmp_path / "result.json", value)
        if missing in optional:
            assert read_result(path) is not None, missing
        else:
            with pytest.raises(UserError, match=r"result\.json: expected a result of a comparison, got another file$"):
                read_result(path)


@pytest.mark.parametrize(
    ("key", "value"), [("is_bound", "yes"), ("seed", "3"), ("reference_point", ["10"]), ("tasks", 1)]
)
def test_a_value_of_another_type_is_one_sentence(key: str, value: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "result.json", {**FILES["done"], key: value})
    with pytest.raises(UserError, match="expected a result of a comparison, got another file"):
        read_result(path)
