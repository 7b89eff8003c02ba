"""What a caller may give an engine, and what it may not."""

from typing import Any

import numpy as np
import pytest
import torch
from support.engines import GAMMAS, expected, images
from torch import nn

from pareto_merging.serving import Engine


def test_forms_of_preferences(engine: Engine, model: nn.Module) -> None:
    batch = images(2)
    truth = expected(model, batch, torch.tensor([[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]]))
    forms: list[Any] = [
        torch.tensor([[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]]),
        torch.tensor([[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]], dtype=torch.float64),
        [[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]],
        [{"ones": 0.6}, {"twos": 1}],
        [torch.tensor([0.6, 0.2, 0.2]), {"twos": 1.0}],
        ({"ones": 0.6}, [0.0, 1.0, 0.0]),
        ["ones=0.6", "0,1,0"],
        [np.array([0.6, 0.2, 0.2]), {"twos": 1}],
        np.array([[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]]),
    ]
    for form in forms:
        torch.testing.assert_close(engine(batch, form), truth, rtol=1e-4, atol=1e-4)
    one = expected(model, batch, torch.tensor([[0.6, 0.2, 0.2]] * 2))
    for shared in (torch.tensor([0.6, 0.2, 0.2]), [0.6, 0.2, 0.2], {"ones": 0.6}, "ones=0.6", [[0.6, 0.2, 0.2]] * 2):
        torch.testing.assert_close(engine(batch, shared), one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("preferences", "message"),
    [
        ([0.5, 0.5], r"expected shape \[3\]"),
        ([0.5, 0.6, 0.1], r"expected a sum of 1"),
        ([[0.5, 0.5, 0.0]] * 3, r"expected one for each of 2 images \(or one for all\), got 3"),
        ([[0.5, 0.5, 0.0], [float("nan"), 0.5, 0.5]], r"expected finite numbers"),
        ([[0.5, 0.5, 0.0], [1.5, -0.5, 0.0]], r"expected non-negative numbers"),
        ([{"ones": 0.5}, {"fours": 0.5}], r"expected task names among ones, twos, threes; got fours"),
        ([{"ones": 0.5}, 3], r"got a mixture"),
        ([], r"preference: expected shape"),
        (None, r"preference: expected 3 numbers"),
        ("nonsense", r"preference: expected 3 numbers such as"),
        (["equal", "ones=2"], r"preference: expected a sum of at most 1"),
    ],
    ids=str,
)
def test_preferences_that_are_none(engine: Engine, preferences: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(images(2), preferences)


def test_images_that_are_none(engine: Engine) -> None:
    for bad, kind, message in (
        (images(2).byte(), TypeError, r"images: expected a floating-point tensor, .* got torch.uint8"),
        ([1, 2], TypeError, r"got list"),
        (images(2)[..., :8], ValueError, r"images: expected shape \[n, 3, 16, 16\], got \[2, 3, 16, 8\]"),
        (images(2)[0], ValueError, r"images: expected shape \[n, 3, 16, 16\], got \[3, 16, 16\]"),
        (images(0), ValueError, r"images: expected \[n, …\] with n at least 1"),
    ):
        with pytest.raises(kind, match=message):
            engine(bad, GAMMAS[0])  # type: ignore[arg-type]
    # and it goes on as if nothing had happened
    assert torch.isfinite(engine(images(2), GAMMAS[:2])).all()
