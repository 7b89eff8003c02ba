"""One operation of :mod:`pmkernels`, timed round by round for whoever started this process.

``python -P operation.py WHAT``, where WHAT is JSON, with the tree whose ``pmkernels`` is meant first on PYTHONPATH. It
says where that is, then answers every line of its input with the milliseconds of one round. It uses nothing but public
functions, and nothing else of this repository: it runs as it is in another commit.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pmkernels

Call = Callable[[], Sequence[Tensor]]


def _inputs(what: dict[str, Any]) -> dict[str, Tensor]:
    """Return the arguments of pareto_linear on the scale of a real layer. dy is what comes back from the output."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n, d, tasks, rank = (int(what[name]) for name in ("n", "d", "tasks", "rank"))
    generator, dtype, width = torch.Generator(device).manual_seed(0), getattr(torch, what["dtype"]), d**-0.5

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    values = {
        "weight": normal(n, d, scale=width, dtype=dtype),
        "task_vectors": normal(tasks, n, d, scale=0.1 * width, dtype=dtype),
        "lam": normal(tasks, scale=0.3),
    }
    if rank:
        values |= {"A": normal(n, rank), "G": normal(rank, rank, tasks, scale=0.1), "B": normal(d, rank, scale=width)}
        values["gamma"] = torch.softmax(normal(tasks), dim=0)
    rows = int(what["rows"])
    return {**values, "x": normal(rows, d, dtype=dtype), "dy": normal(rows, n, dtype=dtype)}


def _forward(values: dict[str, Tensor], strategy: str) -> Call:
    del values["dy"]
    return lambda: [pmkernels.pareto_linear(**values, strategy=strategy)]


def _step(values: dict[str, Tensor], strategy: str) -> Call:
    dy = values.pop("dy")
    leaves = [values[name].requires_grad_() for name in ("x", "lam", "A", "G", "B") if name in values]

    def call() -> list[Tensor]:
        y = pmkernels.pareto_linear(**values, strategy=strategy)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return call


def _merge(values: dict[str, Tensor], strategy: str) -> Call:
    del values["x"], values["dy"]
    return lambda: [pmkernels.merge_weight(**values, strategy=strategy)]


def _entropy(values: dict[str, Tensor], strategy: str) -> Call:
    return lambda: [pmkernels.softmax_entropy(values["dy"], strategy=strategy)]


OPERATIONS: dict[str, Callable[[dict[str, Tensor], str], Call]] = {
    "forward": _forward,
    "forward-and-backward": _step,
    "merge": _merge,
    "entropy": _entropy,
}


def _round(call: Call, calls: int) -> float:
    """Return the median milliseconds of calls, on a GPU with a cold L2 cache."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return float(do_bench(call, warmup=5, rep=20, return_mode="median"))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main(what: dict[str, Any]) -> None:
    """Print where pmkernels is, keep the outputs, and time a round for each line."""
    torch.set_num_threads(int(what["threads"]))
    call = OPERATIONS[what["operation"]](_inputs(what), what["strategy"])
    torch.save([tensor.cpu() for tensor in call()], what["outputs"])
    print(json.dumps({"pmkernels": pmkernels.__file__}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(_round(call, int(what["calls"]))), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
