"""Pareto Merging in closed form: least squares layer by layer, without a step.

The fine-tuned models are at hand, so what each of their layers gives on unlabelled images is known. In forward order
every linear map is solved by ridge regression of the fine-tuned models' own outputs of that map, y, on the inputs u
that the map has in the partly merged model, pulling to RegMean's merge:

    [W b] ← [W b]_start + (Σ_k E_kᵀX_k)(Σ_k X_kᵀX_k + ρI)⁻¹,    X = [u 1],    E = y − X·[W b]_startᵀ    (1)

where ρ is ``ridge`` of the mean diagonal. RegMean's is the same, up to :data:`RIDGE`: where inputs hardly vary its
weights would be as large as they like, and one step of learning in a map before them would undo everything. Where a map
writes into a stream of residuals, y is what the fine-tuned model's stream holds after it minus the merged stream before
it, so that errors are made good further down. Rows of the last block that nothing reads afterwards count
:data:`UNREAD`. Weights and biases of layer norms outside of blocks are solved likewise, channel by channel (within
blocks the maps after them do as much).

The preference-dependent terms come from a chain of each task's own, the model at γ = e_k: with the residuals that (1)
leaves there,

    M_k = (E_kᵀX_k)(X_kᵀX_k + ρI)⁻¹,    X = u    (2)

are written as A·G_k·Bᵀ with shared A and B and Σ_k G_k = 0, so that the equal preference is the base: see
:func:`.tucker.tucker`. (1) is the regression of RegMean (Jin et al.,
ICLR 2023) on the merged model's inputs instead of each fine-tuned model's own.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.errors import UserError
from pareto_merging.methods import regmean
from pareto_merging.methods.chains import Batch, Layout, Piece, cut, float_buffers, streams_on, survey
from pareto_merging.methods.interface import Copies, Merged
from pareto_merging.methods.per_task import check_count, check_number, check_tasks, chosen_images, image_of, to_model
from pareto_merging.methods.sites import (
    NormSums,
    Site,
    Sums,
    affine,
    expert_outputs,
    find_sites,
    merged_inputs,
    rows_of,
)
from pareto_merging.methods.tucker import Factors, tucker
from pareto_merging.model.base import note_base
from pareto_merging.model.copies import check_copies
from pareto_merging.model.fold import merge as merge_at
from pareto_merging.model.learned import set_lambda
from pareto_merging.model.parameters import MergedParameter, merged_parameters
from pareto_merging.model.parametrize import LowRank, parametrize
from pareto_merging.model.state import ParetoState, pareto_state, pareto_states
from pareto_merging.system.modes import eval_mode
from pareto_merging.system.progress import progress_bar

# what a row of the last block counts that nothing reads afterwards; 1 for the others
UNREAD = 0.01
# of RegMean, where the maps begin; the study never chose its published 0.9
ALPHA = 1.0
# of RegMean, at most: more would pull it to the average. From 1e-4 to 1e-2 it makes no difference
RIDGE = 1e-3


def merge_sequential(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    tasks: Mapping[str, Task],
    rank: int = 16,
    low_rank: LowRank = "attention",
    images: int = 400,
    ridge: float = 1e-3,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Merged:
    """Return a model for every preference without a step of learning.

    ``result.pareto`` is the Pareto model, whose base and low-rank terms :func:`start_sequential` solves.

    Args:
        tasks: by task name, unlabelled images (the heads are not run).
        rank, low_rank, settings: of the Pareto model, see :func:`parametrize`.
        images, ridge, batch_size, seed, progress: see :func:`start_sequential`, which says what is raised too.
    """
    model = parametrize(pretrained, finetuned, rank, low_rank, seed=seed, **settings)
    how: dict[str, Any] = {"images": images, "batch_size": batch_size, "seed": seed, "progress": progress}
    facts = start_sequential(model, pretrained, finetuned, tasks, ridge=ridge, **how)
    return Merged(pareto_state(model).task_names, partial(merge_at, model), low_rank != "none", facts, pareto=model)


@torch.no_grad()
def start_sequential(
    model: nn.Module,
    pretrained: nn.Module,
    finetuned: Copies,
    tasks: Mapping[str, Task],
    *,
    images: int = 400,
    ridge: float = 1e-3,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Put the solution of equations 1 and 2 into a Pareto model, in place. Learning can go on from it.

    W0 of every parameter becomes the solved value and every λ 0, so that the base at every preference is W0; A, G and B
    become the Tucker factors. What is no linear map or layer norm gets RegMean's value, the average.

    Memory: beside the models, K copies of one block; XᵀX of one map, for each task where it has a low-rank term; the
    images; and the streams between two blocks of the fine-tuned, the merged and the task's own chain, on the model's
    device where they take less than a quarter of what is free, else in the CPU's memory.

    Args:
        model: made by :func:`parametrize` of the other two. pretrained, finetuned: as for that.
        tasks: by task name, unlabelled images (the heads are not run).
        images: how many of each task, the first of a permutation seeded with ``seed``; all if there are fewer.
        ridge: ρ relative to the mean diagonal; 1e-3 with hundreds of images, 0.1 with sixteen.
        batch_size: images that are in the model at once. Results depend on it by rounding only.

    Returns:
        Plain JSON: ``way`` ("residual" where streams are known, else "plain"), ``block_class``, ``maps`` (how many were
        solved), ``images`` by task, ``ridge``, ``seconds``.

    Raises:
        ValueError: no Pareto model with a learned core; as :func:`parametrize`; tasks that do not match the copies or
            have no images; XᵀX that is singular where ``ridge`` is 0.
        UserError: inputs of a map, or a fine-tuned model's outputs, that are not finite, naming task and map.
    """
    started, ridge = time.monotonic(), check_number("ridge", ridge)
    check_count("batch_size", batch_size)
    state = _check_models(model, pretrained)
    check_tasks(tasks, state.task_names)
    chosen = {name: _images(tasks[name], name, images, seed) for name in state.task_names}
    same: dict[str, Any] = {"images": images, "batch_size": batch_size, "seed": seed, "progress": progress}
    # the tasks' images are read once
    held: dict[str, Any] = {name: Task(items, tasks[name].head) for name, items in chosen.items()}  # type: ignore[arg-type]
    plain = regmean.merge(pretrained, finetuned, tasks=held, alpha=ALPHA, ridge=min(ridge, RIDGE), **same).model()
    for name, buffer in plain.named_buffers():
        buffer.copy_(model.get_buffer(name))
    stored = {parameter.path: parameter for parameter in merged_parameters(model)}
    solver = _Solver(plain, finetuned, {name: _batches(chosen[name], batch_size) for name in chosen}, stored, ridge)
    with eval_mode(plain):
        solver.run(progress)
    _write(model, plain, stored, solver.factors)
    note_base(model, "sequential")
    return {
        **solver.facts(),
        "images": {name: len(items) for name, items in chosen.items()},
        "ridge": ridge,
        "seconds": round(time.monotonic() - started, 2),
    }


