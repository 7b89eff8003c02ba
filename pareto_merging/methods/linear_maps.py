"""Uses of matrices as linear maps, found in the calls that a model makes.

Unlike hooks on nn.Linear this sees whoever calls ``F.linear``, attention's projections inside
``F.multi_head_attention_forward``, and ``x @ P``.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_MATMULS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}
_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_LAYER_NORM = inspect.signature(F.layer_norm)


class Rows(NamedTuple):
    """Rows [start, stop) of a parameter as a linear map x·Pᵀ. ``right``: all of it as x·P."""

    name: str
    start: int
    stop: int
    right: bool


class LinearMaps(TorchFunctionMode):
    """A mode that finds every use of a 2-D parameter as a linear map.

    Each comes to :meth:`use`. They are known by the identity of the parameter in ``F.linear(x, P)`` (nn.Linear and
    whoever calls it), ``F.multi_head_attention_forward`` (P in its in-, q-, k-, v- and out-projection) and ``x @ P``
    (matmul, mm), where W = Pᵀ. Results are unchanged. PyTorch's fused transformer paths step aside for an active mode.
    Not seen: scripted modules, and a matrix computed from the parameter (``x @ P.t()``, weight norm).

    ``parameters``: by the name that their uses shall have; those that are not floating point are left out.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        kept = {name: p for name, p in parameters.items() if p.is_floating_point()}
        self.names = {id(parameter): name for name, parameter in kept.items()}
        # alive for as long as their ids are looked up
        self._parameters = kept

    def use(self, rows: Rows, x: Tensor, bias: Tensor | None, output: Callable[[], Tensor]) -> None:
        """Take note of x [*, D] times ``rows`` plus ``bias``. ``output()`` computes it, [*, N]."""
        raise NotImplementedError

    def use_norm(self, name: str, x: Tensor, bias: Tensor | None, normalised: Callable[[], Tensor]) -> None:
        """Take note of ``F.layer_norm`` of x [*, D] with weight ``name``. ``normalised()`` is without."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        if func is F.layer_norm:
            self._norm(_LAYER_NORM.bind(*args, **kwargs).arguments)
        elif func is F.linear:
            given = (*args, *(kwargs[name] for name in ("input", "weight", "bias") if name in kwargs), None)
            x, weight, bias = given[:3]
            self._matrix(weight, x, bias, lambda: F.linear(x, weight, bias))
        elif func in _MATMULS:
            x, weight = (*args, *(kwargs[name] for name in ("input", "other", "mat2") if name in kwargs))[:2]
            self._matrix(weight, x, None, lambda: x @ weight, right=True)
        return func(*args, **kwargs)

    def _attention(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        bound = _ATTENTION.bind(*args, **kwargs)
        given = bound.arguments
        query, key, value = given["query"], given["key"], given["value"]
        size = given["embed_dim_to_check"]
        if given.get("use_separate_proj_weight"):
            for index, (part, x) in enumerate((("q", query), ("k", key), ("v", value))):
                part_bias = given["in_proj_bias"]
                part_bias = None if part_bias is None else part_bias[index * size : (index + 1) * size]
                self._projection(given[f"{part}_proj_weight"], x, part_bias, slice(None))
        elif (packed := given["in_proj_weight"]) is not None:
            parts = [(query, 0, 1), (key, 1, 2), (value, 2, 3)]
            if key is value:
                parts = [(query, 0, 3)] if query is key else [(query, 0, 1), (key, 1, 3)]
            for x, start, stop in parts:
                self._projection(packed, x, given["in_proj_bias"], slice(start * size, stop * size))
        # the output projection's input comes out of an attention whose output projection does nothing
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        given["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        given["out_proj_bias"] = None
        joined, attention = func(*bound.args, **bound.kwargs)
        self._matrix(weight, joined, bias, lambda: F.linear(joined, weight, bias))
        return F.linear(joined, weight, bias), attention

    def _projection(self, weight: Tensor, x: Tensor, bias: Tensor | None, rows: slice) -> None:
        own_bias = None if bias is None else bias[rows]
        start, stop, _ = rows.indices(len(weight))
        self._matrix(weight, x, bias, lambda: F.linear(x, weight[rows], own_bias), start, stop)

    def _matrix(
        self,
        weight: Any,
        x: Tensor,
        bias: Tensor | None,
        output: Callable[[], Tensor],
        start: int = 0,
        stop: int | None = None,
        right: bool = False,
    ) -> None:
        name = self.names.get(id(weight))
        if name is not None and weight.ndim == 2 and x.numel():
            self.use(Rows(name, start, len(weight) if stop is None else stop, right), x, bias, output)

    def _norm(self, given: Mapping[str, Any]) -> None:
        weight, x, shape = given.get("weight"), given["input"], given["normalized_shape"]
        name = self.names.get(id(weight))
        if name is not None and len(shape) == 1 and x.numel():
            eps = given.get("eps", 1e-5)
            self.use_norm(name, x, given.get("bias"), lambda: F.layer_norm(x, shape, None, None, eps))
