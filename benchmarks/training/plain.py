"""A step in plain PyTorch: the baselines, and the limit."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.errors import Gradient
from benchmarks.training.models import CLASSES, LEARNING_RATE, Case, Head, Part
from benchmarks.training.ours import bytes_of
from pareto_merging.learn.scalarize import scalarize
from pmkernels import reference
from pmkernels.graphs import capture, warm_up

Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    part = max(case.parts.values(), key=lambda p: p.weight.numel() if p.task_vectors is not None else 0)
    assert part.lam is not None and part.task_vectors is not None
    taken = {}
    for name, combine in COMBINE.items():
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(combine(part.weight, part.lam, part.task_vectors), part.lam, part.weight)
            torch.cuda.synchronize()
            taken[name] = time.perf_counter() - start
    return min(taken, key=lambda name: taken[name])


def merged_plainly(part: Part, gamma: Tensor, combine: Combine) -> Tensor:
    """Return W(γ) in the type of the weight, for autograd."""
    merged = part.weight
    if part.task_vectors is not None and part.lam is not None:
        merged = combine(merged, part.lam, part.task_vectors)
    if part.A is not None and part.G is not None and part.B is not None:
        left = (part.A @ (part.G @ gamma)).to(merged.dtype)
        merged = torch.addmm(merged, left, part.B.to(merged.dtype).t())
    return merged


def merged_exactly(part: Part, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W(γ) by its definition, in the type of the weight or a wider one."""
    low_rank = {"A": part.A, "G": part.G, "B": part.B, "gamma": gamma if part.A is not None else None}
    return reference.merge_weight(part.weight.to(dtype), task_vectors=part.task_vectors, lam=part.lam, **low_rank)


def low_rank_norm(parts: Mapping[str, Part], gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ‖A·C·Bᵀ‖_F of all layers together, those of one shape at once."""
    groups: dict[Any, list[Part]] = {}
    for part in parts.values():
        if part.A is not None and part.B is not None:
            groups.setdefault((part.A.shape, part.B.shape), []).append(part)
    squares = []
    for group in groups.values():
        A, G, B = (torch.stack([getattr(part, name) for part in group]).to(dtype) for name in ("A", "G", "B"))
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
        parts = (t for part in self.case.parts.values() for t in vars(part).values())
        return bytes_of([*parts, *self.others.values()])

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

    def __init__(self, plain: nn.Module, case: Case, graph: bool) -> None:
        self.plain, self.case = plain.to(case.device), case
        self.notes: list[str] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.losses: list[Tensor] = []
        plain.requires_grad_(False)
        self.weights = [module.weight for module in plain.modules() if isinstance(module, nn.Linear)]
        attentions = [module for module in plain.modules() if isinstance(module, nn.MultiheadAttention)]
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
