"""The cost of a layer: operations, bytes, and seconds on a GPU of known rates.

Three uses: the choice of a strategy where nothing was measured (:func:`pmkernels.strategies.choose`), the bounds that
benchmarks report beside a time, and predictions for a GPU that is not at hand. The rates of :data:`GPUS` are what large
products and copies reach, about 0.8 of the vendor's tensor-core figure and 0.9 of its bandwidth (of the A6000, as in
the design, all of them), unless a tuned configuration file brings measured ones. The share that a kernel reaches of
them is a matter of its form; all such shares stand in :data:`FORMS`. A predicted time is a prediction: it is never
reported as a measurement.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

OPERATIONS = ("forward", "dx", "weight_grad", "merge", "preference")


@dataclass(frozen=True)
class Rates:
    """What one GPU does in a second: tensor-core operations by type, plain ones, bytes.

    ``memory`` and ``cache`` are bytes per second from device memory and from the L2 cache, ``launch`` the seconds that
    a kernel costs besides its work, inside a CUDA graph. ``measured``: from a tuned configuration file.
    """

    half: float
    tf32: float
    float32: float
    memory: float
    cache: float
    cache_bytes: float
    multiprocessors: int
    launch: float = 2e-6
    measured: bool = False

    def products(self, kind: str) -> float:
        """Return the operations of a matrix product per second; ``kind`` is ``16-bit``, ``tf32`` or ``float32``."""
        return {"16-bit": self.half, "tf32": self.tf32, "float32": self.float32}[kind]


def _rates(half: float, tf32: float, plain: float, memory: float, cache: float, megabytes: float, sms: int) -> Rates:
    half, tf32, plain = (0.8 * rate * 1e12 for rate in (half, tf32, plain))
    return Rates(half, tf32, plain, memory * 1e12, cache * 1e12, megabytes * 1e6, sms)


# vendor's dense TFLOP/s (16-bit with float32 sums, TF32, float32), TB/s reached, L2 TB/s (estimated), L2 MB, SMs
GPUS: dict[str, Rates] = {
    "nvidia-h200": replace(_rates(989, 494, 67, 4.3, 7.0, 50, 132), half=790e12),
    "nvidia-h100-80gb-hbm3": _rates(989, 494, 67, 3.0, 7.0, 50, 132),
    "nvidia-h100-pcie": _rates(756, 378, 51, 1.8, 5.5, 50, 114),
    "nvidia-h800": _rates(989, 494, 67, 3.0, 7.0, 50, 132),
    "nvidia-a100-sxm4-80gb": _rates(312, 156, 19.5, 1.83, 4.0, 40, 108),
    "nvidia-a100-sxm4-40gb": _rates(312, 156, 19.5, 1.4, 4.0, 40, 108),
    "nvidia-a100-80gb-pcie": _rates(312, 156, 19.5, 1.74, 4.0, 40, 108),
    "nvidia-rtx-a6000": replace(_rates(155, 77, 38.7, 0.768, 2.2, 6, 84), half=155e12),
    "nvidia-geforce-rtx-3090": _rates(71, 35.6, 35.6, 0.84, 2.0, 6, 82),
    "nvidia-l40s": _rates(362, 183, 91.6, 0.78, 4.0, 96, 142),
    "nvidia-rtx-6000-ada-generation": _rates(364, 182, 91.1, 0.86, 4.0, 96, 142),
    "nvidia-geforce-rtx-4090": _rates(165, 82.6, 82.6, 0.91, 4.0, 72, 128),
}


def estimate(multiprocessors: int, capability: tuple[int, int]) -> Rates:
    """Estimate the rates of an unlisted GPU, by multiprocessors, from the nearest architecture."""
    near = {8: "nvidia-a100-80gb-pcie", 9: "nvidia-h100-pcie"}
    listed = "nvidia-l40s" if capability == (8, 9) else "nvidia-rtx-a6000" if capability == (8, 6) else None
    like = GPUS[listed or near.get(capability[0], "nvidia-h100-pcie")]
    share = multiprocessors / like.multiprocessors
    scaled = {name: share * getattr(like, name) for name in ("half", "tf32", "float32", "memory", "cache")}
    return replace(like, **scaled, multiprocessors=multiprocessors)


@dataclass(frozen=True)
class Form:
    """The shares of a GPU's rates that kernels of one form reach, and their source.

    ``product_efficiency``: of the tensor cores' rate. ``memory_efficiency``: of the bytes per second, from memory or
    L2. ``alone``: one program fills a multiprocessor, so a last wave of a few programs takes as long as a full one.
    """

    product_efficiency: float
    memory_efficiency: float
    source: str
    alone: bool = False


# every share of a rate that a prediction takes; one is replaced when a results file says what is reached
FORMS: dict[str, Form] = {
    "library product": Form(
        1.0, 1.0, "by definition: the rates are those of the library's large products and of copies"
    ),
    "attention": Form(0.5, 1.0, "assumed until measured: flash attention with heads of 64 on Hopper"),
    "tensor by tensor": Form(
        1.0, 0.9, "assumed until measured: a normalisation, an activation or a sum of two tensors"
    ),
    "merge": Form(1.0, 0.9, "assumed until measured: all tiles of W0 and τ are loaded before the first is used"),
    "reduction": Form(
        1.0, 0.55, "assumed until measured, the middle of 45–65 %: one τ at a time is loaded, waited for and reduced"
    ),
    "partial sums": Form(1.0, 0.9, "assumed until measured: a few programs, each adds its parts in a fixed order"),
    "column sums": Form(1.0, 0.8, "assumed until measured: the library's sum over rows"),
    "widen": Form(1.0, 0.9, "assumed until measured: a pipeline of tiles that are loaded, stored and multiplied"),
    "assembly in the product": Form(0.7, 0.9, "assumed until measured: tiles of W are put together between products"),
    "product with t": Form(0.7, 1.0, "assumed until measured: one pipeline of tiles for W·xᵀ and Bᵀxᵀ"),
    "dW from rows": Form(0.7, 1.0, "assumed until measured: a pipeline of tiles; 242 registers a thread", alone=True),
}

# rows of a program that writes [x | t]
WIDEN_ROWS = 32
# elements of P or Q that a program of the partial sums adds
SUM_BLOCK = 1024


@dataclass(frozen=True)
class Problem:
    """One operation of one layer.

    ``kind`` is ``16-bit``, ``tf32`` or ``float32``; ``per_row``: a preference per row, so of the low-rank terms only
    the constant one, of ``constant`` of the ``rank`` columns, is part of the merged weight; ``bias``: its gradient is
    wanted with the weight's. ``dx`` is counted with the roles of n and d exchanged.
    """

    rows: int
    n: int
    d: int
    tasks: int
    rank: int
    kind: str = "16-bit"
    per_row: bool = False
    bias: bool = False
    constant: int = 0

    @property
    def merged_rank(self) -> int:
        """Return the rank of what is merged into the weight, and reduced from its gradient."""
        return self.constant if self.per_row else self.rank

    @property
    def size(self) -> int:
        """Return the bytes of one element."""
        return 2 if self.kind == "16-bit" else 4

    @property
    def product(self) -> float:
        """Return the operations of one product of this layer: 2·M·N·D."""
        return 2.0 * self.rows * self.n * self.d

    @property
    def factors(self) -> float:
        """Return the bytes of A and B in the model's type."""
        return float(self.rank * (self.n + self.d) * self.size)

    @property
    def weight(self) -> float:
        """Return the bytes of one weight."""
        return float(self.n * self.d * self.size)

    @property
    def activations(self) -> float:
        """Return the bytes of x and y together."""
        return float(self.rows * (self.n + self.d) * self.size)

    @property
    def output(self) -> float:
        """Return the bytes of y, or of dy."""
        return float(self.rows * self.n * self.size)

    def partials(self, block_n: int, block_d: int, splits: int = 1) -> float:
        """Return the bytes of the partial sums of P, Q and dλ. The rank is padded."""
        blocks_n, blocks_d = math.ceil(self.n / block_n), math.ceil(self.d / block_d)
        rank = 16 * math.ceil(self.merged_rank / 16)
        return 4.0 * splits * (rank * (blocks_d * self.n + blocks_n * self.d) + blocks_n * blocks_d * self.tasks)


