"""The lines of the configuration file, and whether the library reads them as meant."""

import json
from typing import Any

import pytest
import torch

from benchmarks.common import towers
from benchmarks.tune import compiling, files, strategies
from benchmarks.tune import groups as tune_groups
from pmkernels.configs import Config

LIKE = torch.empty(0, dtype=torch.bfloat16)
TARGET = compiling.Target(90, 132, "sm_90")
PRESENT, OTHER, THIRD = Config(block_m=32), Config(block_m=64), Config(block_m=16)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")


def made_up(op: str, max_rows: int | None, chosen: Config | None, present: Config = PRESENT) -> tune_groups.Group:
    return tune_groups.Group(op, "16-bit", max_rows, None, [present, OTHER], [], [], [], chosen=chosen)


def test_a_bucket_below_a_tuned_one_keeps_what_it_had() -> None:
    found = [made_up("linear", None, None), made_up("linear", 128, OTHER), made_up("linear", 32, None)]
    assert [(line["max_rows"], line["config"]["block_m"]) for line in files.lines(found)] == [(32, 32), (128, 64)]
    # neighbours that agree are one line
    found[2].chosen = OTHER
    assert [line.get("max_rows") for line in files.lines(found)] == [128]
    found[0].chosen = THIRD
    assert [(line.get("max_rows"), line["config"]["block_m"]) for line in files.lines(found)] == [(128, 64), (None, 16)]
    assert all(line["aligned"] for line in files.lines(found))
    # only what changed is written, unless nothing did
    found = [made_up("linear", None, None), made_up("shrink", None, OTHER)]
    assert [line["op"] for line in files.lines(found)] == ["shrink"]
    assert "aligned" not in files.lines(found)[0]
    assert [line["op"] for line in files.lines([*found[:1], made_up("merge", None, None)])] == ["linear", "merge"]


def test_a_file_that_says_something_else_is_seen() -> None:
    with compiling.active("sm_90"):
        of_few = tune_groups.group(TARGET, ("linear", "16-bit", 32, None), towers.TINY_LAYERS, None, True)
        of_more = tune_groups.group(TARGET, ("linear", "16-bit", 128, None), towers.TINY_LAYERS, None, True)
    of_more.chosen = of_more.candidates[1]
    groups = [of_few, of_more]

    def faults(lines: list[dict[str, Any]], labels: dict[strategies.Point, dict[int, str]]) -> list[str]:
        text = json.dumps({"architectures": ["sm_90"], "entries": lines, "strategies": []})
        return files.validate("made-up", text, groups, "sm_90", labels, LIKE)

    assert faults(files.lines(groups), {}) == []
    assert any("at 8 rows" in fault for fault in faults(files.lines(groups)[1:], {}))
    assert any("at 128 rows" in fault for fault in faults(files.lines(groups)[:1], {}))
    point = strategies.Point("forward", 3072, 1024, 8, 16)
    assert faults(files.lines(groups), {point: {1: "fused", 8224: "streamed"}}) == []
    assert len(faults(files.lines(groups), {point: {1: "streamed", 8224: "streamed"}})) == 1
