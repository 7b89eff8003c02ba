"""The training suite: one optimiser step of a whole vision transformer, beside what else could be done, on one GPU.

Everything is measured side by side in one run, on the same models, images and heads, at the same preference: ours in
every strategy; the model merged once per step with autograd; the usual layer-wise AdaMerging computation in float32 and
in the model's type; and the limit, the same forwards and backwards of a plain model that was merged beforehand. Each
variant ends in the gradient of all learned parameters and an Adam step, and has a time only if that gradient is as near
to the same computation in a wider type as plain PyTorch's is. Weights, task vectors, images and heads are made up: time
does not depend on their values. Images are on the GPU already: nothing is read or decoded.
"""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.suites import Save, nowhere
from benchmarks.kernels import ceilings, relative_error
from pareto_merging import MethodSettings, Task, learn_pareto_set, learned_parameters, set_strategy
from pareto_merging.learn.gradient import CudaGraphs, Execution, TasksAtOnce
from pareto_merging.learn.learner import Learner
from pareto_merging.learn.scalarize import scalarize
from pareto_merging.model.parameters import merged_parameters
from pareto_merging.model.parametrize import parametrize
from pmkernels import costs, dispatch, reference
from pmkernels.graphs import capture, warm_up

BATCH, CLASSES, RANK = 32, 100, 16
# of the error of plain PyTorch in the same type
TOLERANCE = 2.0
# seconds of steps that are timed for each variant
SECONDS = 1.0
# ‖τ_k‖ as a share of ‖W0‖
TASK_VECTOR_SIZE = 0.02
# so small that a step leaves every parameter as it is, and the same step can be repeated
LEARNING_RATE = 1e-30
# a data-free run that would take longer is not run to its end
LONGEST_RUN = 20.0
GIB = 2**30
FAILED = 1e30

STEP, DATA_FREE = "optimiser step", "data-free step"
AUTO = "auto"
WITHOUT_GRAPHS = "cached, no CUDA graphs"
ONCE = "merged once per step, autograd"
ADAMERGING = "layer-wise AdaMerging's computation"
LIMIT = "limit: merged beforehand, dW of the linear weights"
LIMIT_GRAPH = f"{LIMIT}, CUDA graph"
ALL = "auto, all tasks at once"
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
VARIANTS = {
    8: (*OURS, ONCE, ADAMERGING, LIMIT, LIMIT_GRAPH),
    2: (AUTO, ALL, "streamed", "fused", ONCE, ADAMERGING, LIMIT, LIMIT_GRAPH),
    4: (AUTO, ALL, "streamed", "fused", ONCE, ADAMERGING, LIMIT, LIMIT_GRAPH),
}


@dataclass(frozen=True)
class Architecture:
    """A vision transformer: timm's name of it, and its sizes in pixels, features, layers and heads."""

    name: str
    timm: str
    image: int
    patch: int
    width: int
    layers: int
    heads: int
    out: int


MODELS = (
    Architecture("ViT-B/32", "vit_base_patch32_clip_224", 224, 32, 768, 12, 12, 512),
    Architecture("ViT-L/14", "vit_large_patch14_clip_224", 224, 14, 1024, 24, 16, 768),
)
# a step over the limit under a CUDA graph, at most
STEP_GOALS = {"ViT-B/32": 1.15, "ViT-L/14": 1.05}
TINY = Architecture("tiny ViT", "vit_base_patch32_clip_224", 8, 4, 32, 2, 2, 8)
SOURCES = ("open_clip", "timm", "torchvision")


def vision_transformer(name: str, source: str | None = None) -> tuple[nn.Module, str]:
    """A randomly initialised vision tower in eval mode, and the library it comes from: the first that is installed.

    Raises:
        ValueError: an unknown name. ImportError: none of the libraries is installed, or not the one asked for.
    """
    known = {model.name: model for model in (*MODELS, TINY)}
    if name not in known:
        raise ValueError(f"name: expected one of {', '.join(known)}, got {name!r}")
    model = known[name]
    for library in SOURCES if source is None else (source,):
        try:
            built = _build(model, library)
        except ModuleNotFoundError:
            continue
        return built.eval(), library
    raise ImportError(f"{name}: expected {' or '.join(SOURCES if source is None else (source,))}, got none")


def _build(model: Architecture, library: str) -> nn.Module:
    built: nn.Module
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if library == "timm":
            sizes = {"img_size": model.image, "patch_size": model.patch, "embed_dim": model.width}
            sizes |= {"depth": model.layers, "num_heads": model.heads, "num_classes": model.out}
            built = importlib.import_module("timm").create_model(model.timm, pretrained=False, **sizes)
            return built
        sizes = {"image_size": model.image, "patch_size": model.patch}
        if library == "open_clip":
            sizes |= {"width": model.width, "layers": model.layers, "heads": model.heads, "output_dim": model.out}
            # the text tower is not built
            built = importlib.import_module("open_clip.transformer").VisionTransformer(mlp_ratio=4.0, **sizes)
            return built
        sizes |= {"num_layers": model.layers, "num_heads": model.heads, "hidden_dim": model.width}
        sizes |= {"mlp_dim": 4 * model.width, "num_classes": model.out}
        built = importlib.import_module("torchvision.models.vision_transformer").VisionTransformer(**sizes)
    # torchvision's starts at zero, which has no gradient
    nn.init.normal_(built.get_parameter("heads.head.weight"), std=model.width**-0.5)
    return built


