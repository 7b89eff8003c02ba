"""The task vectors of one parameter: W_k − W0 as stored, rounded once."""

import contextlib
import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pareto_merging.model.copies import LazyTensors, names_in, read_tensor, tensor_of
from pareto_merging.model.digests import TensorDigest, tensor_digest
from pareto_merging.model.pieces import extremes, pieces_of, widest
from pareto_merging.model.preprocessing import Preprocess
from pareto_merging.model.stored import Precision, PretrainedWeights, holds

# from this many numbers on, a tensor that was read and let go leaves memory worth giving back
LARGE = 1 << 17


def give_back_free_memory(size: int) -> None:
    """Give the operating system what glibc keeps of a freed tensor of ``size`` numbers.

    Its heap keeps a hole wherever a tensor that was read lay below one that stays, which came to tens of megabytes for
    a model of 12 million parameters. Nothing but the resident memory of the process changes.
    """
    # another C library has no such function
    with contextlib.suppress(AttributeError, OSError, TypeError):
        if size >= LARGE:
            ctypes.CDLL(None).malloc_trim(0)


@dataclass
class Sources:
    """The weights that task vectors are made of, and notes on them. ``preprocess`` is what is done to task vectors.

    ``precision`` counts dtypes and what rounding costs; ``hashers`` are digests of ``pretrained`` and each task, none
    where nobody asked for them.
    """

    pretrained: PretrainedWeights
    copies: Mapping[str, Mapping[str, Tensor]]
    preprocess: Preprocess | None = None
    precision: Precision = field(default_factory=Precision)
    hashers: Mapping[str, TensorDigest] = field(default_factory=dict)

    def task_vectors(self, names: Sequence[str], weight: Tensor, base: Tensor) -> Tensor | None:
        """Return τ of one parameter, [K, *shape] as ``weight``; None where they are all zero.

        ``names``: all that it has. ``weight``, ``base``: in the module, whose dtype and device τ gets, and as stored.
        """
        if not weight.is_floating_point():
            for task in self.copies:
                self._subtract(names, weight, task, None)
            return None
        dtype = weight.dtype
        if self.preprocess is not None:
            # what is compared with a threshold is not rounded to 16 bits before
            dtypes = (tensor_of(copy, names_in(names, copy)[0], task).dtype for task, copy in self.copies.items())
            dtype = widest([dtype, base.dtype, *dtypes])
        shape, is_zero = (len(self.copies), *weight.shape), True
        task_vectors = torch.empty(shape, dtype=dtype, device=weight.device)
        differences = Differences(base, task_vectors)
        for number, (task, weights) in enumerate(self.copies.items()):
            self._subtract(names, weight, task, differences)
            if isinstance(weights, LazyTensors):
                give_back_free_memory(weight.numel())
            low, high = extremes(task_vectors[number])
            if not math.isfinite(low) or not math.isfinite(high):
                where = f"{names[0]} of {task} minus pretrained"
                raise ValueError(f"finetuned: expected finite numbers in {where}, got NaN or inf")
            is_zero = is_zero and low == high == 0
        differences.add_to(self.precision)
        if self.preprocess is not None:
            return _preprocessed(self.preprocess, names[0], task_vectors, weight, self.precision)
        return None if is_zero else task_vectors

    def _subtract(self, names: Sequence[str], weight: Tensor, task: str, target: "Differences | None") -> None:
        """Write one parameter of one copy minus W0 to ``target``. Without one there is no difference.

        What was read is let go on return. Raises ValueError for another shape than that of ``weight``, names tied in
        the model that differ in the copy, and a parameter without a task vector that is not that of the model.
        """
        weights, hasher = self.copies[task], self.hashers.get(task)
        present = names_in(names, weights)
        value, weight = read_tensor(weights, present[0], task, weight), weight.detach()
        self.precision.count(task, value.dtype, value.numel())
        # what a dict has is in memory anyway
        by_digest = len(present) > 1 and isinstance(weights, LazyTensors)
        digest = tensor_digest(value) if hasher is not None or by_digest else ""
        if hasher is not None:
            hasher.parts[names[0]] = digest
        if target is not None:
            target.write(value)
        elif not _equal(value, weight):
            raise ValueError(f"finetuned: {names[0]} is {weight.dtype} and differs in {task}, expected it unchanged")
        del value
        for other in present[1:]:
            # in a lazy mapping two of them are held only where the bits differ, which may still be the same numbers
            # (-0.0)
            if by_digest and tensor_digest(read_tensor(weights, other, task, weight)) == digest:
                continue
            if not _equal(read_tensor(weights, other, task, weight), read_tensor(weights, present[0], task, weight)):
                raise ValueError(f"finetuned: {present[0]} and {other} are tied in pretrained but differ in {task}")


