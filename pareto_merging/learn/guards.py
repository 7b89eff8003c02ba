"""Guards of a run: collapse, numbers that are not finite, λ's range, requests to stop."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from pareto_merging.data.tasks import NoHead, Task
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state

# averages go over about this many steps before anything is said about them
SMOOTHING = 0.95
# how far the agreement with the teachers may fall
FALLEN = 0.15


class CollapseWatch:
    """Watches the entropy of each task's mean prediction. It falls when every image ends up in one class.

    On n ``images`` together, by default a batch, and C classes it can reach log min(n, C); staying under a share of
    that is reported once.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        settings: MethodSettings,
        warn: Callable[[str], None],
        images: int | None = None,
    ) -> None:
        images = settings.sampling.batch_size if images is None else images
        self.warn, self.threshold = warn, settings.log.collapse_threshold
        self.collapsed: list[str] = []
        self._means: list[float] = []
        self._steps = 0
        self._ceilings: dict[str, float] = {}
        for name, task in tasks.items():
            weight = getattr(task.head, "weight", None)
            classes = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else math.inf
            self._ceilings[name] = math.log(max(2, min(images, classes)))

    def look(self, step: int, values: Sequence[float]) -> list[str]:
        """Update the running means; warn of and return the tasks that have newly collapsed."""
        self._means = self._means or list(values)
        self._steps += 1
        self._means = [SMOOTHING * old + (1 - SMOOTHING) * new for old, new in zip(self._means, values, strict=True)]
        new: list[str] = []
        if self._steps < 1 / (1 - SMOOTHING):
            return new
        for (name, ceiling), mean in zip(self._ceilings.items(), self._means, strict=True):
            if name not in self.collapsed and mean < self.threshold * ceiling:
                self.collapsed.append(name)
                new.append(name)
                self.warn(
                    f"step {step}: task {name} may be collapsing: the entropy of its mean prediction is {mean:.2f} of "
                    f"at most {ceiling:.2f} (most images fall into few classes); consider information_maximisation, a "
                    "larger tensor_norm or fewer steps"
                )
        return new


class AgreementWatch:
    """Watches the agreement with the teachers. It falls where steps undo what learning started from.

    The mean over the tasks, smoothed, that is far below the first step's is reported once: :data:`FALLEN` of all images
    and three standard errors of a first step on so many ``images``.
    """

    def __init__(self, warn: Callable[[str], None], images: int) -> None:
        self.warn, self.is_reported = warn, False
        self.allowed = FALLEN + 3 * math.sqrt(0.25 / max(1, images))
        self._first: tuple[int, float] | None = None
        self._mean = 0.0

    def look(self, step: int, values: Sequence[float]) -> None:
        """Update the running mean. Warn if it is far below the first look's, before anything was learned."""
        now = math.fsum(values) / len(values)
        if self._first is None:
            self._first, self._mean = (step, now), now
        first, before = self._first
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * now
        if self.is_reported or not self._mean < before - self.allowed:
            return
        self.is_reported = True
        self.warn(
            f"step {step}: the agreement with the fine-tuned models has fallen from {100 * before:.0f} % in step "
            f"{first} to {100 * self._mean:.0f} %; consider smaller rates, a longer warm_up, or the start alone "
            "(steps: 0)"
        )


def first_nonfinite(model: nn.Module, head: nn.Module, images: Tensor) -> str:
    """Name where a NaN or inf first appears between images [n, …] and logits. A parameter or a module."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"parameter {name}"
    if not bool(torch.isfinite(images).all()):
        return "the images"
    layers: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            if not layers and any(
                isinstance(o, Tensor) and o.is_floating_point() and not bool(torch.isfinite(o).all()) for o in outputs
            ):
                layers.append(f"layer {name or 'the whole model'}")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            features = model(images)
            logits = features if isinstance(head, NoHead) else head(features)
    finally:
        for handle in handles:
            handle.remove()
    if layers:
        return layers[0]
    return "the head" if not bool(torch.isfinite(logits).all()) else "the objective"


@contextlib.contextmanager
def clamped(model: nn.Module, bounds: tuple[float, float] | None) -> Iterator[None]:
    """Use λ clamped inside the block. It is learned and saved as it is; afterwards the model holds what was used."""
    if bounds is None:
        yield
        return
    try:
        with pareto_state(model).now.changed(lambda_range=bounds):
            yield
    finally:
        with torch.no_grad():
            for name, parameter in learned_parameters(model).items():
                if name.startswith("lam."):
                    parameter.clamp_(*bounds)


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C or SIGTERM has come. A second Ctrl-C interrupts at once as usual."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # only the main thread may set handlers; elsewhere whoever owns the process decides
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