@dataclass(frozen=True)
class Pass:
    """One kernel: tensor-core operations, plain float32 operations, bytes of device memory and through L2.

    ``form``: a key of :data:`FORMS`. ``programs``: where they are fewer than the multiprocessors they have a share of
    the rates; 0: enough. ``launches``: 0 for a part of a kernel that runs after its other parts and not beside them.
    """

    name: str
    products: float = 0.0
    simple: float = 0.0
    memory: float = 0.0
    cache: float = 0.0
    form: str = "library product"
    programs: int = 0
    launches: int = 1

    def seconds(self, rates: Rates, kind: str) -> float:
        """Return the longest of its four times, and its launches."""
        form = FORMS[self.form]
        idle = max(1.0, rates.multiprocessors / self.programs) if self.programs else 1.0
        waves = idle
        if self.programs and form.alone:
            waves = math.ceil(self.programs / rates.multiprocessors) * rates.multiprocessors / self.programs
        longest = max(
            waves * self.products / (form.product_efficiency * rates.products(kind)),
            idle * self.simple / rates.float32,
            idle * self.memory / (form.memory_efficiency * rates.memory),
            idle * self.cache / (form.memory_efficiency * rates.cache),
        )
        return longest + self.launches * rates.launch


@dataclass(frozen=True)
class Bound:
    """The fewest operations and bytes of an operation, however it is computed."""

    operations: float
    bytes: float

    def seconds(self, rates: Rates, kind: str) -> float:
        """Return the larger of two times: no kernel is faster on such a GPU."""
        return max(self.operations / rates.products(kind), self.bytes / rates.memory)