class _FineTuned(Mapping[str, Tensor]):
    """The state dict of a made-up fine-tuned copy; a tensor is made when it is asked for, the same every time."""

    def __init__(self, plain: nn.Module, task: int) -> None:
        self._tensors, self._task = plain.state_dict(), task

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if not tensor.is_floating_point():
            return tensor
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(f"{self._task} {name}".encode()))
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        wide = tensor.float()
        # biases that start at zero move as well
        return wide + TASK_VECTOR_SIZE * wide.square().mean().sqrt().clamp(min=0.02) * noise

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Head(nn.Module):
    """A zero-shot head of random class embeddings: features [n, dim] -> logits [n, classes], float32 (float64).

    At CLIP's scale of 100 random features make predictions so sharp that bfloat16's rounding of a feature decides most
    of the gradient, and no mistake could be told from it.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, scale: float = 20.0) -> None:
        super().__init__()
        self.register_buffer("weight", F.normalize(weight, dim=-1))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        dtype = reference.accumulate_dtype(features)
        return self.scale * F.normalize(features.to(dtype), dim=-1) @ self.weight.to(dtype).t()


@dataclass
class Part:
    """What one merged parameter is made of."""

    weight: Tensor
    task_vectors: Tensor | None
    lam: Tensor | None
    A: Tensor | None
    G: Tensor | None
    B: Tensor | None


@dataclass
class Case:
    """One model with K tasks: what every variant is given. ``skeleton`` is the plain model without any memory."""

    architecture: Architecture
    source: str
    tasks: int
    device: torch.device
    dtype: torch.dtype
    skeleton: nn.Module
    heads: list[Head]
    images: list[Tensor]
    gamma: Tensor
    settings: MethodSettings
    pareto: nn.Module | None
    parts: dict[str, Part]
    others: dict[str, Tensor]
    learned: dict[str, nn.Parameter]

    @property
    def title(self) -> str:
        """What the rows of this case call it."""
        return f"{self.architecture.name}, K = {self.tasks}"


def build_case(
    architecture: Architecture,
    tasks: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int = BATCH,
    source: str | None = None,
) -> tuple[nn.Module, Case]:
    """The plain model, on the CPU, and everything else; λ, A, G and B are off their starting values, where G is 0."""
    plain, found = vision_transformer(architecture.name, source)
    plain = plain.to(device, dtype)
    copies = {f"task_{k + 1}": _FineTuned(plain, k) for k in range(tasks)}
    pareto = parametrize(plain, copies, rank=RANK, low_rank="attention", digests=False).eval()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    learned = learned_parameters(pareto)
    with torch.no_grad():
        for parameter in learned.values():
            parameter.add_(0.05 * random(*parameter.shape).to(parameter))
    # none so large that the others' gradients vanish beside it, no two alike
    shares = torch.linspace(1.0, 1.1, tasks, dtype=torch.float64)
    gamma = (shares / shares.sum()).tolist()
    parts, merged = {}, set()
    for stored in merged_parameters(pareto):
        parts[stored.path] = Part(stored.weight, **stored.parts())
        merged.add(stored.path)
    size = architecture.image
    case = Case(
        architecture=architecture,
        source=found,
        tasks=tasks,
        device=device,
        dtype=dtype,
        skeleton=copy.deepcopy(plain).to("meta"),
        heads=[Head(random(CLASSES, architecture.out)).to(device) for _ in range(tasks)],
        images=[random(batch, 3, size, size).to(device, dtype) for _ in range(tasks)],
        gamma=torch.tensor(gamma, dtype=torch.float32, device=device),
        settings=MethodSettings.model_validate(
            {"batch_size": batch, "preference": "fixed", "gamma": gamma, "learning_rate": LEARNING_RATE}
        ),
        pareto=pareto,
        parts=parts,
        others={name: tensor for name, tensor in plain.state_dict().items() if name not in merged},
        learned=learned,
    )
    # its memory is nobody's but the limit's
    return plain.cpu(), case


Gradient = dict[str, Tensor]


class Runner(Protocol):
    """One variant: a step, and what is judged of it: the gradient at the same place (a limit: its losses)."""

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
        if self.settings.objective == "weight-distance":
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
        """Of the learner as it is after its steps: on a GPU, what a replay of its CUDA graph gives."""
        flat = self.learner.gradient(self.batch, self.case.gamma).gradient.clone()
        parts = flat.split([parameter.numel() for parameter in self.learner.learned.values()])
        return {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(self.learner.learned.items(), parts, strict=True)
        }

    def resident(self) -> int:
        assert self.case.pareto is not None
        return _bytes(self.case.pareto.state_dict(keep_vars=True).values())

    def close(self) -> None:
        # lets go of merged weights that were kept
        assert self.case.pareto is not None
        set_strategy(self.case.pareto, "eager")


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


def combine_product(weight: Tensor, lam: Tensor, task_vectors: Tensor) -> Tensor:
    """W0 + Σ_k λ_k τ_k as one matrix-vector product."""
    flat = task_vectors.reshape(len(task_vectors), -1)
    return torch.addmv(weight.reshape(-1), flat.t(), lam.to(weight.dtype)).view_as(weight)


def combine_sum(weight: Tensor, lam: Tensor, task_vectors: Tensor) -> Tensor:
    """W0 + Σ_k λ_k τ_k, one task after the other, as the published code does it."""
    for coefficient, task_vector in zip(lam.to(weight.dtype), task_vectors, strict=True):
        weight = weight + coefficient * task_vector
    return weight


COMBINE: dict[str, Combine] = {"matrix-vector product": combine_product, "sum over the tasks": combine_sum}


def fastest_combine(case: Case) -> str:
    """The baselines merge in the way that is faster here, forward and backward; off the GPU the published one."""
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
    """W(γ) in the type of the weight, for autograd."""
    merged = part.weight
    if part.task_vectors is not None and part.lam is not None:
        merged = combine(merged, part.lam, part.task_vectors)
    if part.A is not None and part.G is not None and part.B is not None:
        left = (part.A @ (part.G @ gamma)).to(merged.dtype)
        merged = torch.addmm(merged, left, part.B.to(merged.dtype).t())
    return merged


def merged_exactly(part: Part, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """W(γ) by its definition, in the type of the weight or a wider one."""
    low_rank = {"A": part.A, "G": part.G, "B": part.B, "gamma": gamma if part.A is not None else None}
    return reference.merge_weight(part.weight.to(dtype), task_vectors=part.task_vectors, lam=part.lam, **low_rank)


def low_rank_norm(parts: Mapping[str, Part], gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """‖A·C·Bᵀ‖_F of all layers together, those of one shape at once."""
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
    """A step in plain PyTorch: every merged parameter is a tensor of the graph, the model is called with them.

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
        return _bytes([*parts, *self.others.values()])

    def close(self) -> None:
        self.optimizer.zero_grad()


