"""The table of strategies, and which of them is taken for which case.

All give the same result up to rounding:

- ``eager``: plain PyTorch on any device; the definition and the CPU path.
- ``fused``: W assembled tile by tile inside the matrix product; nothing of W's size is ever allocated.
- ``streamed``: W merged in one pass into a scratch tensor, then the library's matrix product.

``strategy="auto"`` is the cheapest that supports the case (:func:`choose`). :func:`register` adds one of your own:
nothing else lists their names.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmkernels import configs, costs, dispatch, launch, products
from pmkernels.configs import Configs
from pmkernels.low_rank import Parts, RowProducts, WeightGradients

AUTO, FUSED, STREAMED, EAGER = "auto", "fused", "streamed", "eager"
# what a model may be told besides: it keeps its merged weights, however they are computed
RESERVED = (AUTO, "cached")
# whose columns a case's rank counts
RANKED = ("A_c", "A")


class Case(NamedTuple):
    """A case to support: a device, the tensors' types by argument, K and R.

    R is the rank of A_c and A together. ``operation``: one of :data:`pmkernels.costs.OPERATIONS`, None: all.
    ``asked``: for by name, not by ``auto``.
    """

    device: torch.device
    dtypes: Mapping[str, torch.dtype]
    tasks: int = 0
    rank: int = 0
    operation: str | None = None
    asked: bool = True


@dataclass(frozen=True, eq=False)
class Strategy:
    """One way of computing a layer y = x·Wᵀ + b, W = W0 + Σ_k λ_k τ_k + left·rightᵀ.

    - ``supports``(case): the error to raise for a case it cannot do, None if it can.
    - ``forward``(x, terms, start=, bias=) -> y. W is made of :class:`~pmkernels.low_rank.Terms`; start = (t, A) adds
      t·Aᵀ, beside which W may have a low-rank term of its own, the constant one.
    - ``dx``(dy, terms, start=) -> dy·W, start = (ds, B).
    - ``weight_grad``(dy, x, τ, A=, B=, need_bias=) -> :class:`~pmkernels.low_rank.WeightGradients` of dW = dyᵀx.
    - ``merge``(terms, out) -> W like W0, in ``out`` where that is given.
    - ``cost``(operation, problem, file, rates): the kernels counted; None: taken where nothing else can be.
    - ``rows``: the low-rank term's products with rows. ``reduce``(dW, τ, A=, B=): of a dW that is there.
    - ``preference``(x, wide, G, B, γ by group, bias): of :func:`pmkernels.preference_linear`; None: it has none.
    - ``kernels``: it launches Triton kernels, and so do the operations that have one kernel only.

    :mod:`pmkernels.products` has the signatures in full.
    """

    name: str
    supports: Callable[[Case], Exception | None]
    forward: Callable[..., Tensor]
    dx: Callable[..., Tensor]
    weight_grad: Callable[..., WeightGradients]
    merge: Callable[..., Tensor]
    cost: Callable[[str, costs.Problem, str, costs.Rates], list[costs.Pass] | None]
    rows: type[RowProducts] = RowProducts
    reduce: Callable[..., WeightGradients] = products.reductions
    preference: Callable[..., Tensor] | None = None
    kernels: bool = False


TABLE: dict[str, Strategy] = configs.TABLE


def register(strategy: Strategy) -> Strategy:
    """Add a strategy to the table. A name that is taken is a ValueError."""
    if strategy.name in (*RESERVED, *TABLE) or not strategy.name:
        taken = ", ".join((*RESERVED, *TABLE))
        raise ValueError(f"strategy: expected a name other than {taken}, got {strategy.name!r}")
    TABLE[strategy.name] = strategy
    _cheapest.cache_clear()
    return strategy


def unregister(name: str) -> None:
    """Take a strategy of one's own out of the table. Its graphs are done with; any other name is a ValueError."""
    own = [other for other in TABLE if other not in STRATEGIES]
    if name not in own:
        raise ValueError(f"strategy: expected one of those registered ({', '.join(own) or 'none'}), got {name!r}")
    del TABLE[name]
    _cheapest.cache_clear()


def names() -> tuple[str, ...]:
    """Return what a strategy may be called: ``auto`` and those of the table."""
    return (AUTO, *TABLE)


