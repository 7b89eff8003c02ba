"""The variants of a step: ours in each strategy, plain PyTorch's, and the limit.

A runner makes a step, and says what is judged of it: the gradient at the same place, of a limit its losses. What they
are judged by is computed in a wider type, and beside it the errors of plain PyTorch.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, Union

import torch
from torch import Tensor, nn

from benchmarks.common.errors import Gradient, group_errors
from benchmarks.common.modes import no_tf32
from benchmarks.common.timing import synchronize
from benchmarks.training.models import CLASSES, LEARNING_RATE, Case, Head, Part
from benchmarks.training.names import ALL, AUTO, GUIDED, GUIDED_ALL, WITHOUT_GRAPHS
from pareto_merging import MethodSettings, Task, set_strategy
from pareto_merging.learn.gradient import CudaGraphs, Execution, TasksAtOnce
from pareto_merging.learn.learner import Learner
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.scalarize import scalarize
from pmkernels import reference
from pmkernels.graphs import capture, warm_up

Runner: TypeAlias = Union["Ours", "Plain", "Limit"]
Profile: TypeAlias = list[dict[str, Any]]
Combine: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# strategy, CUDA graphs, tasks at once
OURS: dict[str, tuple[str, CudaGraphs, TasksAtOnce]] = {
    AUTO: ("auto", "auto", "one"),
    ALL: ("auto", "auto", "all"),
    WITHOUT_GRAPHS: ("cached", "off", "one"),
    "streamed": ("streamed", "auto", "one"),
    "fused": ("fused", "auto", "one"),
    "eager": ("eager", "auto", "one"),
}


class Ours:
    """The library's own step. ``profiles``: where a profile of a step goes when it closes, by the model's name."""

    def __init__(
        self,
        case: Case,
        strategy: str,
        graphs: CudaGraphs,
        at_once: TasksAtOnce = "one",
        settings: MethodSettings | None = None,
        profiles: dict[str, Profile] | None = None,
        teachers: list[Tensor] | None = None,
    ) -> None:
        assert case.pareto is not None
        self.case, self.pareto, self.number, self.batch, self.profiles = case, case.pareto, 0, case.images, profiles
        # on a GPU the second captures a CUDA graph
        self.warm_up = 3 if case.device.type == "cuda" else 0
        self.settings = case.settings if settings is None else settings
        tasks: dict[str, Task] | None = {
            f"task_{k + 1}": Task(images.cpu(), head, None if teachers is None else teachers[k])  # type: ignore[arg-type]
            for k, (images, head) in enumerate(zip(case.images, case.heads, strict=True))
        }
        if OBJECTIVES[self.settings.objective].needs == "weights":
            tasks, self.batch = None, []
        self.notes: list[str] = []
        set_strategy(case.pareto, strategy)
        execution = Execution(cuda_graphs=graphs, tasks_at_once=at_once)
        self.learner = Learner(case.pareto, tasks, self.settings, execution, on_warning=self.notes.append)

    def step(self) -> None:
        self.number += 1
        self.learner.step(self.number, self.batch)

    def gradient(self) -> Gradient:
        """Return the gradients of the learner after its steps. On a GPU a replay of its CUDA graph makes them."""
        return self._gradient(self.case.gamma, ())

    def _gradient(self, gamma: Tensor, targets: Sequence[Tensor]) -> Gradient:
        learned = self.learner.learned
        flat = self.learner.gradient(self.batch, gamma, targets).gradient.clone()
        parts = flat.split([parameter.numel() for parameter in learned.values()])
        return {name: part.view_as(learned[name]) for name, part in zip(learned, parts, strict=True)}

    def resident(self) -> int:
        return bytes_of(self.pareto.state_dict(keep_vars=True).values())

    def close(self) -> None:
        if self.profiles is not None:
            try:
                self.profiles[self.case.tower.name] = profile(self.step, self.case.device)
            except Exception as error:
                # what was measured counts without it
                print(f"no profile: {type(error).__name__}: {error}", flush=True)
                self.profiles[self.case.tower.name] = []
        # lets go of merged weights that were kept
        set_strategy(self.pareto, "eager")


class Guided(Ours):
    """The step of the preset ``expert``: KL to kept logits, a preference for each image.

    What is judged is its gradient with the case's one preference for every image, as :func:`guided_gradient` has it.
    """

    def __init__(self, case: Case, at_once: TasksAtOnce) -> None:
        settings = case.settings.model_copy(update=GUIDED_SETTINGS)
        super().__init__(case, "auto", "auto", at_once, settings, teachers=guided_teachers(case))

    def gradient(self) -> Gradient:
        gammas = self.case.gamma.expand(self.case.tasks, len(self.batch[0]), self.case.tasks)
        return self._gradient(gammas, guided_teachers(self.case))


# tasks at once
GUIDED_WAYS: dict[str, TasksAtOnce] = {GUIDED: "one", GUIDED_ALL: "all"}
GUIDED_SETTINGS: dict[str, Any] = {
    "objective": "distillation",
    "preference": "per-item",
    "gamma": None,
    "scalarization": "linear",
    "tensor_norm": 0.0,
    "concentration": 0.3,
}


def guided_teachers(case: Case) -> list[Tensor]:
    """Return made-up logits of a teacher for every image, [batch, classes] of each task."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(x), CLASSES, generator=generator).to(case.device) * 4 for x in case.images]