def plain_loss(model: nn.Module, head: Head, images: Tensor) -> Tensor:
    """A task's mean entropy with a plain model."""
    return reference.softmax_entropy(head(model(images))).mean()


class Limit:
    """Forward and backward of a plain model with the gradients of its linear weights, and nothing else.

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
            self._capture()

    def _capture(self) -> None:
        warm_up(self._run, self.case.device)
        self.graph, _ = capture(self._run, self.case.device)

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
        return _bytes(self.plain.state_dict().values())

    def close(self) -> None:
        self.graph = None
        # its memory is nobody's but its own
        self.plain.cpu()


@dataclass
class Row:
    """One variant of a step: milliseconds, memory and what follows from them; ``reason``: why there are none, or what
    the run warned of.

    ``host_ms``: until the call returns; ours looks at the gradient once in a step, so it waits inside. ``bound_ms``:
    of the products, attention and merge, counted. ``run_seconds``: of the whole run of ``run_steps`` steps, computed
    from ``ms`` unless ``run_measured``.
    """

    op: str
    layer: str
    dtype: str
    variant: str
    error: float
    plain_error: float
    matched: bool
    model: str
    tasks: int
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    host_ms: float | None = None
    images_per_second: float | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    bound_ms: float | None = None
    run_steps: int | None = None
    run_seconds: float | None = None
    run_measured: bool = False
    reason: str | None = None


def group_errors(found: Gradient, truth: Gradient) -> dict[str, float]:
    """The relative error of the gradient of all λ together, of all A, all G and all B."""
    if set(found) != set(truth):
        return {"": FAILED}
    groups: dict[str, list[str]] = {}
    for name in truth:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return {
        group: relative_error(
            [torch.cat([found[name].reshape(-1) for name in names])], [torch.cat([truth[n].reshape(-1) for n in names])]
        )
        for group, names in groups.items()
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Convolutions in exact float32 as well; elsewhere PyTorch has it so."""
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def timed(step: Callable[[], None], device: torch.device, seconds: float) -> dict[str, float]:
    """Steps one after the other, each between two events: median, 20th and 80th percentile, and the host's time."""
    hosts: list[float] = []
    whole = 0.0
    # a slow step is not repeated just to see how long the host takes
    while len(hosts) < 3 and whole < 0.2:
        _synchronize(device)
        start = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - start)
        _synchronize(device)
        whole = time.perf_counter() - start
    repeats = max(3, min(50, round(seconds / max(whole, 1e-6))))
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    else:
        # a rehearsal
        times = [1e3 * host for host in hosts]
    low, median, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return {"ms": median, "p20": low, "p80": high, "host_ms": 1e3 * statistics.median(hosts)}