def bound(operation: str, problem: Problem, *, cached: bool = False) -> Bound:
    """Count what ``operation`` cannot do without: each input read once, each output written once.

    ``cached``: W(γ) is there already and is read instead of W0 and the task vectors.
    """
    p = problem
    if operation == "merge":
        return Bound(0.0, (p.tasks + 2) * p.weight)
    if operation == "weight_grad":
        return Bound(p.product, p.tasks * p.weight + p.activations)
    if operation in ("forward", "dx"):
        return Bound(p.product, (1 if cached else p.tasks + 1) * p.weight + p.activations)
    if operation == "preference":
        # x·B and t·Aᵀ for every row besides
        return Bound(p.product + 2.0 * p.rows * p.rank * (p.n + p.d), p.weight + p.factors + p.activations)
    raise _unknown(operation)


def served_seconds(problem: Problem, operations: float, bandwidth: float) -> float:
    """Return the bound of ``preference``, with x read once more: Bᵀx comes before t·Aᵀ."""
    least, x = bound("preference", problem), problem.rows * problem.d * problem.size
    return max(least.operations / operations, least.bytes / bandwidth) + x / bandwidth


def from_memory(again: float, touched: float, cache_bytes: float) -> float:
    """Return the bytes of ``again`` for which L2 has no room beside ``touched``."""
    return 0.0 if 2 * touched <= cache_bytes else again


def _partial_sums(p: Problem, partial: float, cache_bytes: float) -> list[Pass]:
    """Count the sums of P, Q and dλ: partial ones read again, in one launch."""
    if not partial:
        return []
    blocks = sum(math.ceil(16 * math.ceil(p.merged_rank / 16) * size / SUM_BLOCK) for size in (p.n, p.d))
    memory = from_memory(partial, partial, cache_bytes)
    return [Pass("partial sums", memory=memory, cache=partial, form="partial sums", programs=1 + blocks)]


def bias_sums(p: Problem, cache_bytes: float) -> list[Pass]:
    """Count db = Σ dy by the library, which reads dy once more."""
    if not p.bias:
        return []
    touched = p.activations + (p.tasks + 1) * p.weight
    sums = Pass("column sums", memory=from_memory(p.output, touched, cache_bytes), cache=p.output, form="column sums")
    return [sums, *_casts(p)]


def _casts(p: Problem) -> list[Pass]:
    """Count the cast of db to 16 bits: a launch, and hardly any bytes."""
    return [Pass("cast of db")] if p.bias and p.size == 2 else []


class Tiles(NamedTuple):
    """Tile sizes and parts of a kernel's configuration, and the L2 cache beside it.

    What a kernel reads again comes from L2 if it takes, with all that was touched since, half of ``cache_bytes`` or
    less.
    """

    block_m: int = 128
    block_n: int = 64
    block_d: int = 128
    splits: int = 1
    cache_bytes: float = 0.0


DEFAULT_TILES = Tiles()


def product(p: Problem) -> list[Pass]:
    """Count the library's product with a weight that is there."""
    return [Pass("product", products=p.product, memory=p.weight + p.activations)]


def _assembly(p: Problem) -> float:
    # an element of τ is converted and multiplied, one of the low-rank term multiplied for each r
    return p.n * p.d * (4.0 * p.tasks + 2.0 * p.merged_rank)


def _merge(p: Problem) -> Pass:
    return Pass("merge", simple=_assembly(p), memory=(p.tasks + 2) * p.weight, form="merge")