def _equal(value: Tensor, other: Tensor) -> bool:
    return all(torch.equal(value[index].to(other.device), other[index]) for index in pieces_of(other.shape))


def _preprocessed(
    preprocess: Preprocess, name: str, task_vectors: Tensor, weight: Tensor, precision: Precision
) -> Tensor | None:
    """Preprocess task vectors, and round them to the device and dtype of ``weight``. None if all are zero.

    The result has memory of its own for every number. What rounding costs is counted.
    """
    exact = preprocess(name, task_vectors)
    if not isinstance(exact, Tensor) or exact.shape != task_vectors.shape:
        got = list(exact.shape) if isinstance(exact, Tensor) else type(exact).__name__
        raise ValueError(f"preprocess: expected task vectors of shape {list(task_vectors.shape)} for {name}, got {got}")
    exact = exact.detach()
    result = exact.to(weight).contiguous()
    if not holds(result.dtype, exact.dtype):
        for index in pieces_of(result.shape[1:]):
            error, total = (torch.zeros_like(exact[0][index]) for _ in range(2))
            for wide, narrow in zip(exact, result, strict=True):
                error += narrow[index].to(wide).sub_(wide[index])
                total += wide[index]
            precision.add(error, total)
    low, high = extremes(result)
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"preprocess: expected finite task vectors for {name}, got NaN or inf")
    return None if low == high == 0 else result


# pieces of a megabyte in float32 are cut into as many, for there are some temporaries of each
PARTS = 4


class Differences:
    """The task vectors of one parameter, [K, *shape]: written one after another, each rounded once.

    Where they are rounded, the sum of what that changed is kept in bfloat16.
    """

    def __init__(self, base: Tensor, task_vectors: Tensor) -> None:
        self.base, self.task_vectors = base, task_vectors
        self._rounding: Tensor | None = None
        self._places = iter(task_vectors)

    def write(self, value: Tensor) -> None:
        """Put ``value`` − W0 into the next task vector."""
        task_vector, base = next(self._places), self.base
        wide = widest(tensor.dtype for tensor in (task_vector, base, value))
        is_exact = wide == task_vector.dtype
        if not is_exact and self._rounding is None:
            # 8 bits of each number give the norm of the sum to a hundred-thousandth
            self._rounding = torch.zeros_like(task_vector, dtype=torch.bfloat16)
        for index in pieces_of(base.shape, PARTS):
            operands = (tensor[index].to(task_vector.device, wide) for tensor in (value, base))
            if is_exact or self._rounding is None:
                torch.sub(*operands, out=task_vector[index])
                continue
            exact = torch.sub(*operands)
            task_vector[index] = exact
            self._rounding[index] += task_vector[index].to(wide).sub_(exact)

    def add_to(self, precision: Precision) -> None:
        """Count what rounding cost, after the last task vector."""
        if self._rounding is not None:
            for index in pieces_of(self.base.shape, PARTS):
                error = self._rounding[index].to(widest([self.task_vectors.dtype]))
                total = -error
                for task_vector in self.task_vectors:
                    total += task_vector[index]
                precision.add(error, total)