def measure(
    row: Row,
    make: Callable[[], Runner],
    truth: Gradient,
    plain: Mapping[str, float],
    device: torch.device,
    seconds: float,
) -> Row:
    """``row`` with what was measured of the variant that ``make`` makes; whatever goes wrong is its reason.

    ``plain``: the errors of plain PyTorch in this type. A gradient that is further away by more than TOLERANCE has no
    time; neither has what runs out of memory, which is not wrong.
    """
    runner: Runner | None = None
    found: Gradient | None = None
    try:
        _free(device)
        runner = make()
        for _ in range(runner.warm_up):
            runner.step()
        found = runner.gradient()
        errors = group_errors(found, truth)
        worst = max(errors, key=lambda group: errors[group] / (plain.get(group, 0.0) + 1e-6))
        row.error, row.plain_error = errors[worst], plain.get(worst, 0.0)
        row.matched = all(error <= TOLERANCE * plain.get(group, 0.0) + 1e-6 for group, error in errors.items())
        if not row.matched:
            row.reason = f"wrong {worst}" if worst == "loss" else f"wrong gradient of {worst}"
        found = None
        if row.matched:
            for name, value in timed(runner.step, device, seconds).items():
                setattr(row, name, value)
            row.resident_bytes = runner.resident()
            row.reason = "; ".join(dict.fromkeys(runner.notes)) or None
            if device.type == "cuda":
                row.peak_bytes = torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        row.reason = "out of memory"
    except Exception as error:
        row.matched, row.error, row.reason = False, FAILED, f"{type(error).__name__}: {error}"[:300]
    finally:
        if runner is not None:
            runner.close()
        runner = None
        _free(device)
    return row


