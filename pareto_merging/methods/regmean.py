"""RegMean: each linear map merged by least squares on its inputs.

Jin et al., "Dataless knowledge fusion", ICLR 2023. For a linear map y = x·Wᵀ, the W whose outputs on all tasks' inputs
are nearest to those of the fine-tuned maps:

    Wᵀ = (Σ_k G_k)⁻¹ Σ_k G_k W_kᵀ,    G_k = X_kᵀ X_k / rows of X_k    (their equation 2)

with X_k the inputs of the map within the k-th fine-tuned model on its task, and the entries of G_k off its diagonal
scaled by α (their section 3.2). Every other tensor (biases, norms, convolutions, embeddings, buffers) is averaged.

We add ε = ridge · (mean diagonal of Σ_k G_k) to the diagonal, pulling to the average W̄, and solve for the difference

    (Σ_k G_k + ε·I)(W − W̄)ᵀ = Σ_k G_k (W_k − W̄)ᵀ

so that equal copies give that copy, whatever the rounding, and input dimensions that never fire give the average.
Unlike the published code, which knows nn.Linear by its hooks, we find each use of a matrix as a linear map in the calls
that the model makes: see :class:`GramRecorder`.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.errors import UserError
from pareto_merging.methods.interface import Copies, Merged, Method, among, on_images, one_model
from pareto_merging.methods.linear_maps import LinearMaps, Rows
from pareto_merging.methods.per_task import check_count, check_number, chosen_images, each_finetuned, image_of, to_model
from pareto_merging.methods.streaming import merge_tensors
from pareto_merging.model.copies import check_copies
from pareto_merging.system.modes import eval_mode
from pareto_merging.system.progress import progress_bar


def merge(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    tasks: Mapping[str, Task],
    alpha: float = 0.9,
    ridge: float = 1e-6,
    images: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Merged:
    """Return the RegMean-merged model; ``linear_maps`` of its facts names what was merged as linear maps.

    Beside the models (pretrained, K copies, result) there are the Grams, one [D, D] in float32 per linear map with D
    inputs, of the task in hand and of all tasks; Σ_k G_k (W_k − W̄), as large as the linear maps in float32; and, until
    the result, a working copy with the weights of task k.

    Args:
        tasks: by task name, unlabelled images (the heads are not run).
        alpha: in [0, 1]. ridge: with 0, inputs that do not determine a map (one that never fires, say) are an
            error, or leave it to rounding.
        images: how many of each task, the first of a permutation seeded with ``seed``; all if there are fewer.

    Raises:
        ValueError: as :func:`parametrize`; tasks that do not match the copies or have no images; a singular Σ_k G_k.
        UserError: inputs of a linear map that are not finite, naming the task.
    """
    alpha, ridge = check_number("alpha", alpha, 1.0), check_number("ridge", ridge)
    check_count("batch_size", batch_size)
    how = {"images": images, "batch_size": batch_size, "seed": seed, "progress": progress}
    grams, changes = _sums(pretrained, finetuned, tasks, alpha, **how)
    for name in list(changes):
        _solve(name, grams, changes[name], ridge)

    def piece(name: str, place: int, base: Tensor, taus: Tensor) -> Tensor:
        average = base + taus.mean(dim=0)
        return average + changes[name].view(-1)[place : place + len(base)] if name in changes else average

    return one_model(merge_tensors(pretrained, finetuned, piece), finetuned, linear_maps=list(changes))


def _sums(
    pretrained: nn.Module, finetuned: Copies, tasks: Mapping[str, Task], alpha: float, **how: Any
) -> tuple[dict[Rows, Tensor], dict[str, Tensor]]:
    """Return Σ_k G_k of each map, and Σ_k (W_k − W̄)·G_k of each parameter. The latter in its own layout."""
    grams: dict[Rows, Tensor] = {}
    changes: dict[str, Tensor] = {}
    copies, _ = check_copies(pretrained, finetuned)
    for task, model, tensors in each_finetuned(pretrained, finetuned, tasks):
        group = {names[0]: names for names, _ in tensors}
        parameters = {names[0]: tensor for names, tensor in tensors if isinstance(tensor, nn.Parameter)}
        of_task = _task_grams(model, GramRecorder(parameters), tasks[task].images, f"task {task}", **how)
        for rows in list(of_task):
            gram = of_task.pop(rows)
            if not bool(torch.isfinite(gram).all()):
                raise UserError(f"task {task}: expected finite inputs of {rows.name}, got NaN or inf")
            diagonal = gram.diagonal().clone()
            gram.mul_(alpha).diagonal().copy_(diagonal)
            values = [next(weights[n] for n in group[rows.name] if n in weights) for weights in copies.values()]
            average = torch.zeros(values[0].shape, dtype=torch.float64, device=gram.device)
            for value in values:
                average += value.detach().to(average)
            difference = values[list(copies).index(task)].detach().to(average) - average.div_(len(values))
            if rows.name not in changes:
                changes[rows.name] = torch.zeros(average.shape, dtype=gram.dtype, device=gram.device)
            if rows.right:
                changes[rows.name] += (gram.double() @ difference).to(gram.dtype)
            else:
                part = slice(rows.start, rows.stop)
                changes[rows.name][part] += (difference[part] @ gram.double()).to(gram.dtype)
            grams[rows] = grams[rows].add_(gram) if rows in grams else gram
    return grams, changes


@torch.no_grad()
def _task_grams(
    model: nn.Module, recorder: "GramRecorder", dataset: Any, name: str, batch_size: int, progress: bool, **which: int
) -> dict[Rows, Tensor]:
    indices = chosen_images(dataset, name=name, **which)
    with eval_mode(model), progress_bar(f"Grams of {name}", len(indices), enabled=progress) as advance:
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            batch = to_model(torch.stack([image_of(dataset[index]) for index in chosen]), model)
            with recorder:
                model(batch)
            advance(start + len(chosen), "")
    return recorder.means()


def _solve(name: str, grams: dict[Rows, Tensor], change: Tensor, ridge: float) -> None:
    """Put W − W̄ in the place of its right-hand side. The Grams of ``name`` are used up."""
    own = {rows: grams.pop(rows) for rows in list(grams) if rows.name == name}
    cuts = sorted({cut for rows in own for cut in (rows.start, rows.stop)})
    # an attention that is fed one input here and several there has Grams for all its rows and for some of them
    for start, stop in itertools.pairwise(cuts):
        covering = [gram for rows, gram in own.items() if rows.start <= start and stop <= rows.stop]
        if not covering:
            continue
        right = next(iter(own)).right
        system = torch.stack(covering).sum(dim=0, dtype=torch.float64) if len(covering) > 1 else covering[0].double()
        mean = system.diagonal().mean()
        if not bool(mean > 0):
            # nothing ever came in
            continue
        system.diagonal().add_(ridge * mean)
        target = change if right else change[start:stop].t()
        solved, info = torch.linalg.solve_ex(system, target.double())
        if int(info):
            raise ValueError(f"ridge: expected more than {ridge:g}, for the inputs of {name} do not determine it")
        target.copy_(solved)


class GramRecorder(LinearMaps):
    """A mode that adds up XᵀX of the inputs of every linear map.

    Of a parameter used several times all inputs count. If it is used in other ways too (an embedding, say), these do
    not; nor does ``x @ P`` where there is an F.linear. An attention whose queries, keys and values come from several
    tensors has one Gram each; where it also has uses with a single one, each kind is averaged over its rows first.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(parameters)
        self._grams: dict[Rows, Tensor] = {}
        self._counts: dict[Rows, int] = {}

    def means(self) -> dict[Rows, Tensor]:
        """Return XᵀX / rows of each map, and forget it. In float32, or float64 for float64 inputs."""
        linear = {rows.name for rows in self._grams if not rows.right}
        kept = [rows for rows in self._grams if not rows.right or rows.name not in linear]
        means = {rows: self._grams[rows].div_(self._counts[rows]) for rows in kept}
        self._grams, self._counts = {}, {}
        return means

    def use(self, rows: Rows, x: Tensor, bias: Tensor | None, output: Callable[[], Tensor]) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if rows not in self._grams:
                wide = torch.promote_types(flat.dtype, torch.float32)
                self._grams[rows] = torch.zeros(flat.shape[1], flat.shape[1], dtype=wide, device=flat.device)
            flat = flat.to(self._grams[rows].dtype)
            self._grams[rows].addmm_(flat.t(), flat)
        self._counts[rows] = self._counts.get(rows, 0) + len(flat)


METHOD = Method("regmean", "RegMean", "images", on_images(merge), among("alpha", 0.9, 0.5, 1.0, 0.1))
