"""Small comparisons of the embedded suite's models, and images that go wrong in the middle."""

import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from pareto_merging.data import digits
from pareto_merging.measure.comparison import Comparison
from pareto_merging.run.config import RunConfig, digits_files
from pareto_merging.run.workspace import Workspace

SUITE = Path(digits.__file__).parent / "digits_suite"


TIMES = {"seconds", "tuning_seconds", "peak_bytes"}


def suite_config(tasks: Sequence[str] = ("upright", "rotated"), **changes: Any) -> RunConfig:
    method = {"steps": 2, "batch_size": 4, "rank": 2, **changes.pop("method", {})}
    return RunConfig.model_validate({"suite": "digits", "tasks": list(tasks), "method": method, **changes})


def own_config(changes: dict[str, dict[str, Any]], **more: Any) -> RunConfig:
    """The suite's two first tasks as files, with some of them changed."""
    encoder, tasks = digits_files(SUITE, ["upright", "rotated"])
    values = {name: {**task.model_dump(), **changes.get(name, {})} for name, task in tasks.items()}
    method = {"steps": 2, "batch_size": 4, "rank": 2, **more.pop("method", {})}
    return RunConfig.model_validate({"encoder": encoder.model_dump(), "tasks": values, "method": method, **more})


def comparison(config: RunConfig | None = None, effort: int = 1, **more: Any) -> Comparison:
    return Comparison(Workspace(config or suite_config()), effort, "equal", progress=False, **more)


def without_times(value: Any) -> Any:
    """Plain JSON without what two runs of the same work may differ in."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


class Changing(Dataset[Any]):
    """Images that call ``then`` from the fetch after ``whole`` ones on, and give what it returns."""

    def __init__(self, images: Dataset[Any], whole: float, then: Any) -> None:
        self.images, self.left, self.then = images, whole, then

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        image, label = self.images[index]
        return (image if self.left >= 0 else self.then(image)), label


def interrupt(image: Tensor) -> Tensor:
    # once: a second one interrupts at once
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.raise_signal(signal.SIGINT)
    return image


def nan(image: Tensor) -> Tensor:
    return image * math.nan