def _check_models(model: nn.Module, pretrained: nn.Module) -> ParetoState:
    """Return the state of a Pareto model that can be started. ValueError for other models."""
    state = pareto_state(model)
    if state.folded or state.core != "tensor":
        got = "a folded model" if state.folded else f"core {state.core}"
        raise ValueError(f"model: expected a Pareto model with a learned core, got {got}")
    if pareto_states(pretrained):
        raise ValueError("pretrained: expected a plain module, got a Pareto model")
    return state


def _images(task: Task, name: str, images: int, seed: int) -> list[Tensor]:
    indices = chosen_images(task.images, images, seed, f"task {name}")
    return [image_of(task.images[index]) for index in indices]


def _batches(items: Sequence[Tensor], size: int) -> list[Batch]:
    return [Batch(torch.stack(list(items[start : start + size]))) for start in range(0, len(items), size)]


def _write(
    model: nn.Module, plain: nn.Module, stored: Mapping[str, MergedParameter], factors: Mapping[str, Factors]
) -> None:
    """Put solved weights and factors into a Pareto model; λ becomes 0."""
    for name, value in plain.named_parameters():
        owner, _, attribute = name.rpartition(".")
        weight = model.get_submodule(owner)._parameters[attribute]
        if weight is not None and weight.is_floating_point():
            weight.copy_(value)
    set_lambda(model, torch.zeros(()))
    for name, own in factors.items():
        parameter, (A, G, B) = stored[name], own
        assert parameter.A is not None and parameter.G is not None and parameter.B is not None
        # columns beyond those that can be of use stay as they were drawn, for learning to find some
        parameter.A[:, : A.shape[1]].copy_(A)
        parameter.B[:, : B.shape[1]].copy_(B)
        parameter.G.zero_()[: A.shape[1], : B.shape[1]].copy_(G)


