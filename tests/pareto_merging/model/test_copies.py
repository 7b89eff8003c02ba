"""The fine-tuned copies beside the model, also as mappings that read files."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.networks import (
    Lazy,
    bits,
    build,
)
from torch import Tensor, nn

from pareto_merging.model.parametrize import parametrize

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def test_tied_weights_that_differ_in_a_copy_are_an_error(copies: Copies) -> None:
    pretrained, _, _ = build("tied")
    weights = {k: v.clone() for k, v in pretrained.state_dict().items()}
    weights["out.weight"] += 1
    with pytest.raises(ValueError, match=r"embed.weight and out.weight are tied in pretrained but differ in b"):
        parametrize(pretrained, {"a": pretrained.state_dict(), "b": weights})
    # a file may hold a tied tensor once
    del weights["out.weight"]
    parametrize(pretrained, {"a": weights})


def test_mismatched_copies_are_named(copies: Copies) -> None:
    pretrained, _, _ = build("mlp")
    good = {k: v.clone() for k, v in pretrained.state_dict().items()}
    missing = {k: v for k, v in good.items() if k != "0.bias"}
    extra = {**good, "head.weight": torch.zeros(2)}
    shaped = {**good, "2.weight": torch.zeros(4, 9)}
    with pytest.raises(
        ValueError, match=r"b lacks 0.bias; c has an extra head.weight; d has 2.weight of shape \[4, 9\]"
    ):
        parametrize(pretrained, {"a": good, "b": missing, "c": extra, "d": shaped})
    with pytest.raises(ValueError, match="expected at least one fine-tuned copy"):
        parametrize(pretrained, [])
    with pytest.raises(TypeError, match="expected a sequence or mapping of K fine-tuned copies, got a single one"):
        parametrize(pretrained, good)
    with pytest.raises(TypeError, match="expected a sequence or mapping of K fine-tuned copies, got a single one"):
        parametrize(pretrained, pretrained)
    with pytest.raises(TypeError, match="finetuned: expected modules or state dicts, got str"):
        parametrize(pretrained, {"a": "file.pt"})
    with pytest.raises(TypeError, match=r"pretrained: expected an nn.Module"):
        parametrize(good, [pretrained])
    with pytest.raises(ValueError, match="pretrained: expected a plain module, got a Pareto model"):
        parametrize(parametrize(pretrained, [good], low_rank="none"), [good])


@pytest.mark.parametrize("preprocess", ["none", "ties", "dare"])
@pytest.mark.parametrize("with_shapes", [True, False])
@pytest.mark.parametrize("name", ["tied", "conv", "open_clip Attention"])
def test_a_lazy_mapping_holds_one_tensor_at_a_time(
    name: str, with_shapes: bool, preprocess: Any, copies: Copies
) -> None:
    pretrained, _, low_rank = build(name)
    finetuned = copies(pretrained, 3)
    lazy = {task: Lazy(other.state_dict(), with_shapes) for task, other in finetuned.items()}
    settings: Any = {"rank": 2, "low_rank": low_rank, "preprocess": preprocess, "buffers": "average"}
    model = parametrize(pretrained, lazy, **settings)
    expected = parametrize(pretrained, finetuned, **settings)
    assert bits(model) == bits(expected)
    assert model.pareto.digests == expected.pareto.digests
    if preprocess == "none":
        assert all(set(other.reads.values()) == {1 if with_shapes else 2} for other in lazy.values())


def test_shapes_are_believed_until_the_tensor_is_read() -> None:
    plain = nn.Linear(3, 2)
    wrong = Lazy({**plain.state_dict(), "scale": torch.ones(1)})
    wrong.shapes["weight"] = (2, 4)
    with pytest.raises(ValueError, match=r"a has an extra scale; a has weight of shape \[2, 4\], expected \[2, 3\]"):
        parametrize(plain, {"a": wrong})
    assert not wrong.reads
    # [2, 1] would broadcast
    promised = Lazy({**plain.state_dict(), "weight": torch.zeros(2, 1)})
    promised.shapes["weight"] = (2, 3)
    with pytest.raises(ValueError, match=r"weight of a to have shape \[2, 3\], got \[2, 1\]"):
        parametrize(plain, {"a": promised})


def test_tied_weights_of_a_lazy_mapping() -> None:
    pretrained, _, _ = build("tied")
    weights = {name: value.clone() for name, value in pretrained.state_dict().items()}
    weights["embed.weight"][0], weights["out.weight"][0] = 0.0, -0.0

    class Files(Lazy):
        def __getitem__(self, name: str) -> Tensor:
            # where the bits differ two are compared
            self.last = None
            return super().__getitem__(name)

    # the same numbers
    parametrize(pretrained, {"a": Files(weights)})
    weights["out.weight"][0] = 1.0
    with pytest.raises(ValueError, match=r"embed.weight and out.weight are tied in pretrained but differ in a"):
        parametrize(pretrained, {"a": Files(weights)})
