"""The library's own step, in each strategy."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from benchmarks.common.errors import Gradient
from benchmarks.common.timing import synchronize
from benchmarks.training.models import Case
from benchmarks.training.names import ALL, AUTO, WITHOUT_GRAPHS
from pareto_merging import MethodSettings, Task, set_strategy
from pareto_merging.learn.gradient import CudaGraphs, Execution, TasksAtOnce
from pareto_merging.learn.learner import Learner
from pareto_merging.learn.objectives import OBJECTIVES

# strategy, CUDA graphs, tasks at once
How: TypeAlias = tuple[str, CudaGraphs, TasksAtOnce]
OURS: dict[str, How] = {
    AUTO: ("auto", "auto", "one"),
    ALL: ("auto", "auto", "all"),
    WITHOUT_GRAPHS: ("cached", "off", "one"),
    "streamed": ("streamed", "auto", "one"),
    "fused": ("fused", "auto", "one"),
    "eager": ("eager", "auto", "one"),
}


class Runner(Protocol):
    """One variant: a step, and what is judged of it. That is the gradient at the same place; of a limit its losses."""

    warm_up: int
    notes: list[str]

    def step(self) -> None: ...

    def gradient(self) -> Gradient: ...

    def resident(self) -> int: ...

    def close(self) -> None: ...


class Ours:
    """The library's own step."""

    def __init__(
        self,
        case: Case,
        strategy: str,
        graphs: CudaGraphs,
        at_once: TasksAtOnce = "one",
        settings: MethodSettings | None = None,
    ) -> None:
        assert case.pareto is not None
        self.case, self.number, self.batch = case, 0, case.images
        # on a GPU the second captures a CUDA graph
        self.warm_up = 3 if case.device.type == "cuda" else 0
        self.settings = case.settings if settings is None else settings
        tasks: dict[str, Task] | None = {
            f"task_{k + 1}": Task(images=images.cpu(), head=head)  # type: ignore[arg-type]
            for k, (images, head) in enumerate(zip(case.images, case.heads, strict=True))
        }
        if OBJECTIVES[self.settings.objective].needs == "weights":
            tasks, self.batch = None, []
        self.notes: list[str] = []
        set_strategy(case.pareto, strategy)
        self.learner = Learner(
            case.pareto,
            tasks,
            self.settings,
            Execution(cuda_graphs=graphs, tasks_at_once=at_once),
            on_warning=self.notes.append,
        )

    def step(self) -> None:
        self.number += 1
        self.learner.step(self.number, self.batch)

    def gradient(self) -> Gradient:
        """Return the gradients of the learner after its steps. On a GPU a replay of its CUDA graph makes them."""
        flat = self.learner.gradient(self.batch, self.case.gamma).gradient.clone()
        parts = flat.split([parameter.numel() for parameter in self.learner.learned.values()])
        return {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(self.learner.learned.items(), parts, strict=True)
        }

    def resident(self) -> int:
        assert self.case.pareto is not None
        return bytes_of(self.case.pareto.state_dict(keep_vars=True).values())

    def close(self) -> None:
        # lets go of merged weights that were kept
        assert self.case.pareto is not None
        set_strategy(self.case.pareto, "eager")


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def profile(step: Callable[[], None], device: torch.device, top: int = 15) -> list[dict[str, Any]]:
    """Return the ``top`` kernels of one step by GPU time. Off the GPU they are operators, by the CPU's."""
    from torch.profiler import ProfilerActivity

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronize(device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    kernels = [(event.key, getattr(event, own), event.count) for event in profiler.key_averages()]
    kernels = [kernel for kernel in kernels if kernel[1] > 0]
    total = sum(microseconds for _, microseconds, _ in kernels)
    kernels.sort(key=lambda kernel: -kernel[1])
    return [
        {"kernel": name, "calls": calls, "ms": microseconds / 1e3, "share": microseconds / total}
        for name, microseconds, calls in kernels[:top]
    ]


class Profiled(Ours):
    """Ours, with a profile of a step taken when it closes."""

    kernels: list[dict[str, Any]]

    def close(self) -> None:
        try:
            self.kernels = profile(self.step, self.case.device)
        except Exception as error:
            # what was measured counts without it
            print(f"no profile: {type(error).__name__}: {error}", flush=True)
            self.kernels = []
        super().close()
