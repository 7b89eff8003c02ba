"""softmax_entropy against the definition, at the edges of the number range."""

import math

import pytest
import torch

import pmkernels
from pmkernels import reference


def test_values_and_gradient_match_the_definition() -> None:
    logits = torch.randn(11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    entropy, expected = pmkernels.softmax_entropy(logits), reference.softmax_entropy(logits)
    torch.testing.assert_close(entropy, expected)
    weights = torch.linspace(-1, 1, 11, dtype=torch.float64)
    (ours,) = torch.autograd.grad(entropy, logits, weights)
    (theirs,) = torch.autograd.grad(expected, logits, weights)
    torch.testing.assert_close(ours, theirs)
    torch.autograd.gradcheck(pmkernels.softmax_entropy, (logits,))


def test_known_values() -> None:
    assert float(pmkernels.softmax_entropy(torch.zeros(1, 10))) == pytest.approx(math.log(10), rel=1e-6)
    assert float(pmkernels.softmax_entropy(torch.zeros(1, 1))) == 0.0
    p = torch.tensor([0.5, 0.25, 0.25])
    assert float(pmkernels.softmax_entropy(p.log())) == pytest.approx(1.5 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype) -> None:
    rows = torch.tensor(
        [[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [0.0, -math.inf, 0.0], [-math.inf, -1e4, -math.inf], [-1e4, -1e4, -1e4]],
        dtype=dtype,
    ).requires_grad_()
    for function in (pmkernels.softmax_entropy, reference.softmax_entropy):
        entropy = function(rows)
        expected = torch.tensor([0.0, math.log(2), math.log(2), 0.0, math.log(3)], dtype=dtype)
        torch.testing.assert_close(entropy, expected)
        (grad,) = torch.autograd.grad(entropy.sum(), rows)
        assert bool(torch.isfinite(grad).all()), function


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_logits_give_float32_and_a_sixteen_bit_gradient(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    entropy = pmkernels.softmax_entropy(logits)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy, reference.softmax_entropy(logits.double()).float())
    assert torch.autograd.grad(entropy.sum(), logits)[0].dtype == dtype


def test_never_negative_and_any_leading_shape() -> None:
    logits = 50 * torch.randn(20, 30, 4, generator=torch.Generator().manual_seed(0))
    entropy = pmkernels.softmax_entropy(logits)
    assert entropy.shape == (20, 30)
    assert bool((entropy >= 0).all())
    assert pmkernels.softmax_entropy(torch.zeros(0, 4)).shape == (0,)


def test_it_keeps_no_probabilities() -> None:
    logits = torch.randn(6, 50, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pmkernels.softmax_entropy(logits)
    assert sorted(t.numel() for t in saved) == [6, 6, 6, 300]
    assert any(t.data_ptr() == logits.data_ptr() for t in saved)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"logits: expected a floating-point tensor, got torch.int64"):
        pmkernels.softmax_entropy(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits: expected shape .* got \[3, 0\]"):
        pmkernels.softmax_entropy(torch.zeros(3, 0))