def guided_loss(case: Case, merge: Callable[[Part, Tensor], Tensor], dtype: torch.dtype) -> Gradient:
    """Return the gradient of all tasks' mean KL at the case's preference, in plain PyTorch."""
    others = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.others.items()}
    totals = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in case.learned.values()]
    for images, head, teacher in zip(case.images, case.heads, guided_teachers(case), strict=True):
        merged = {name: merge(part, case.gamma) for name, part in case.parts.items()}
        logits = head(torch.func.functional_call(case.skeleton, {**merged, **others}, (images.to(dtype),)))
        own, wanted = (torch.log_softmax(t / 4, dim=-1) for t in (logits, teacher.to(logits)))
        loss = 16 * (wanted.exp() * (wanted - own)).sum(dim=-1).mean() / case.tasks
        for total, part in zip(totals, torch.autograd.grad(loss, list(case.learned.values())), strict=True):
            total += part
    return dict(zip(case.learned, totals, strict=True))


def guided_gradient(case: Case) -> tuple[Gradient, dict[str, float]]:
    """Return that gradient in a wider type, and plain PyTorch's errors in the model's."""
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    for parameter in case.learned.values():
        parameter.requires_grad_(True)
    with no_tf32():
        truth = guided_loss(case, lambda part, gamma: merged_exactly(part, gamma, wide), wide)
    plain = guided_loss(case, lambda part, gamma: merged_plainly(part, gamma, combine_sum), case.dtype)
    return truth, group_errors(plain, truth)


