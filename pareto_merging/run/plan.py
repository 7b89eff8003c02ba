"""A run's needs, counted from the architecture: parameters and bytes by kind, and rounding."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pareto_merging.checkpoints import encoders
from pareto_merging.data.sources import open_images
from pareto_merging.errors import UserError, user_errors
from pareto_merging.learn.distillation import needs_head
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.teachers import KEPT_DTYPE
from pareto_merging.model.copies import check_copies
from pareto_merging.model.learned import lambda_group
from pareto_merging.model.parametrize import constant_size, wants_low_rank
from pareto_merging.model.pieces import widest
from pareto_merging.model.preprocessing import make_preprocess
from pareto_merging.model.stored import Precision, PretrainedWeights, describe_dtypes, percent, summarize_dtypes
from pareto_merging.model.task_vectors import Sources
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.progress import progress_bar

# reading less than this takes no time worth a progress bar
LONG = 1 << 29


@dataclass(frozen=True)
class PlanRow:
    """One kind of memory: how many numbers, how many bytes, and what it is.

    ``dtypes``: that the checkpoints of a row are stored in. ``relative_error``: of the row about rounding.
    """

    kind: str
    parameters: int
    bytes: int
    note: str
    dtypes: dict[str, str] | None = None
    relative_error: float | None = None


def plan_run(workspace: Workspace, progress: bool = False) -> list[PlanRow]:
    """Count what the run holds; activations and the library's own memory are not in it.

    Tensors that turn out equal in all copies store no task vectors, so those rows are upper bounds. Of checkpoints only
    headers are read, except where the run rounds task vectors: what that costs is computed tensor by tensor. Files that
    are not there (where the architecture is given) are no error, but leave that open.
    """
    method, tasks = workspace.config.method, len(workspace.task_configs)
    model = workspace.skeleton(only_shapes=True)
    wide = torch.finfo(torch.float32).bits // 8
    narrow = torch.finfo(workspace.dtype).bits // 8
    named = list(model.named_parameters())
    frozen = sum(p.numel() for _, p in named)
    largest = max(p.numel() for _, p in named)
    buffers = sum(b.numel() for b in model.buffers())
    # the outer products learn no core and have a column for each task
    rank, has_core = (method.rank, True) if method.core == "tensor" else (tasks, False)
    factors, cores, constant = 0, 0, 0
    for name, parameter in named:
        if method.constant_rank and (size := constant_size(model, name, parameter, method.constant_rank)) is not None:
            constant += (size[0] + size[1]) * size[2]
        if parameter.ndim == 2 and wants_low_rank(model, name, method.low_rank):
            factors += rank * sum(parameter.shape)
            cores += rank**2 * tasks if has_core else 0
    lambdas = tasks * len({lambda_group(name, method.granularity) for name, _ in named})
    kept = factors + cores + constant + lambdas
    learned = kept if method.learn_lambda else factors + cores + constant
    rows = [
        ("frozen weights W0", frozen, narrow, "held once"),
        ("buffers", buffers, narrow, "batch-norm statistics and the like"),
        ("task vectors τ", tasks * frozen, narrow, f"K = {tasks}, at most"),
        ("λ", lambdas, wide, f"one vector per {method.granularity}, float32"),
        ("A and B", factors, wide, f"rank {rank}, {method.low_rank}, float32"),
        ("G", cores, wide, "float32"),
        *([("A_c and B_c", constant, wide, f"rank {method.constant_rank}, float32")] if constant else []),
        ("Adam's moments", 2 * learned, wide, "during training"),
        ("gradients of the K tasks", (tasks + 1) * learned, wide, "during training"),
        ("one layer's W(γ) and dW", 2 * largest, narrow, "workspace; a GPU holds one layer at a time"),
    ]
    rows += _kept_weights(workspace, frozen, narrow)
    # a finished run may have an objective that is not registered here
    kind = OBJECTIVES.get(method.objective)
    if kind is not None and kind.has_teachers:
        rows.append(_teacher_row(workspace, model))
    if method.start != "pretrained":
        rows.append(
            (f"base of start {method.start}", frozen, narrow, "on disk, in start.safetensors and the Pareto set file")
        )
    rows.append(("Pareto set file", kept, wide, "on disk"))
    rows.append(("checkpoint", kept + 2 * learned, wide, "on disk, during training"))
    rows.append(("folded file", frozen + buffers, narrow, "on disk, and what a server holds, plus A, B and G"))
    counted = [PlanRow(kind, count, count * size, note) for kind, count, size, note in rows]
    return counted + _precision_rows(workspace, progress)


def _kept_weights(workspace: Workspace, frozen: int, narrow: int) -> list[tuple[str, int, int, str]]:
    """Count the merged weights that a step keeps, where its strategy keeps any."""
    strategy, budget = workspace.config.strategy, workspace.config.memory_budget
    if strategy not in ("auto", "cached") and not (strategy == "eager" and workspace.device.type == "cpu"):
        return []
    if strategy == "cached" and budget is not None and budget < frozen * narrow:
        raise UserError(
            f"memory_budget: expected at least {frozen * narrow} bytes (one more model) for strategy cached, got "
            f"{int(budget)}; auto keeps as much as fits"
        )
    held = frozen if budget is None else min(frozen, int(budget) // narrow)
    limit = "" if budget is None else ", up to memory_budget"
    if budget is None and strategy == "auto" and workspace.device.type == "cuda":
        limit = ", up to half of what is free"
    return [("merged weights of a step", held, narrow, f"kept for its K tasks{limit}")]


def _teacher_row(workspace: Workspace, model: nn.Module) -> tuple[str, int, int, str]:
    """Count what the fine-tuned models say of the images: float16, where it is kept."""
    loss, numbers, unknown = workspace.method.loss, 0, []
    size, width = encoders.image_size(workspace.encoder_description), 0
    if loss.features_weight or loss.objective == "features":
        with torch.no_grad():
            width = model(torch.empty(1, 3, size, size, device="meta")).shape[-1]
    for name, task in workspace.task_configs.items():
        try:
            if task.merging is None:
                raise UserError("no images")
            classes = workspace.head(name).weight.shape[0] if needs_head(loss) else 0
            images = len(open_images(task.merging, workspace.preprocessing))  # type: ignore[arg-type]
            numbers += images * (classes + width)
        except UserError:
            unknown.append(name)
    note = "float16, in memory and in teachers.safetensors" if loss.teacher_outputs != "in-step" else "none is kept"
    if loss.teacher_outputs == "in-step":
        numbers = 0
    if unknown:
        note += f"; not counted: {', '.join(unknown)}, whose images or head are not there"
    return "teachers' outputs", numbers, KEPT_DTYPE.itemsize, note


def _precision_rows(workspace: Workspace, progress: bool) -> list[PlanRow]:
    """Return the dtypes that checkpoints are stored in, and the run's relative error of Σλτ."""
    stored: dict[str, Counter[torch.dtype]] = {}
    missing = []
    for name, source in workspace.sources().items():
        try:
            checkpoint = workspace.checkpoint(source)
        except UserError as error:
            missing.append(str(error))
            continue
        stored[name] = Counter()
        for tensor, shape in checkpoint.shapes.items():
            stored[name][checkpoint.dtypes[tensor]] += math.prod(shape)
    rows = []
    for kind, names in (("pretrained checkpoint", ["pretrained"]), ("fine-tuned checkpoints", workspace.task_names)):
        counted = {name: stored[name] for name in names if name in stored}
        dtypes = {name: describe_dtypes(numbers) for name, numbers in counted.items()}
        note = summarize_dtypes(list(dtypes.values())) if dtypes else ""
        if len(counted) < len(names):
            note = f"{note}; {len(names) - len(counted)} not there" if note else "not there"
        count = sum(numbers.total() for numbers in counted.values())
        rows.append(PlanRow(kind, count, _bytes(counted.values()), f"on disk: {note}", dtypes))
    note = "none"
    loss: float | None = 0.0
    if missing:
        note, loss = f"not known ({missing[0]})", None
    elif widest([workspace.dtype, *(dtype for numbers in stored.values() for dtype in numbers)]) != workspace.dtype:
        with user_errors():
            loss = _rounding(workspace, progress and _bytes(stored.values()) >= LONG).relative_error
        note = percent(loss)
    text = f"relative error of Σλτ in {workspace.config.dtype}: {note}"
    return [*rows, PlanRow("rounding of τ", 0, 0, text, relative_error=loss)]


def _bytes(stored: Iterable[Mapping[torch.dtype, int]]) -> int:
    return sum(count * dtype.itemsize for numbers in stored for dtype, count in numbers.items())


@torch.no_grad()
def _rounding(workspace: Workspace, progress: bool) -> Precision:
    """Make the task vectors of one parameter after another, as the run does."""
    method, model = workspace.config.method, workspace.skeleton()
    stored = workspace.load(workspace.encoder_config.pretrained)
    copies, tensors = check_copies(model, workspace.finetuned())
    parameters = [(names, tensor) for names, tensor in tensors if isinstance(tensor, nn.Parameter)]

    def as_stored(names: Sequence[str], tensor: Tensor) -> Tensor:
        return stored[next(name for name in names if name in stored)]

    apply = make_preprocess(method.preprocess, method.density, method.seed, parameters, copies, as_stored)
    sources = Sources(PretrainedWeights(model), copies, apply)
    with progress_bar("reading", len(parameters), enabled=progress) as advance:
        for number, (names, parameter) in enumerate(parameters, start=1):
            base = as_stored(names, parameter)
            sources.task_vectors(names, base.to(workspace.dtype), base)
            advance(number, names[0])
    return sources.precision
