"""The log of a run."""

import json
from collections.abc import Callable
from pathlib import Path

from learn_cases import short_run, task_set
from torch import nn

from pareto_merging.learn.log import LOG_NAME
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.model.parametrize import parametrize

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def test_a_damaged_log_does_not_stop_a_resume(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(model, task_set(2), short_run(), folder=tmp_path, progress=False)
    log = tmp_path / LOG_NAME
    log.write_bytes(log.read_bytes() + b'[1]\n{"step": "x"}\n{"step": 3, "a": "\xc3')
    learn_pareto_set(model, task_set(2), short_run(), folder=str(tmp_path), resume=True, progress=False)  # type: ignore[arg-type]
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3, 4]