def bytes_of(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def profile(step: Callable[[], None], device: torch.device, top: int = 15) -> Profile:
    """Return the ``top`` kernels of one step by GPU time. Off the GPU they are operators, by the CPU's."""
    from torch.profiler import ProfilerActivity

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronize(device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    kernels = [(event.key, getattr(event, own), event.count) for event in profiler.key_averages()]
    kernels = sorted((kernel for kernel in kernels if kernel[1] > 0), key=lambda kernel: -kernel[1])
    total = sum(microseconds for _, microseconds, _ in kernels)
    return [
        {"kernel": name, "calls": calls, "ms": microseconds / 1e3, "share": microseconds / total}
        for name, microseconds, calls in kernels[:top]
    ]


def combine_product(weight: Tensor, lam: Tensor, task_vectors: Tensor) -> Tensor:
    """Merge by one matrix-vector product: W0 + Σ_k λ_k τ_k."""
    flat = task_vectors.reshape(len(task_vectors), -1)
    return torch.addmv(weight.reshape(-1), flat.t(), lam.to(weight.dtype)).view_as(weight)


def combine_sum(weight: Tensor, lam: Tensor, task_vectors: Tensor) -> Tensor:
    """Merge one task after the other, as the published code does: W0 + Σ_k λ_k τ_k."""
    for coefficient, task_vector in zip(lam.to(weight.dtype), task_vectors, strict=True):
        weight = weight + coefficient * task_vector
    return weight


COMBINE: dict[str, Combine] = {"matrix-vector product": combine_product, "sum over the tasks": combine_sum}


def fastest_combine(case: Case) -> str:
    """Name the baselines' way to merge that is faster here. Off the GPU that is the published one."""
    if case.device.type != "cuda":
        return "sum over the tasks"
    part = max(case.parts.values(), key=lambda part: part["weight"].numel() if "lam" in part else 0)
    taken = {}
    for name, combine in COMBINE.items():
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(combine(part["weight"], part["lam"], part["task_vectors"]), part["lam"], part["weight"])
            torch.cuda.synchronize()
            taken[name] = time.perf_counter() - start
    return min(taken, key=lambda name: taken[name])


def merged_plainly(part: Part, gamma: Tensor, combine: Combine) -> Tensor:
    """Return W(γ) in the type of the weight, for autograd."""
    merged = part["weight"]
    if "lam" in part:
        merged = combine(merged, part["lam"], part["task_vectors"])
    if "A" in part:
        left = (part["A"] @ (part["G"] @ gamma)).to(merged.dtype)
        merged = torch.addmm(merged, left, part["B"].to(merged.dtype).t())
    return merged


def merged_exactly(part: Part, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W(γ) by its definition, in the type of the weight or a wider one."""
    return reference.merge_weight(**{**part, "weight": part["weight"].to(dtype)}, gamma=gamma)


def low_rank_norm(parts: Mapping[str, Part], gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ‖A·C·Bᵀ‖_F of all layers together, those of one shape at once."""
    groups: dict[Any, list[Part]] = {}
    for part in parts.values():
        if "A" in part:
            groups.setdefault((part["A"].shape, part["B"].shape), []).append(part)
    squares = []
    for group in groups.values():
        A, G, B = (torch.stack([part[name] for part in group]).to(dtype) for name in ("A", "G", "B"))
        C = G @ gamma.to(dtype)
        squares.append(((A.mT @ A @ C) * (C @ (B.mT @ B))).sum())
    return torch.stack(squares).sum().sqrt()


class Plain:
    """A step in plain PyTorch. Every merged parameter is a tensor of the graph, the model is called with them.

    ``together``: the graphs of all tasks are alive at once, and one backward of the loss goes through them and the
    merge (layer-wise AdaMerging's computation; its published code learns λ alone, here the low-rank term is learned as
    well, so that the gradients can be compared). Otherwise one task at a time adds its full dW to the merged tensors'
    gradients, and one backward goes through the merge.
    """

    warm_up = 1

    def __init__(self, case: Case, merge: Callable[[Part, Tensor], Tensor], dtype: torch.dtype, together: bool) -> None:
        self.case, self.merge, self.together, self.dtype = case, merge, together, dtype
        self.images = [images.to(dtype) for images in case.images]
        self.others = {n: t.to(dtype) if t.is_floating_point() else t for n, t in case.others.items()}
        self.notes: list[str] = []
        self.parameters = list(case.learned.values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE, fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        case, settings = self.case, self.case.settings
        merged = {name: self.merge(part, case.gamma) for name, part in case.parts.items()}
        if self.together:
            entropies = torch.stack([self._entropy(merged, k) for k in range(case.tasks)])
            loss = scalarize(entropies, case.gamma.to(entropies), settings.scalarization, settings.mu)
            (loss + settings.tensor_norm * low_rank_norm(case.parts, case.gamma, entropies.dtype)).backward()
        else:
            self._one_at_a_time(merged)
        self.optimizer.step()

    def _entropy(self, tensors: Mapping[str, Tensor], task: int) -> Tensor:
        features = torch.func.functional_call(self.case.skeleton, {**tensors, **self.others}, (self.images[task],))
        return reference.softmax_entropy(self.case.heads[task](features)).mean()

    def _one_at_a_time(self, merged: Mapping[str, Tensor]) -> None:
        case, settings = self.case, self.case.settings
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in merged.items()}
        # dL/dS_k = γ_k exp(γ_k S_k / μ) / Z, and Z is a factor of the small gradient at the end
        assert settings.scalarization == "smooth-tchebycheff" and not settings.cosine
        exponents = []
        shift = case.gamma.max() * math.log(CLASSES)
        for k in range(case.tasks):
            entropy = self._entropy(leaves, k)
            exponents.append(((case.gamma[k] * entropy.detach() - shift) / settings.mu).exp())
            (case.gamma[k] * exponents[-1] * entropy).backward()
        total = torch.stack(exponents).sum()
        torch.autograd.backward(list(merged.values()), [leaf.grad for leaf in leaves.values()])
        torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], total.float())
        (settings.tensor_norm * low_rank_norm(case.parts, case.gamma, total.dtype)).backward()

    def gradient(self) -> Gradient:
        return {name: p.grad.detach().clone() for name, p in self.case.learned.items() if p.grad is not None}

    def resident(self) -> int:
        return bytes_of([*(t for part in self.case.parts.values() for t in part.values()), *self.others.values()])

    def close(self) -> None:
        self.optimizer.zero_grad()


def plain_loss(model: nn.Module, head: Head, images: Tensor) -> Tensor:
    """Return a task's mean entropy with a plain model."""
    return reference.softmax_entropy(head(model(images))).mean()


class Limit:
    """Forward and backward of a plain model with the gradients of its linear weights alone.

    Nothing that it learns could be compared with the others: what is judged are its losses, also out of a graph.
    """

    warm_up = 3

    def __init__(self, case: Case, graph: bool) -> None:
        self.plain, self.case = case.plain.to(case.device), case
        self.notes: list[str] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.losses: list[Tensor] = []
        self.plain.requires_grad_(False)
        self.weights = [module.weight for module in self.plain.modules() if isinstance(module, nn.Linear)]
        attentions = [module for module in self.plain.modules() if isinstance(module, nn.MultiheadAttention)]
        self.weights += [module.in_proj_weight for module in attentions]
        for weight in self.weights:
            weight.requires_grad_(True)
        if graph:
            warm_up(self._run, case.device)
            self.graph, _ = capture(self._run, case.device)

    def _run(self) -> None:
        self.losses = []
        for images, head in zip(self.case.images, self.case.heads, strict=True):
            loss = plain_loss(self.plain, head, images)
            self.losses.append(loss.detach())
            torch.autograd.grad(loss, self.weights)

    def step(self) -> None:
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def gradient(self) -> Gradient:
        # a graph that leaves one out would be fast
        for loss in self.losses:
            loss.fill_(torch.nan)
        self.step()
        return {f"loss.{task}": loss.clone() for task, loss in enumerate(self.losses)}

    def resident(self) -> int:
        return bytes_of(self.plain.state_dict().values())

    def close(self) -> None:
        self.graph = None
        # its memory is nobody's but its own
        self.plain.cpu()


def exact_gradient(case: Case) -> tuple[Gradient, dict[str, float]]:
    """Return the gradient in a wider type, and plain PyTorch's errors in the model's.

    Those are the larger of two ways to write the merge, rounded once or after each task.
    """
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    with no_tf32():
        runner = Plain(case, lambda part, gamma: merged_exactly(part, gamma, wide), wide, together=False)
        runner.step()
    truth = runner.gradient()
    runner.close()
    errors: dict[str, float] = {}
    merges: list[Callable[[Part, Tensor], Tensor]] = [
        lambda part, gamma: merged_exactly(part, gamma, case.dtype),
        lambda part, gamma: merged_plainly(part, gamma, combine_sum),
    ]
    for merge in merges:
        runner = Plain(case, merge, case.dtype, together=False)
        runner.step()
        for group, error in group_errors(runner.gradient(), truth).items():
            errors[group] = max(error, errors.get(group, 0.0))
        runner.close()
    return truth, errors


def exact_losses(case: Case) -> tuple[Gradient, dict[str, float]]:
    """Return each task's loss of the plain model in a wider type, and PyTorch's error.

    That is its rounding where that is more: chance makes the error of one number small.
    """
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    losses: list[Gradient] = []
    with torch.no_grad(), no_tf32():
        for dtype in (wide, case.dtype):
            widened = copy.deepcopy(case.plain).to(case.device, dtype)
            pairs = enumerate(zip(case.heads, case.images, strict=True))
            losses.append({f"loss.{task}": plain_loss(widened, head, x.to(dtype)) for task, (head, x) in pairs})
    truth, plain = losses
    rounding = torch.finfo(case.dtype).eps
    return truth, {group: max(error, rounding) for group, error in group_errors(plain, truth).items()}


def distance_gradient(case: Case, dtype: torch.dtype) -> Gradient:
    """Return the gradient of the data-free loss by its definition. Every difference of weights is in memory."""
    settings = case.settings
    total, scale = torch.zeros(case.tasks, dtype=dtype, device=case.device), torch.zeros_like(case.gamma, dtype=dtype)
    for part in case.parts.values():
        if "task_vectors" in part:
            zero, taus = torch.zeros_like(part["weight"], dtype=dtype), part["task_vectors"].to(dtype)
            difference = merged_exactly({**part, "weight": zero}, case.gamma, dtype) - taus
            total = total + difference.flatten(1).square().sum(dim=1)
            scale = scale + taus.flatten(1).square().sum(dim=1)
    values = total / scale if settings.normalize_distance else total
    loss = scalarize(values, case.gamma.to(values), settings.scalarization, settings.mu)
    loss = loss + settings.tensor_norm * low_rank_norm(case.parts, case.gamma, dtype)
    return dict(zip(case.learned, torch.autograd.grad(loss, list(case.learned.values())), strict=True))
