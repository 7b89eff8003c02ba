"""The groups and their candidates."""

import json

import pytest
import torch

from benchmarks.tune import compiling
from benchmarks.tune import groups as tune_groups
from pmkernels import dispatch

TARGET = compiling.Target(90, 132, "sm_90")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")


def test_candidates_are_few_distinct_and_begin_with_what_there_is() -> None:
    previous = {"op": "linear", "dtype": "16-bit", "config": {"block_m": 8, "num_warps": 2}}
    with compiling.active("sm_90"):
        batches = tune_groups.groups(TARGET, tune_groups.OPS, json.dumps({"entries": [previous]}), False)
        found = [group for batch in batches for group in batch]
        for group in found:
            assert 2 <= len(group.candidates) == len(set(group.candidates)) <= tune_groups.MOST
            rows = group.max_rows or 2**14
            assert group.present == dispatch.lookup("sm_90", group.op, group.kind, rows, 16, True)
            assert dispatch.lookup("default", group.op, group.kind, rows, 16, True) in group.candidates
            if group.op in ("weight_grad", "merge_grad"):
                # the partial sums of P and Q stay below a weight
                assert all(min(c.block_n, c.block_d) >= 64 for c in group.candidates)
            if (group.op, group.kind) == ("linear", "16-bit"):
                assert group.candidates[1].block_m == 8 or group.candidates[2].block_m == 8
            assert all(case.op == group.op and case.kind == group.kind for case in (*group.cases, *group.checks))
            if group.max_rows is not None:
                assert all(case.rows <= group.max_rows for case in (*group.cases, *group.checks))
    assert {group.op for group in found} == set(tune_groups.TUNED)
    assert [group.kind for group in found] == sorted(
        (group.kind for group in found), key=["16-bit", "tf32", "float32"].index
    )
