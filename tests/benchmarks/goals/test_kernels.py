"""The library's own products are judged too."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.common import layer_case
from benchmarks.common.record import Record
from benchmarks.common.session import Once, Session
from benchmarks.goals import kernels
from benchmarks.goals.context import Context
from benchmarks.suites import layers


def test_the_librarys_own_products_are_compared_as_well(tmp_path: Path) -> None:
    """What ours is set against has a time only if it was right."""
    context = Context(Session(Record.new(tmp_path / "goals.json", {})), torch.device("cpu"), True)
    context.session.record.data["rows"] = [
        {"unit": "ceilings/rates", "variant": name, "value": 1e12} for name in ("copy", "bfloat16")
    ]
    with torch.no_grad():
        case = layer_case.Case.make(layers.TINY_LAYERS[0], 2, 12, torch.float16, torch.device("cpu"))
        (right,) = kernels._library(context, Once(lambda: case))
        assert right.matched and 0 < right.error < 2e-3 and right.ms is not None
        product = Tensor.__matmul__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "__matmul__", lambda a, b: product(a, b) * (1.01 if a.dtype == torch.float16 else 1))
            (wrong,) = kernels._library(context, Once(lambda: case))
    assert not wrong.matched and wrong.ms is None and wrong.reason == "wrong product"