def resolve(strategy: str, tensors: Mapping[str, Tensor | None], device: torch.device, own: str | None = None) -> str:
    """Return the strategy that computes a call with these tensors: a name or ``auto``.

    ``own``: a field of :class:`Strategy` that the operation asks for; a strategy without it computes it as ``auto``
    does. ``auto`` goes on as it is where more than ``eager`` can be taken: the operators ask :func:`choose`, out of the
    compiler's sight. An unknown strategy, or one that was asked for and cannot do this, is a ValueError or TypeError.
    """
    meant = strategy if strategy != AUTO else dispatch.in_force().auto or AUTO
    if meant != AUTO and meant not in TABLE:
        raise ValueError(f"strategy: expected one of {', '.join(names())}, got {meant!r}")
    if meant == EAGER or (meant == AUTO and not dispatch.as_on_a_gpu(device) and len(TABLE) < len(STRATEGIES)):
        # off the GPU auto is eager, unless the table has one of the user's own; auto is a name besides
        return EAGER
    if own is not None and meant not in (AUTO, EAGER) and not getattr(TABLE[meant], own):
        meant = AUTO
    case = case_of(tensors, device, asked=meant != AUTO)
    if meant == AUTO:
        others = (s for s in tuple(TABLE.values()) if s.name != EAGER and (own is None or getattr(s, own)))
        return AUTO if any(s.supports(case) is None for s in others) else EAGER
    error = TABLE[meant].supports(case)
    if error is not None and strategy != AUTO:
        raise error
    return meant if error is None else EAGER


