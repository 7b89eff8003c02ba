"""Preprocessing of task vectors: TIES's trimming and sign election, DARE's dropping.

A preprocessing is a function of one parameter's name and its K task vectors [K, *shape] (float32, or float64) that
returns K others of the same shape. :func:`pareto_merging.parametrize` takes any such function.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pareto_merging.model.pieces import flat_pieces, pieces_of, widest

Preprocess: TypeAlias = Callable[[str, Tensor], Tensor]
PreprocessName: TypeAlias = Literal["none", "ties", "dare"]
PREPROCESS_NAMES: tuple[str, ...] = ("none", "ties", "dare")
# (all names of a tensor of a module, the tensor) -> it as it is stored: see pareto_merging.model.stored
AsStored: TypeAlias = Callable[[Sequence[str], Tensor], Tensor]


def check_density(density: Any, name: str = "density") -> float:
    """Return ``density`` as a number in (0, 1]; ValueError otherwise."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"{name}: expected a share of the entries in (0, 1], got {density!r}")
    return float(density)


def trim_threshold(pieces: Callable[[], Iterator[Tensor]], density: float, task: str = "a task") -> float:
    """Find the magnitude from which an entry belongs to the largest ``density`` share.

    That is the k-th largest, k = ⌊density·n⌋ and at least 1; 0 for a vector without entries. It is over the whole task
    vector, not tensor by tensor, and exact: the bits of a non-negative float order as whole numbers, so sixteen of them
    at a time are counted and narrowed down, without ever holding or sorting the vector. ``pieces`` gives it in pieces,
    anew at each call (three calls, five in float64). Raises ValueError for NaN or inf in the task vector, naming
    ``task``.
    """
    total, is_double = 0, False
    for piece in pieces():
        if not bool(torch.isfinite(piece).all()):
            raise ValueError(f"finetuned: expected finite numbers in {task} minus pretrained, got NaN or inf")
        total += piece.numel()
        is_double |= piece.dtype == torch.float64
    if not total:
        return 0.0
    remaining = max(1, int(density * total))
    integer, float_type, bits = (torch.int64, torch.float64, 64) if is_double else (torch.int32, torch.float32, 32)
    prefix = 0
    for shift in range(bits - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for piece in pieces():
            values = piece.abs().to(float_type).view(integer)
            if shift < bits - 16:
                values = values[(values >> (shift + 16)) == prefix]
            counts += torch.bincount((values >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        # how many lie in each bin or above
        above = counts.flip(0).cumsum(0).flip(0)
        chosen = int((above >= remaining).nonzero().max())
        remaining -= int(above[chosen] - counts[chosen])
        prefix = (prefix << 16) | chosen
    return float(torch.tensor([prefix], dtype=integer).view(float_type))


def elect_sign(task_vectors: Tensor) -> Tensor:
    """Return the sign of each entry's sum over the tasks, [K, *] -> [*]. It is 0 where the sum is exactly 0.

    The published code gives such an entry the sign of the majority of all entries; the paper does not.
    """
    return task_vectors.sum(dim=0).sign()


class Ties:
    """TIES's first two steps: trim, then keep what has the elected sign. Yadav et al., NeurIPS 2023, algorithm 1.

    ``thresholds`` has one magnitude per task (:func:`trim_threshold`); entries below it are trimmed.
    """

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = tuple(thresholds)

    @classmethod
    def of(
        cls,
        base: Sequence[tuple[Sequence[str], Tensor]],
        copies: Mapping[str, Mapping[str, Tensor]],
        density: float,
        as_stored: AsStored = lambda names, tensor: tensor,
    ) -> "Ties":
        """Find the thresholds of K copies. ``base``: (all names, tensor) of each parameter; ``as_stored`` reads it."""
        check_density(density)
        kept = [(names, tensor) for names, tensor in base if tensor.is_floating_point()]

        def value(names: Sequence[str], weights: Mapping[str, Tensor]) -> Tensor:
            return weights[next(name for name in names if name in weights)].detach()

        # that of all copies together, in which the differences are compared with the thresholds later; a lazy mapping
        # reads a tensor for each, and none is held while the next is read
        wide = [
            widest([as_stored(names, tensor).dtype, *(value(names, copy).dtype for copy in copies.values())])
            for names, tensor in kept
        ]

        def differences(weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
            for (names, tensor), dtype in zip(kept, wide, strict=True):
                stored, tuned = as_stored(names, tensor).detach(), value(names, weights)
                for index in pieces_of(stored.shape):
                    piece = stored[index].to(dtype)
                    yield (tuned[index].to(piece.device, dtype) - piece).reshape(-1)
                # before the next are read
                del stored, tuned

        return cls([trim_threshold(partial(differences, copies[task]), density, task) for task in copies])

    def trim(self, task_vectors: Tensor) -> Tensor:
        """Set the entries of [K, *] below each task's threshold to 0."""
        limits = torch.tensor(self.thresholds, dtype=task_vectors.dtype, device=task_vectors.device)
        return torch.where(task_vectors.abs() >= limits.view(-1, *[1] * (task_vectors.ndim - 1)), task_vectors, 0.0)

    def __call__(self, name: str, task_vectors: Tensor) -> Tensor:
        trimmed = self.trim(task_vectors)
        return torch.where(trimmed.sign() == elect_sign(trimmed), trimmed, 0.0)


class Dare:
    """Drop And REscale: each entry is kept with probability ``density`` and divided by it. Yu et al., ICML 2024.

    The draws depend on the seed, the parameter's name, the task and the place within it: the same on every device,
    and the same as those of :mod:`pareto_merging.methods.dare`.
    """

    def __init__(self, density: float, seed: int = 0) -> None:
        self.density, self.seed = check_density(density), seed

    def __call__(self, name: str, task_vectors: Tensor) -> Tensor:
        if self.density == 1:
            return task_vectors
        kept = torch.empty_like(task_vectors, memory_format=torch.contiguous_format)
        for task, (tau, result) in enumerate(zip(task_vectors, kept, strict=True)):
            generator = dare_generator(self.seed, name, task)
            for piece, out in zip(flat_pieces(tau), flat_pieces(result), strict=True):
                mask = dare_mask(len(piece), self.density, generator).to(piece)
                torch.mul(piece, mask, out=out).div_(self.density)
        return kept


def dare_generator(seed: int, name: str, task: int) -> torch.Generator:
    """Return what draws the masks of one tensor of one task, piece after piece."""
    # torch's CPU generator looks at 32 bits of its seed; the 0 keeps the draws of earlier files
    return torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed} {name} {task} 0".encode()))


def dare_mask(size: int, density: float, generator: torch.Generator) -> Tensor:
    """Draw which of the next ``size`` entries DARE keeps. 0 and 1 in float32 on the CPU."""
    return (torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") < density).float()


def make_preprocess(
    name: str,
    density: float,
    seed: int,
    base: Sequence[tuple[Sequence[str], Tensor]],
    copies: Mapping[str, Mapping[str, Tensor]],
    as_stored: AsStored = lambda names, tensor: tensor,
) -> Preprocess | None:
    """Make the preprocessing called ``name``. TIES looks at all copies once for its thresholds, as :meth:`Ties.of`."""
    if name == "none":
        return None
    if name == "ties":
        return Ties.of(base, copies, density, as_stored)
    if name == "dare":
        return Dare(density, seed)
    raise ValueError(f"preprocess: expected {', '.join(PREPROCESS_NAMES)} or a function, got {name!r}")
