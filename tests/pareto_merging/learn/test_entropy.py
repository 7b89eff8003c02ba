"""The entropy of predictions from its definition."""

import math

import pytest
import torch

from pareto_merging.learn.entropy import entropy_terms


def test_entropy_terms_and_information_maximisation() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits, dim=-1)
    mean_entropy = float(-(p * p.log()).sum(dim=-1).mean())
    mean_prediction = p.mean(dim=0)
    entropy_of_mean = float(-(mean_prediction * mean_prediction.log()).sum())
    terms = entropy_terms(logits)
    assert float(terms.objective) == float(terms.watched[0]) == pytest.approx(mean_entropy)
    assert float(terms.watched[1]) == pytest.approx(entropy_of_mean)
    rewarded = entropy_terms(logits, 0.5)
    assert float(rewarded.objective) == pytest.approx(mean_entropy + 0.5 * (math.log(4) - entropy_of_mean))
    # every image in one class: no entropy, but the reward is lost
    collapsed = torch.zeros(6, 4)
    collapsed[:, 2] = 1e4
    collapsed.requires_grad_()
    terms = entropy_terms(collapsed, 1.0)
    assert float(terms.watched[0]) == 0
    assert float(terms.objective.detach()) == pytest.approx(math.log(4))
    assert bool(torch.isfinite(torch.autograd.grad(terms.objective, collapsed)[0]).all())