def fused(operation: str, p: Problem, tiles: Tiles = DEFAULT_TILES) -> list[Pass]:
    """Count kernels that assemble W, or form dW, by tiles; products of r columns aside."""
    if operation == "merge":
        return [_merge(p)]
    if operation == "weight_grad":
        return _reduced_from_rows(p, tiles)
    if operation not in OPERATIONS:
        raise _unknown(operation)
    row_blocks = math.ceil(p.rows / tiles.block_m)
    n, d = (p.d, p.n) if operation == "dx" else (p.n, p.d)
    blocks_n = math.ceil(n / tiles.block_n)
    partial = 4.0 * tiles.splits * p.rows * n if tiles.splits > 1 else 0.0
    rows, x = row_blocks * tiles.block_m, float(p.rows * d * p.size)
    if operation == "preference":
        products, form = 2.0 * rows * d * (n + blocks_n * p.rank), "product with t"
        memory, cache = p.weight + p.factors + p.activations + partial, row_blocks * p.weight + blocks_n * x
        programs = row_blocks * blocks_n * tiles.splits
        kernel = Pass("fused", products=products, memory=memory, cache=cache, form=form, programs=programs)
    else:
        read, form = (p.tasks + 1) * p.weight, "assembly in the product"
        products, simple = 2.0 * rows * p.n * p.d, row_blocks * _assembly(p)
        memory, cache = read + p.activations + partial, row_blocks * read + blocks_n * x
        kernel = Pass("fused", products=products, simple=simple, memory=memory, cache=cache, form=form)
    return [kernel, Pass("sum", memory=partial)] if tiles.splits > 1 else [kernel]


def _reduced_from_rows(p: Problem, tiles: Tiles) -> list[Pass]:
    blocks_n, blocks_d = math.ceil(p.n / tiles.block_n), math.ceil(p.d / tiles.block_d)
    task_vectors, partial = p.tasks * p.weight, p.partials(tiles.block_n, tiles.block_d, tiles.splits)
    # programs of their own read dy once more for db
    bias = p.output if p.bias else 0.0
    memory, cache = p.activations + bias, (blocks_n * p.rows * p.d + blocks_d * p.rows * p.n) * p.size + bias
    programs, form = blocks_n * blocks_d * tiles.splits, "dW from rows"
    from_rows = Pass(form, products=p.product, memory=memory, cache=cache, form=form, programs=programs)
    simple, memory = tiles.splits * 4.0 * p.n * p.d * p.tasks, task_vectors + partial
    cache = tiles.splits * task_vectors
    epilogue = Pass("reduction", simple=simple, memory=memory, cache=cache, form="reduction", launches=0)
    return [from_rows, epilogue, *_partial_sums(p, partial, tiles.cache_bytes), *_casts(p)]


def streamed(operation: str, p: Problem, tiles: Tiles = DEFAULT_TILES) -> list[Pass]:
    """Count the library's product and what merges its weight, or reduces dW with ``tiles``."""
    (gemm,), again = product(p), from_memory(p.weight, p.weight, tiles.cache_bytes)
    if operation == "merge":
        return [_merge(p)]
    if operation in ("forward", "dx"):
        merged = p.tasks or p.merged_rank
        return [_merge(p), replace(gemm, memory=again + p.activations)] if merged else [gemm]
    if operation == "preference":
        x, wide = float(p.rows * p.d * p.size), float(p.rows * (p.d + p.rank) * p.size)
        kept = from_memory(wide, wide, tiles.cache_bytes)
        longer = p.product * (p.d + p.rank) / p.d
        products, programs = 2.0 * p.rows * p.rank * p.d, math.ceil(p.rows / WIDEN_ROWS)
        return [
            Pass("widen", products=products, memory=x + wide, form="widen", programs=programs),
            Pass("product", products=longer, memory=p.weight + p.factors + kept + p.output),
        ]
    if operation != "weight_grad":
        raise _unknown(operation)
    task_vectors, partial = p.tasks * p.weight, p.partials(tiles.block_n, tiles.block_d)
    memory, cache = task_vectors + again + partial, task_vectors + p.weight
    reduction = Pass("reduction", simple=4.0 * p.n * p.d * p.tasks, memory=memory, cache=cache, form="reduction")
    return [gemm, reduction, *_partial_sums(p, partial, tiles.cache_bytes), *bias_sums(p, tiles.cache_bytes)]


def _unknown(operation: str) -> ValueError:
    return ValueError(f"operation: expected one of {', '.join(OPERATIONS)}, got {operation!r}")


def seconds(kernels: list[Pass], rates: Rates, kind: str) -> float:
    """Add up the seconds of one kernel after the other."""
    return sum(kernel.seconds(rates, kind) for kernel in kernels)