class _Solver:
    """The solution of one problem, piece by piece.

    ``base`` are the weights that are merged so far, in the module ``plain`` itself; ``own`` what differs from them in
    each task's own chain.
    """

    def __init__(
        self,
        plain: nn.Module,
        finetuned: Copies,
        batches: Mapping[str, Sequence[Batch]],
        stored: Mapping[str, MergedParameter],
        ridge: float,
    ) -> None:
        self.plain, self.batches, self.ridge = plain, batches, ridge
        everything = {**dict(plain.named_parameters()), **float_buffers(plain)}
        self.base: dict[str, Tensor] = {name: tensor.detach() for name, tensor in everything.items()}
        self.own: dict[str, dict[str, Tensor]] = {task: {} for task in batches}
        self.copies, tensors = check_copies(plain, finetuned)
        self.aliases = {names[0]: names for names, _ in tensors}
        self.ranks = {name: p.A.shape[1] for name, p in stored.items() if p.A is not None}
        self.factors: dict[str, Factors] = {}
        self.residuals: dict[str, list[tuple[Site, list[Sums]]]] = {}
        self.solved: set[str] = set()
        self.maps = 0
        self.layout = Layout()
        # from the first map of the last block that writes into the stream, rows that are not read count less
        self.is_weighted = False

    def facts(self) -> dict[str, Any]:
        """Return what was done, as plain JSON."""
        way = {"way": "residual", "block_class": self.layout.block_class} if self.layout.residuals else {"way": "plain"}
        return {**way, "maps": self.maps}

    def run(self, progress: bool, *, whole: bool = False) -> None:
        """Solve every site. ``whole``: with one forward of all the model for each, and no streams kept."""
        first = next(iter(self.batches.values()))[0]
        self.layout = survey(self.plain, to_model(first.images[:2], self.plain))
        pieces = cut(self.plain, Layout() if whole else self.layout)
        with progress_bar("closed form", len(pieces), enabled=progress) as advance:
            for index, piece in enumerate(pieces):
                self._solve_piece(piece, is_last=index + 1 == len(pieces))
                advance(index + 1, f"{self.maps} maps")

    def _solve_piece(self, piece: Piece, is_last: bool) -> None:
        experts = {task: self._expert(piece, task) for task in self.batches}
        first = next(iter(self.batches.values()))[0]
        sites = [site for site in find_sites(piece, self.base, first, "base") if self._is_wanted(site)]
        for index, site in enumerate(sites):
            self.is_weighted |= site.rows.name in self.layout.last_writers[:1]
            self._solve_site(piece, site, experts)
            name = site.rows.name
            if name in self.ranks and all(later.rows.name != name for later in sites[index + 1 :]):
                self._factorise(name)
        self.solved |= {name for site in sites for name in (site.rows.name, site.bias) if name is not None}
        if not is_last:
            for task, batches in self.batches.items():
                for batch in batches:
                    self._advance(piece, batch, experts[task], task)

    def _is_wanted(self, site: Site) -> bool:
        inner = tuple(f"{name}." for name in self.layout.blocks)
        return site.rows.name not in self.solved and not (site.is_norm and site.rows.name.startswith(inner))

    def _expert(self, piece: Piece, task: str) -> dict[str, Tensor]:
        """Read the weights of one piece of a fine-tuned model."""
        weights, values = self.copies[task], dict[str, Tensor]()
        for name in (*piece.names.values(), *piece.buffers.values()):
            # a buffer that is in no state dict is the module's own
            own = (weights[alias] for alias in self.aliases.get(name, (name,)) if alias in weights)
            values[name] = next(own, self.base[name])
        return {name: value.detach().to(self.base[name], copy=False) for name, value in values.items()}

    def _advance(self, piece: Piece, batch: Batch, expert: Mapping[str, Tensor], task: str) -> None:
        """Run a piece for all chains of one batch."""
        known, batch.expert_after = batch.expert_after, None
        streams = {"expert": piece(expert, batch, "expert") if known is None else known}
        streams["base"] = piece(self.base, batch, "base")
        if self.factors:
            streams["own"] = piece({**self.base, **self.own[task]}, batch, "own")
        home = streams_on(streams["base"].device, list(itertools.chain(*self.batches.values())), streams["base"], 3)
        batch.streams = {chain: stream.to(home) for chain, stream in streams.items()}
        # as long as no term depends on the preference, the two are one
        batch.streams.setdefault("own", batch.streams["base"])

    def _solve_site(self, piece: Piece, site: Site, experts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Solve equation 1 for one site. Where it has a low-rank term, the sums for equation 2 are kept."""
        sums: Any = None
        own: list[Sums] = []
        for task, batches in self.batches.items():
            chains: dict[str, Mapping[str, Tensor]] = {"base": self.base}
            # as long as no term depends on the preference, the chain of the base is the task's own
            if self._has_low_rank(site) and self.factors:
                chains["own"] = {**self.base, **self.own[task]}
            of_task = {chain: self._sums(site) for chain in chains}
            for batch in batches:
                self._add(piece, site, batch, experts[task], chains, of_task)
            if not all(each.is_finite for each in of_task.values()):
                what = f"finite inputs and fine-tuned outputs of {site.rows.name}"
                raise UserError(f"task {task}: expected {what}, got NaN or inf")
            if self._has_low_rank(site):
                own.append(of_task["own"] if "own" in of_task else of_task["base"].copy())
            sums = of_task["base"] if sums is None else sums.__iadd__(of_task["base"])
        change = self._solve(site, sums)
        for each in own:
            each.without(change)
        if own:
            self.residuals.setdefault(site.rows.name, []).append((site, own))
        self.maps += not site.is_norm

    def _has_low_rank(self, site: Site) -> bool:
        return site.rows.name in self.ranks and not site.is_norm

    def _sums(self, site: Site) -> Any:
        weight, bias = self._affine(site)
        if site.is_norm:
            return NormSums(len(weight), weight.device)
        return Sums.of(len(weight), weight.shape[1] + (bias is not None), weight.device)

    def _affine(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Return a site's merged weight [N, D] (a norm's [D]) and bias. In float32 or wider."""
        name, start, stop, right = site.rows
        weight = self.base[name].t() if right else self.base[name][start:stop]
        wide = torch.promote_types(weight.dtype, torch.float32)
        bias = None if site.bias is None else self.base[site.bias][start:stop].to(wide)
        return weight.to(wide), bias

    def _add(
        self,
        piece: Piece,
        site: Site,
        batch: Batch,
        expert: Mapping[str, Tensor],
        chains: Mapping[str, Mapping[str, Tensor]],
        sums: Mapping[str, Any],
    ) -> None:
        """Add the rows of one batch to the sums of each chain."""
        residual = self.layout.residuals.get(site.rows.name)
        targets = expert_outputs(self.plain, piece, site, expert, batch, residual)
        if residual is not None and residual.at_output:
            batch.expert_after = targets[0]
        swapped = residual is not None and residual.swapped
        weight, bias = self._affine(site)
        for chain, weights in chains.items():
            inputs = merged_inputs(self.plain, piece, site, weights, batch, chain, residual)
            # a bias that is no parameter of its own, a part of one say, stays
            used_bias = bias if site.bias is not None or inputs.bias is None else rows_of(inputs.bias)[0]
            for x, target in zip(inputs.uses, targets, strict=True):
                y = target if inputs.before is None else target - inputs.before
                y = y.transpose(0, 1) if swapped else y
                rows = rows_of(x)
                difference = rows_of(y) - affine(rows, weight, used_bias, site.is_norm)
                if not site.is_norm and bias is not None:
                    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
                sums[chain].add(rows, difference, self._row_weights(x, swapped))

    def _row_weights(self, x: Tensor, swapped: bool) -> Tensor | None:
        """Return [M, 1] for the rows of x, or None where all count the same."""
        read = self.layout.read
        if not self.is_weighted or read is None or x.ndim != read.ndim:
            return None
        read = read.transpose(0, 1) if swapped else read
        if any(own not in (1, size) for own, size in zip(read.shape[:-1], x.shape[:-1], strict=True)):
            return None
        wide = torch.promote_types(x.dtype, torch.float32)
        return read.to(wide).clamp_min(UNREAD).expand(*x.shape[:-1], 1).reshape(-1, 1)

    def _solve(self, site: Site, sums: Any) -> Tensor:
        """Put equation 1's solution into the merged weights. Returns the change [N, D + 1], as rounded."""
        name, start, stop, right = site.rows
        # copies: what is solved is written where they are
        weight, bias = (None if value is None else value.clone() for value in self._affine(site))
        assert weight is not None
        if site.is_norm:
            change, shift = sums.solve(self.ridge)
        else:
            whole = _solved(name, self.ridge, *sums.damped(self.ridge, sums.gram.shape[0]))
            change, shift = (whole, None) if bias is None else (whole[:, :-1], whole[:, -1])
        target = self.base[name].t() if right else self.base[name][start:stop]
        target.copy_(weight + change)
        if site.bias is not None and bias is not None:
            self.base[site.bias][start:stop].copy_(bias + shift)
        after, shifted = self._affine(site)
        change = after.double() - weight
        if site.is_norm or bias is None or shifted is None:
            return change
        return torch.cat([change, (shifted.double() - bias)[:, None]], dim=1)

    def _factorise(self, name: str) -> None:
        """Solve equation 2 for one parameter, and give each task's own chain its weights."""
        parts = self.residuals.pop(name, [])
        if not parts:
            return
        right, size = parts[0][0].rows.right, self._affine(parts[0][0])[0].shape[1]
        base = self.base[name].t() if right else self.base[name]
        maps = torch.zeros(len(self.batches), *base.shape, dtype=torch.float64, device=base.device)
        metrics = torch.zeros(len(self.batches), size, size, dtype=torch.float64, device=base.device)
        for site, sums in parts:
            for k, of_task in enumerate(sums):
                gram, cross = of_task.damped(self.ridge, size)
                rows = slice(None) if right else slice(site.rows.start, site.rows.stop)
                maps[k, rows] = _solved(name, self.ridge, gram, cross)
                # where nothing came in, no direction counts more than another
                metrics[k] += gram if bool(gram.any()) else torch.eye(size, dtype=gram.dtype, device=gram.device)
        # of one task the base is the model itself
        factors = tucker(list(maps), list(metrics), self.ranks[name]) if len(maps) > 1 else None
        if factors is None:
            return
        A, G, B = factors
        for k, task in enumerate(self.batches):
            value = (base + A @ G[:, :, k] @ B.t()).to(base.dtype)
            self.own[task][name] = value.t().contiguous() if right else value
        self.factors[name] = Factors(B, G.transpose(0, 1).contiguous(), A) if right else Factors(A, G, B)


def _solved(name: str, ridge: float, gram: Tensor, cross: Tensor) -> Tensor:
    """Return cross·gram⁻¹, or zero where nothing ever came in."""
    if not bool(gram.any()):
        return torch.zeros_like(cross)
    lower, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        raise ValueError(f"ridge: expected more than {ridge:g}, for the inputs of {name} do not determine it")
    return torch.cholesky_solve(cross.t(), lower).t()
