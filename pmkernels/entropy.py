"""softmax_entropy: its backward needs only the logits and three numbers per row."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmkernels import strategies
from pmkernels.launch import HAS_TRITON
from pmkernels.operators import contiguous_like, differentiable, operator
from pmkernels.reference import accumulate_dtype
from pmkernels.strategies import EAGER

if HAS_TRITON:
    from pmkernels.kernels import entropy as kernels


def softmax_entropy(logits: Tensor, *, strategy: str = "auto") -> Tensor:
    """Compute the Shannon entropy in nats of the softmax of each row.

    Args:
        logits: ``[*, C]``, floating point, C at least 1. Logits of ±1e4 and −inf are fine (0·log 0 = 0).
        strategy: ``"auto"``: the kernel (one read of the logits forward, one backward) on a CUDA GPU, else
            ``"eager"``; or one of ``"eager"`` and ``"fused"`` (as is ``"streamed"``).

    Returns:
        ``[*]`` in [0, log C]; float32 for 16-bit logits, otherwise the dtype of ``logits``. Differentiable once.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor.
        ValueError: ``logits`` has no class dimension or no classes; a strategy that cannot be.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a floating-point tensor, got {got}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [*, C] with C at least 1, got {list(logits.shape)}")
    chosen = strategies.resolve(strategy, {"logits": logits}, logits.device, own="kernels")
    entropy: Tensor = _Eager.apply(logits) if chosen == EAGER else entropy_operator(logits)[0]
    return entropy


class _Eager(torch.autograd.Function):
    """The eager form of H = −Σ p log p. It saves three numbers a row, no probabilities.

    dH/dz_i = −p_i (log p_i + H), log p = (z − max z) − log Σ exp(z − max z): one number for both would lose log 2
    beside a logit of 1e4.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        z = logits.to(accumulate_dtype(logits))
        largest = z.amax(dim=-1, keepdim=True)
        log_p = z - largest
        normaliser = log_p.exp().sum(dim=-1, keepdim=True).log()
        log_p = log_p - normaliser
        entropy = torch.where(log_p == -torch.inf, 0.0, -log_p.exp() * log_p).sum(dim=-1)
        # rounding can make log p positive by an ulp
        entropy = entropy.clamp(min=0.0)
        ctx.save_for_backward(logits, largest, normaliser, entropy)
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        logits, largest, normaliser, entropy = ctx.saved_tensors
        log_p = logits.to(largest.dtype) - largest - normaliser
        surprise = log_p + entropy.unsqueeze(-1)
        grad_logits = torch.where(log_p == -torch.inf, 0.0, -log_p.exp() * surprise) * grad.unsqueeze(-1)
        return grad_logits.to(logits.dtype)


@operator(
    "softmax_entropy",
    "(Tensor logits) -> (Tensor, Tensor, Tensor)",
    fake=lambda logits: tuple(logits.new_empty(logits.shape[:-1], dtype=torch.float32) for _ in range(3)),
)
def entropy_operator(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return H of each row, with max z and the normaliser for the backward."""
    return kernels.entropy_fwd(logits)


@operator(
    "softmax_entropy_backward",
    "(Tensor grad, Tensor logits, Tensor entropy, Tensor largest, Tensor normaliser) -> Tensor",
    fake=lambda grad, logits, *_: contiguous_like(logits),
)
def entropy_backward_operator(grad: Tensor, logits: Tensor, *of_rows: Tensor) -> Tensor:
    """Return dlogits of dH."""
    return kernels.entropy_bwd(grad, logits, *of_rows)


@differentiable(entropy_operator, keep=lambda _, inputs, output: (*inputs, *output))
def _backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    return entropy_backward_operator(grad, *ctx.saved_tensors)