def products(
    skeleton: nn.Module, shape: Sequence[int], width: int
) -> tuple[list[tuple[int, int, int, bool]], float, float]:
    """Every product of one forward, as rows, out, in and whether its input needs a gradient; then the operations and
    the numbers moved of all attention. Counted by a run of the model without memory."""
    found: list[tuple[int, int, int, bool]] = []
    attention: list[int] = []

    def linear(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if isinstance(module, nn.Conv2d):
                found.append((output.numel() // output.shape[1], output.shape[1], module.weight[0].numel(), False))
                return
            rows = args[0].numel() // args[0].shape[-1]
            if isinstance(module, nn.MultiheadAttention):
                found.extend([(rows, 3 * width, width, True), (rows, width, width, True)])
            else:
                found.append((rows, module.out_features, module.in_features, True))
            if isinstance(module, nn.MultiheadAttention) or name.endswith("qkv"):
                attention.append(rows)

        return hook

    kinds = (nn.Linear, nn.MultiheadAttention, nn.Conv2d)
    handles = [
        module.register_forward_hook(linear(name))
        for name, module in skeleton.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        dtype = next(skeleton.parameters()).dtype
        # with gradients wanted, attention takes the ordinary path
        skeleton(torch.empty(*shape, device="meta", dtype=dtype))
    finally:
        for handle in handles:
            handle.remove()
    operations = sum(4.0 * rows * (rows // shape[0]) * width for rows in attention)
    return found, operations, sum(4.0 * rows * width for rows in attention)


def bound_ms(case: Case, rates: Mapping[str, float], dtype: torch.dtype) -> float:
    """Milliseconds that a step's merge, products and attention take at the rates measured, one after the other."""
    kind = "float32" if dtype == torch.float32 else "16-bit"
    gpu = costs.Rates(
        half=rates["bfloat16"],
        tf32=rates["float32"],
        float32=rates["float32"],
        memory=rates["copy"],
        cache=rates["copy"],
        cache_bytes=0.0,
        multiprocessors=1,
        measured=True,
    )
    found, operations, numbers = products(case.skeleton, case.images[0].shape, case.architecture.width)
    seconds = 0.0
    size = 4 if kind == "float32" else 2
    for rows, n, d, inner in found:
        problem = costs.Problem(rows, n, d, case.tasks, RANK, kind)
        seconds += costs.bound("merge", problem).seconds(gpu, kind)
        each = [costs.bound("forward", problem, cached=True), costs.bound("weight_grad", problem)]
        each += [costs.bound("dx", problem, cached=True)] if inner else []
        seconds += case.tasks * sum(bound.seconds(gpu, kind) for bound in each)
    # backward: twice the operations and the bytes of the forward
    seconds += 3 * case.tasks * costs.Bound(operations, numbers * size).seconds(gpu, kind)
    return 1e3 * seconds


def exact_gradient(case: Case) -> tuple[Gradient, dict[str, float]]:
    """The gradient in a wider type, one task at a time, and the errors of plain PyTorch in the model's own type: the
    larger of two ways to write the merge, rounded once or after each task."""
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    with _no_tf32():
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


def exact_losses(model: nn.Module, case: Case) -> tuple[Gradient, dict[str, float]]:
    """Each task's loss of a plain model in a wider type, and the error of PyTorch in the model's own, or its rounding
    where that is more: chance makes the error of one number small."""
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    found: list[Gradient] = []
    with torch.no_grad(), _no_tf32():
        for dtype in (wide, case.dtype):
            widened = copy.deepcopy(model).to(case.device, dtype)
            pairs = enumerate(zip(case.heads, case.images, strict=True))
            found.append({f"loss.{task}": plain_loss(widened, head, x.to(dtype)) for task, (head, x) in pairs})
    truth, plain = found
    rounding = torch.finfo(case.dtype).eps
    return truth, {group: max(error, rounding) for group, error in group_errors(plain, truth).items()}


def distance_gradient(case: Case, dtype: torch.dtype) -> Gradient:
    """The gradient of the data-free loss by its definition, with every difference of weights in memory."""
    settings = case.settings
    own: list[Tensor] = []
    total, scale = torch.zeros(case.tasks, dtype=dtype, device=case.device), torch.zeros_like(case.gamma, dtype=dtype)
    for part in case.parts.values():
        if part.task_vectors is None:
            continue
        zero = replace(part, weight=torch.zeros_like(part.weight, dtype=dtype))
        difference = merged_exactly(zero, case.gamma, dtype) - part.task_vectors.to(dtype)
        total = total + difference.flatten(1).square().sum(dim=1)
        scale = scale + part.task_vectors.to(dtype).flatten(1).square().sum(dim=1)
    values = total / scale if settings.normalize_distance else total
    loss = scalarize(values, case.gamma.to(values), settings.scalarization, settings.mu)
    loss = loss + settings.tensor_norm * low_rank_norm(case.parts, case.gamma, dtype)
    own = list(torch.autograd.grad(loss, list(case.learned.values())))
    return dict(zip(case.learned, own, strict=True))


def _blank(case: Case, op: str, variant: str, dtype: torch.dtype) -> Row:
    name = str(dtype).removeprefix("torch.")
    return Row(op, case.title, name, variant, 0.0, 0.0, True, model=case.architecture.name, tasks=case.tasks)


class Clock:
    """Progress lines with the time since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.lines: list[str] = []

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def say(self, text: str) -> None:
        """Print a line and keep it."""
        self.lines.append(f"{self.seconds():6.1f} s  {text}")
        print(self.lines[-1], flush=True)


def data_free_row(case: Case, clock: Clock, seconds: float, longest: float, steps: int | None) -> Row:
    """One step without data, and the whole run of ``steps`` if it takes no longer than ``longest`` seconds."""
    settings = case.settings.model_copy(update={"objective": "weight-distance"})
    row = _blank(case, DATA_FREE, AUTO, case.dtype)
    try:
        truth = distance_gradient(case, torch.float64)
        plain = group_errors(distance_gradient(case, torch.float32), truth)
    except torch.cuda.OutOfMemoryError:
        row.reason = "out of memory in the check"
        return row
    # closed forms of float32 numbers that nearly cancel: what counts is that Adam's sign and size are right
    plain = {group: max(error, 1e-3) for group, error in plain.items()}
    row = measure(row, lambda: Ours(case, "auto", "auto", settings=settings), truth, plain, case.device, seconds)
    if row.ms is None:
        return row
    published = MethodSettings.model_validate({"objective": "weight-distance", "steps": steps})
    row.run_steps = published.steps_for(case.tasks)
    row.run_seconds = row.run_steps * row.ms / 1e3
    if row.run_seconds <= longest:
        assert case.pareto is not None
        set_strategy(case.pareto, "auto")
        clock.say(f"{case.title}: a whole data-free run")
        kept = {name: parameter.detach().clone() for name, parameter in case.learned.items()}
        _synchronize(case.device)
        start = time.perf_counter()
        try:
            learn_pareto_set(case.pareto, None, published, progress=False)
            _synchronize(case.device)
            row.run_seconds, row.run_measured = time.perf_counter() - start, True
        except Exception as error:
            # the rest of the case is measured all the same
            row.matched, row.error, row.reason = False, FAILED, f"{type(error).__name__}: {error}"[:300]
            row.ms = row.run_seconds = None
        with torch.no_grad():
            for name, parameter in case.learned.items():
                parameter.copy_(kept[name])
    return row


def profile(step: Callable[[], None], device: torch.device, top: int = 15) -> list[dict[str, Any]]:
    """The ``top`` kernels of one step by GPU time (off the GPU: operators by the CPU's): name, milliseconds, share."""
    from torch.profiler import ProfilerActivity

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        step()
        _synchronize(device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    kernels = [(event.key, getattr(event, own), event.count) for event in found.key_averages()]
    kernels = [kernel for kernel in kernels if kernel[1] > 0]
    total = sum(microseconds for _, microseconds, _ in kernels)
    kernels.sort(key=lambda kernel: -kernel[1])
    return [
        {"kernel": name, "calls": calls, "ms": microseconds / 1e3, "share": microseconds / total}
        for name, microseconds, calls in kernels[:top]
    ]


class Profiled(Ours):
    """Ours, with a profile of a step taken when it closes."""

    found: list[dict[str, Any]]

    def close(self) -> None:
        try:
            self.found = profile(self.step, self.case.device)
        except Exception as error:
            # what was measured counts without it
            print(f"no profile: {type(error).__name__}: {error}", flush=True)
            self.found = []
        super().close()


def case_rows(
    architecture: Architecture,
    tasks: int,
    device: torch.device,
    dtype: torch.dtype,
    variants: Sequence[str],
    rates: Mapping[str, float],
    clock: Clock,
    *,
    batch: int = BATCH,
    seconds: float = SECONDS,
    data_free: bool = False,
    steps: int | None = None,
    profiles: dict[str, list[dict[str, Any]]] | None = None,
    source: str | None = None,
) -> Iterator[Row]:
    """A row for each of ``variants`` (AdaMerging's computation: in float32 and in ``dtype``) of one model and K.

    ``seconds``: of timed steps per variant; ``steps``: of the data-free run; ``profiles``: where that of ``auto`` goes.
    """
    plain, case = build_case(architecture, tasks, device, dtype, batch=batch, source=source)
    clock.say(f"{case.title}: made from {case.source}")

    def done(row: Row) -> Row:
        if row.ms is not None and row.op == STEP:
            row.images_per_second = 1e3 * tasks * batch / row.ms
            row.bound_ms = bound_ms(case, rates, torch.float32 if row.dtype == "float32" else dtype)
            row.run_steps = case.settings.steps_for(tasks)
            row.run_seconds = row.run_steps * row.ms / 1e3
        time_ = "" if row.ms is None else f"{row.ms:.2f} ms"
        clock.say(f"{row.layer}: {row.variant}, {row.dtype}: {', '.join(filter(None, (time_, row.reason)))}")
        return row

    truth, errors = exact_gradient(case)
    for variant, how in OURS.items():
        if variant not in variants:
            continue
        made: list[Profiled] = []

        def ours(how: How = how, made: list[Profiled] = made) -> Runner:
            if how != OURS[AUTO] or profiles is None:
                return Ours(case, *how)
            made.append(Profiled(case, *how))
            return made[0]

        yield done(measure(_blank(case, STEP, variant, dtype), ours, truth, errors, device, seconds))
        if made and profiles is not None:
            profiles[case.architecture.name] = made[0].found
        made.clear()
    if data_free:
        yield done(data_free_row(case, clock, seconds, LONGEST_RUN, steps))
    name = fastest_combine(case)
    clock.say(f"{case.title}: the baselines merge by {name}")
    combine = COMBINE[name]

    def baseline(type_: torch.dtype, together: bool) -> Callable[[], Runner]:
        return lambda: Plain(case, lambda part, gamma: merged_plainly(part, gamma, combine), type_, together)

    if ONCE in variants:
        yield done(measure(_blank(case, STEP, ONCE, dtype), baseline(dtype, False), truth, errors, device, seconds))
    # the limit has a model of its own and needs no task vectors
    if ADAMERGING in variants:
        if dtype != torch.float32:
            row = _blank(case, STEP, ADAMERGING, dtype)
            yield done(measure(row, baseline(dtype, True), truth, errors, device, seconds))
        widen(case)
        row = _blank(case, STEP, ADAMERGING, torch.float32)
        yield done(measure(row, baseline(torch.float32, True), truth, errors, device, seconds))
    case.pareto, case.parts, case.learned = None, {}, {}
    del truth
    limits = [(LIMIT, False), *([(LIMIT_GRAPH, True)] if device.type == "cuda" else [])]
    wanted = [(variant, graph) for variant, graph in limits if variant in variants]
    losses = exact_losses(plain, case) if wanted else ({}, {})
    for variant, graph in wanted:
        make = lambda graph=graph: Limit(plain, case, graph)  # noqa: E731
        yield done(measure(_blank(case, STEP, variant, dtype), make, *losses, device, seconds))


def widen(case: Case) -> None:
    """Weights and task vectors in float32, one at a time; the Pareto model that held them is gone afterwards."""
    case.pareto = None
    gc.collect()
    for part in case.parts.values():
        part.weight = part.weight.detach().float()
        part.task_vectors = None if part.task_vectors is None else part.task_vectors.detach().float()


def _variants(device: torch.device, tasks: int) -> list[str]:
    """What can run here: kernels need a GPU, or to be interpreted."""
    kernels = dispatch.runs_kernels(device)
    return [variant for variant in VARIANTS[tasks] if kernels or variant not in ("streamed", "fused")]


def run(quick: bool, save: Save = nowhere) -> dict[str, Any]:
    """All rows. ``quick``: a tiny model on any device, which proves that it runs and measures nothing.

    ``save`` gets the report after every row.
    """
    if not quick and not torch.cuda.is_available():
        raise SystemExit("--suite training: expected a CUDA GPU, got none (--quick rehearses it on the CPU)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock()
    if quick:
        clock.say("a rehearsal with a tiny model: it measures nothing")
    rates = ceilings(device, quick)
    profiles: dict[str, list[dict[str, Any]]] = {}
    sources: dict[str, str] = {}
    report: dict[str, Any] = {"quick": quick, "batch": BATCH, "classes": CLASSES, "rank": RANK, "ceilings": rates}
    report |= {"sources": sources, "rows": [], "profiles": {}, "progress": clock.lines}

    def keep(row: Row) -> None:
        report["rows"].append(asdict(row))
        save(report)

    def add(
        architecture: Architecture, tasks: int, dtype: torch.dtype, variants: Sequence[str], **options: Any
    ) -> None:
        sources[architecture.name] = vision_transformer(TINY.name)[1]
        try:
            for row in case_rows(architecture, tasks, device, dtype, variants, rates, clock, **options):
                keep(row)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            title = f"{architecture.name}, K = {tasks}"
            clock.say(f"{title}: {reason}")
            wrong = not isinstance(error, torch.cuda.OutOfMemoryError)
            failed = Row(STEP, title, str(dtype).removeprefix("torch."), "all", FAILED, 0.0, not wrong, "", tasks)
            keep(replace(failed, model=architecture.name, reason=reason))
        # the exception and the generator held what they had made
        _free(device)

    # float32 against float64: a mistake that the rounding of bfloat16 could hide
    every = [v for v in _variants(device, 8) if quick or not v.startswith("limit")]
    # three tasks are more than an interpreter can do in time
    tasks = 3 if device.type == "cuda" else 2
    add(TINY, tasks, torch.float32, every, batch=2, seconds=0.05, data_free=True, steps=3)
    if not quick:
        for architecture in MODELS:
            # plain PyTorch and a step without graphs say nothing new with fewer tasks
            for tasks in VARIANTS:
                options: dict[str, Any] = {"data_free": architecture is MODELS[0] and tasks == 8}
                options["profiles"] = profiles if tasks == 8 else None
                add(architecture, tasks, torch.bfloat16, _variants(device, tasks), **options)
    missed = {goal["model"] for goal in goals(report) if goal["status"] == "not met"}
    report["profiles"] = {model: found for model, found in profiles.items() if model in missed}
    clock.say("done")
    return report


def _row(
    report: Mapping[str, Any], model: str, variant: str, dtype: str = "bfloat16", op: str = STEP
) -> dict[str, Any]:
    """The row of eight tasks that was asked for; one without figures if there is none."""
    for row in report["rows"]:
        key = (row["op"], row.get("model"), row.get("tasks"), row.get("dtype"), row.get("variant"))
        if key == (op, model, 8, dtype, variant) and row["matched"]:
            found: dict[str, Any] = row
            return found
    return {"ms": None, "peak_bytes": None, "run_seconds": None, "reason": None}


def goals(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was aimed at with eight tasks: model, goal, measured, and ``met``, ``not met`` or ``not measured``."""
    found: list[dict[str, str]] = []

    def add(model: str, goal: str, measured: str | None, met: bool, reason: str | None = None) -> None:
        status = "not measured" if measured is None else "met" if met else "not met"
        found.append({"model": model, "goal": goal, "measured": measured or reason or "", "status": status})

    for model, most in STEP_GOALS.items():
        ours, limit = _row(report, model, AUTO), _row(report, model, LIMIT_GRAPH)
        wide, same = _row(report, model, ADAMERGING, "float32"), _row(report, model, ADAMERGING)
        text, met = None, False
        if ours["ms"] and limit["ms"]:
            ratio, together = ours["ms"] / limit["ms"], _row(report, model, ALL)["ms"]
            text, met = f"{ratio:.2f}×", ratio <= most
            if together:
                text += f" ({together / limit['ms']:.2f}× with all tasks at once)"
        goal = f"a step within {most:.2f}× the limit under a CUDA graph"
        add(model, goal, text, met, ours["reason"] or limit["reason"])
        text, met = None, False
        if ours["ms"] and same["ms"] and ours["peak_bytes"] and same["peak_bytes"]:
            ratio, share = ours["ms"] / same["ms"], ours["peak_bytes"] / same["peak_bytes"]
            text, met = f"{ratio:.2f}× the time, {share:.2f} of the memory", ratio <= 1.05 and share <= 1 / 3
        add(
            model,
            "within 1.05× the time of AdaMerging's computation in bfloat16, at a third of its peak memory",
            text,
            met,
            ours["reason"] or same["reason"],
        )
        text, met = None, False
        if ours["ms"] and wide["ms"]:
            ratio = wide["ms"] / ours["ms"]
            text, met = f"{ratio:.1f}×", ratio >= 3
            launched = _row(report, model, WITHOUT_GRAPHS)["ms"]
            if launched:
                # some of the factor may be launches alone
                text += f" ({wide['ms'] / launched:.1f}× without a CUDA graph)"
        add(
            model,
            "3× as fast as AdaMerging's computation in float32",
            text,
            met,
            ours["reason"] or wide["reason"],
        )
    for model, goal, seconds in (
        ("ViT-B/32", "8 tasks, 4000 steps in 90 s", 90.0),
        ("ViT-L/14", "8 tasks, 4000 steps in 25 minutes", 1500.0),
    ):
        ours = _row(report, model, AUTO)
        taken = ours["run_seconds"]
        text = None if taken is None else f"{taken:.0f} s, computed from the step"
        add(model, goal, text, taken is not None and taken <= seconds, ours["reason"])
    free = _row(report, "ViT-B/32", AUTO, op=DATA_FREE)
    taken, text = free["run_seconds"], None
    if taken is not None:
        text = f"{taken:.1f} s, {'measured' if free['run_measured'] else 'computed from the step'}"
    add("ViT-B/32", "a data-free run of 8 tasks in 10 s", text, taken is not None and taken <= 10, free["reason"])
    return found


def goals_markdown(report: Mapping[str, Any]) -> str:
    """The table of the goals."""
    lines = ["| model | goal | measured | |", "|---|---|---|---|"]
    lines += [f"| {g['model']} | {g['goal']} | {g['measured']} | {g['status']} |" for g in goals(report)]
    return "\n".join(lines) + "\n"


def markdown(report: Mapping[str, Any]) -> str:
    """The goals, a table for each model and K, and profiles where a goal was missed."""
    rates = report["ceilings"]
    own = [row for row in report["rows"] if row["op"] in (STEP, DATA_FREE)]
    lines = ["A rehearsal: these figures measure nothing.", ""] if report["quick"] else []
    sources = ", ".join(f"{model} from {source}" for model, source in report["sources"].items())
    lines += [
        f"One optimiser step, r = {report['rank']}, {report['batch']} images per task, {report['classes']} classes "
        f"({sources}). Median and 20th to 80th percentile of one run; the host's time is until the call returns, peak "
        "memory is all that was allocated, the run is computed from the step. AdaMerging's computation learns the "
        "low-rank term as well here, which the published code does not have, and runs without a CUDA graph. Ceilings "
        "measured in the same run: copy "
        f"{rates['copy'] / 1e12:.2f} TB/s, bfloat16 {rates['bfloat16'] / 1e12:.0f} TFLOP/s, float32 "
        f"{rates['float32'] / 1e12:.0f} TFLOP/s.",
        "",
        goals_markdown(report).rstrip(),
    ]
    columns = ["variant", "type", "ms", "p20–p80", "to the limit", "of the bound", "images/s", "host ms", "peak GiB"]
    head = f"| {' | '.join([*columns, 'resident GiB', 'run s'])} |"
    for title in dict.fromkeys(row["layer"] for row in own):
        group = [row for row in own if row["layer"] == title]
        limits = [row["ms"] for row in group if row["variant"].startswith("limit") and row["ms"]]
        lines += ["", f"**{title}**", "", head, "|---|---|" + "---:|" * 9]
        for row in group:
            variant = row["variant"] if row["op"] == STEP else row["op"]
            variant += f" ({row['reason']})" if row["reason"] and row["ms"] is not None else ""
            lines.append(f"| {variant} | {row['dtype']} | {_cells(row, min(limits, default=None))} |")
    for model, kernels in report.get("profiles", {}).items():
        lines += ["", f"**Where a step of {model}, K = 8, spends the GPU's time**", ""]
        lines += ["| kernel | calls | ms | share |", "|---|---:|---:|---:|"]
        for k in kernels:
            name = k["kernel"].replace("|", "\\|")
            name = name if len(name) <= 80 else f"{name[:79]}…"
            lines.append(f"| `{name}` | {k['calls']} | {k['ms']:.3f} | {k['share']:.1%} |")
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any], limit: float | None) -> str:
    if row["ms"] is None:
        why = row["reason"] or "not measured"
        why = why if row["matched"] else f"wrong ({why}): error {row['error']:.1e}, PyTorch {row['plain_error']:.1e}"
        return " | ".join([why.replace("|", "\\|"), *[""] * 8])
    step = row["op"] == STEP
    cells = [
        f"{row['ms']:.2f}",
        f"{row['p20']:.2f}–{row['p80']:.2f}",
        f"{row['ms'] / limit:.2f}×" if limit and step else "",
        f"{row['bound_ms'] / row['ms']:.0%}" if row["bound_ms"] else "",
        f"{row['images_per_second']:.0f}" if row["images_per_second"] else "",
        f"{row['host_ms']:.2f}",
        *("" if row[name] is None else f"{row[name] / GIB:.2f}" for name in ("peak_bytes", "resident_bytes")),
        "" if row["run_seconds"] is None else f"{row['run_seconds']:.0f}",
    ]
    return " | ".join(cells)


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """A picture for each model: time of a step and peak memory over K."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    markers, styles = "osD^vPX*<>", ("-", "--", ":")
    shown = [TINY.name] if report["quick"] else [architecture.name for architecture in MODELS]
    for model in shown:
        rows = [row for row in report["rows"] if (row["op"], row.get("model")) == (STEP, model) and row["ms"]]
        if not rows:
            continue
        with matplotlib.rc_context({"font.size": 7.5, "axes.spines.top": False, "axes.spines.right": False}):
            figure = Figure(figsize=(7.0, 3.4), dpi=200, layout="constrained")
            axes = figure.subplots(1, 2)
            for number, (variant, dtype) in enumerate(dict.fromkeys((row["variant"], row["dtype"]) for row in rows)):
                line = sorted(
                    (r for r in rows if (r["variant"], r["dtype"]) == (variant, dtype)), key=lambda r: r["tasks"]
                )
                style: dict[str, Any] = {"marker": markers[number % len(markers)], "linewidth": 1.0, "markersize": 4}
                style |= {"linestyle": styles[number % len(styles)], "label": f"{variant} ({dtype})"}
                axes[0].plot([row["tasks"] for row in line], [row["ms"] for row in line], **style)
                known = [row for row in line if row["peak_bytes"]]
                axes[1].plot([row["tasks"] for row in known], [row["peak_bytes"] / GIB for row in known], **style)
            for panel, title in zip(axes, ("time of a step (ms)", "peak memory (GiB)"), strict=True):
                panel.set(xlabel="tasks K", ylabel=title, yscale="log", xticks=sorted({row["tasks"] for row in rows}))
                panel.grid(alpha=0.3, linewidth=0.6)
            figure.suptitle(f"{model}, {report['batch']} images per task")
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
            path = folder / f"training-{model.lower().replace('/', '-').replace(' ', '-')}.png"
            figure.savefig(path)
        written.append(path)
    return written