def case_of(tensors: Mapping[str, Tensor | None], device: torch.device, *, asked: bool) -> Case:
    """Return the case of a call with these tensors, by argument."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    task_vectors, G = tensors.get("task_vectors"), tensors.get("G")
    tasks = task_vectors.shape[0] if task_vectors is not None else 0 if G is None else G.shape[2]
    factors = (tensors.get(name) for name in RANKED)
    rank = sum(factor.shape[1] for factor in factors if factor is not None)
    return Case(device, dtypes, tasks, rank, asked=asked)


def choose(operation: str, strategy: str, like: Tensor, *, case: Case | None = None, **layer: Any) -> str:
    """Return the strategy of one operation (of :data:`pmkernels.costs.OPERATIONS`) of a layer.

    A strategy other than ``auto`` is taken where it supports the operation. Otherwise it is what was measured on this
    GPU at the nearest number of rows, where a tuned configuration file has this layer, else the cheapest by
    :mod:`pmkernels.costs`. ``layer``: what a :class:`~pmkernels.costs.Problem` has but its kind. ``case``: what is to
    be supported; None: x of this dtype, asked for by name.
    """
    if case is None:
        case = Case(like.device, {"x": like.dtype}, layer["tasks"], layer["rank"])
    case = case._replace(operation=operation)
    if strategy != AUTO and TABLE[strategy].supports(case) is None:
        return strategy
    problem = costs.Problem(**layer, kind=launch.precision_kind(like.dtype))
    known = (s for s in tuple(TABLE.values()) if operation != "preference" or s.preference is not None)
    able = tuple(s.name for s in known if s.supports(case) is None) or (EAGER,)
    return _cheapest(dispatch.in_force(), dispatch.gpu_file(like.device), like.device, able, operation, problem)


@functools.lru_cache(maxsize=4096)
def _cheapest(
    configs: Configs, file: str, device: torch.device, able: tuple[str, ...], operation: str, problem: costs.Problem
) -> str:
    measured = [
        choice
        for choice in configs.choices(file)
        if (choice.op, choice.dtype, choice.n, choice.d, choice.tasks, choice.rank)
        == (operation, problem.kind, problem.n, problem.d, problem.tasks, problem.rank)
        and choice.best in able
    ]
    if measured and not problem.per_row:
        return min(measured, key=lambda c: abs(math.log2(c.rows) - math.log2(max(problem.rows, 1)))).best
    gpu = dispatch.rates(file, device)

    def seconds(name: str) -> float:
        passes = TABLE[name].cost(operation, problem, file, gpu)
        return math.inf if passes is None else costs.seconds(passes, gpu, problem.kind)

    return min(able, key=seconds)


def pick(operation: str, strategy: str, like: Tensor, parts: Parts, **others: Tensor | None) -> Strategy:
    """Return the strategy of a layer's operation, for rows like x or dy. ``others``: of its tensors."""
    if strategy == EAGER:
        return TABLE[EAGER]
    case = case_of({"x": like, **parts._asdict(), **others}, like.device, asked=strategy != AUTO)
    rows, n = math.prod(like.shape[:-1]), parts.weight.shape[0] if parts.weight.ndim else 1
    tasks = 0 if parts.task_vectors is None else parts.task_vectors.shape[0]
    layer = {"rows": rows, "n": n, "d": parts.weight.numel() // max(n, 1), "tasks": tasks, "rank": case.rank}
    layer["constant"] = 0 if parts.A_c is None else parts.A_c.shape[1]
    return TABLE[choose(operation, strategy, like, case=case, **layer, per_row=parts.per_row)]


def predicted_passes(
    file: str, gpu: costs.Rates, operation: str, strategy: str, problem: costs.Problem, *, cached: bool = False
) -> list[costs.Pass]:
    """List the kernels of an operation as :mod:`pmkernels.costs` counts them, with a configuration file's tiles.

    ``cached``: with a W(γ) that is there, for any strategy the library's product.
    """
    if cached and operation in ("forward", "dx"):
        return costs.product(problem)
    return TABLE[strategy].cost(operation, problem, file, gpu) or []


def _supported_by_kernels(case: Case) -> Exception | None:
    if not launch.HAS_TRITON:
        return ValueError("strategy: expected 'eager' or 'auto', because triton is not installed")
    can_run = dispatch.runs_kernels if case.asked else dispatch.as_on_a_gpu
    if not can_run(case.device):
        return ValueError(
            "strategy: expected 'eager' or 'auto' for tensors that are not on a CUDA GPU "
            f"(TRITON_INTERPRET=1, set before the start, interprets kernels on the CPU), got device {case.device}"
        )
    for name, dtype in case.dtypes.items():
        if dtype not in launch.DTYPES:
            expected = "float32, bfloat16 or float16 (float64: strategy 'eager')"
            return TypeError(f"{name}: expected {expected}, got {dtype}")
    if case.tasks > launch.MAX_TASKS:
        name = "task_vectors" if "task_vectors" in case.dtypes else "G"
        most = f"K from 1 to {launch.MAX_TASKS}"
        return ValueError(f"{name}: expected {most} (more: strategy 'eager'), got K = {case.tasks}")
    if case.rank > launch.MAX_RANK:
        given = [name for name in RANKED if name in case.dtypes]
        what = "a rank" if len(given) < 2 else "ranks that sum up to one"
        expected = f"{what} from 1 to {launch.MAX_RANK} (more: strategy 'eager')"
        return ValueError(f"{' and '.join(given) or 'A'}: expected {expected}, got rank {case.rank}")
    return None


def _supported_by_streams(case: Case) -> Exception | None:
    if case.operation == "weight_grad" and case.dtypes.get("x") == torch.float16:
        return TypeError("x: expected a type in which a dW of 16 bits does not underflow, got torch.float16")
    return _supported_by_kernels(case)


def _tiles(op: str, problem: costs.Problem, operation: str, file: str, gpu: costs.Rates) -> costs.Tiles:
    p, config = problem, dispatch.lookup(file, op, problem.kind, launch.bucket(problem.rows), problem.rank, True)
    n, d = (p.d, p.n) if operation == "dx" else (p.n, p.d)
    blocks_n = -(-n // config.block_n)
    if operation == "weight_grad":
        tiles = blocks_n * -(-d // config.block_d)
        splits, _ = launch.splits_of_rows(config, gpu.multiprocessors, p.rows, n, d, tiles, p.rank)
    else:
        tiles = -(-p.rows // config.block_m) * blocks_n
        splits, _ = launch.splits_of_d(config, gpu.multiprocessors, p.rows, n, d, tiles)
    return costs.Tiles(config.block_m, config.block_n, config.block_d, splits, gpu.cache_bytes)


def _cost_of_fused(operation: str, problem: costs.Problem, file: str, gpu: costs.Rates) -> list[costs.Pass]:
    op = operation if operation in ("weight_grad", "preference") else "linear"
    return costs.fused(operation, problem, _tiles(op, problem, operation, file, gpu))


def _cost_of_streamed(operation: str, problem: costs.Problem, file: str, gpu: costs.Rates) -> list[costs.Pass]:
    tiles = costs.Tiles(cache_bytes=gpu.cache_bytes)
    if operation == "weight_grad":
        # the library forms dW, and what tiles are is a matter of its reduction
        config = dispatch.lookup(file, "merge_grad", problem.kind, launch.bucket(0), problem.rank, True)
        tiles = tiles._replace(block_n=config.block_n, block_d=config.block_d)
    return costs.streamed(operation, problem, tiles)


def _absent(*_: Any, **__: Any) -> Any:
    raise ModuleNotFoundError("triton")


_LIBRARY: dict[str, Any] = {"forward": products.forward, "dx": products.dx}
_LIBRARY |= {"weight_grad": products.weight_gradients, "merge": products.merge}
_STREAMED: dict[str, Any] = {name: functools.partial(product, by_kernel=True) for name, product in _LIBRARY.items()}
if launch.HAS_TRITON:
    from pmkernels.kernels import linear, low_rank, preference, weight_grad

    _STREAMED |= {"rows": low_rank.KernelRowProducts, "reduce": weight_grad.weight_grad_of_merge}
    _FUSED = {**_STREAMED, "forward": linear.linear_fwd, "dx": linear.linear_bwd_x}
    _FUSED |= {"weight_grad": weight_grad.weight_grad, "preference": preference.preference_linear}
    _STREAMED["preference"] = preference.preference_linear_of_wide
else:
    # the names are there, and what they answer is that nothing supports them
    _STREAMED = _FUSED = dict.fromkeys([*_LIBRARY, "reduce", "preference"], _absent)
register(Strategy(FUSED, _supported_by_kernels, cost=_cost_of_fused, kernels=True, **_FUSED))
register(Strategy(STREAMED, _supported_by_streams, cost=_cost_of_streamed, kernels=True, **_STREAMED))
register(Strategy(EAGER, lambda case: None, cost=lambda *_: None, **_LIBRARY))
# those that come with the library
STRATEGIES = names()
