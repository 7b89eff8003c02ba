"""The fine-tuned models as teachers: from their copies, or W0 + τ_k where that is the fine-tuned model."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from method_cases import conv_net
from torch import nn

from pareto_merging.model.base import set_base
from pareto_merging.model.experts import experts, experts_of, named_experts
from pareto_merging.model.fold import expert, fold
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import preference

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [False, True])
def test_experts_are_the_copies(tiny_vit: nn.Module, copies: Copies, dtype: torch.dtype, held: bool) -> None:
    """From the copies their very bits; from W0 + τ_k to the rounding of one task vector and one sum."""
    net = tiny_vit.to(dtype)
    finetuned = copies(net, 3)
    model = randomize(parametrize(net, finetuned, rank=2, constant_rank=2))
    before = state(model)
    names = []
    with preference(model, [0.1, 0.2, 0.7]):
        for name, module in experts_of(model, None if held else finetuned):
            names.append(name)
            assert type(module) is type(tiny_vit) and list(module.state_dict()) == list(tiny_vit.state_dict())
            assert not any("pareto" in inner.__dict__ for inner in module.modules())
            for key, value in finetuned[name].state_dict().items():
                if not held:
                    assert torch.equal(module.state_dict()[key], value), key
                    continue
                largest = torch.maximum(value.abs(), net.state_dict()[key].abs()).amax()
                error = (module.state_dict()[key] - value).abs().amax()
                assert error <= 2 * torch.finfo(dtype).eps * largest, key
    assert names == ["t0", "t1", "t2"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_tied_and_nested_models_and_buffers() -> None:
    net = conv_net()
    finetuned = {f"t{k}": noisy_copy(net, k + 1) for k in range(2)}
    model = parametrize(net, finetuned, rank=2)
    for name, module in experts_of(model, finetuned):
        assert all(torch.equal(module.state_dict()[k], v) for k, v in finetuned[name].state_dict().items())
        assert torch.equal(module.eval()(IMAGES), finetuned[name].eval()(IMAGES)), "batch norm's statistics too"
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    copies = [noisy_copy(tied, 1), noisy_copy(tied, 2)]
    for source in (copies, None):
        for (_, module), copy in zip(experts_of(parametrize(tied, copies), source), copies, strict=True):
            assert module[0].weight is module[1].weight
            torch.testing.assert_close(module[0].weight, copy[0].weight)


def test_refused_where_base_and_task_vectors_are_not_the_fine_tuned_model(tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned = copies(tiny_vit, 2)
    expected = r"^finetuned: expected the fine-tuned copies, which the model does not hold \({}\), got none$"

    def refuses(model: nn.Module, reason: str) -> None:
        with pytest.raises(ValueError, match=expected.format(reason)):
            next(experts_of(model, None))
        # the copies are the copies, whatever became of the model
        if "folded" not in reason and "buffers" not in reason:
            assert [name for name, _ in experts_of(model, finetuned)] == ["t0", "t1"]

    refuses(parametrize(tiny_vit, finetuned, rank=2, preprocess="ties"), "its task vectors were preprocessed")
    refuses(
        parametrize(tiny_vit, finetuned, preprocess=lambda name, taus: 2 * taus), "its task vectors were preprocessed"
    )
    based = parametrize(tiny_vit, finetuned, rank=2)
    set_base(based, {"conv1.weight": torch.zeros_like(tiny_vit.conv1.weight)}, "regmean")
    refuses(based, "its base is that of start regmean")
    refuses(fold(parametrize(tiny_vit, finetuned, rank=2)), "a folded model has no task vectors")
    net = conv_net()
    refuses(parametrize(net, [noisy_copy(net, 1)]), "it has buffers, which differ between the fine-tuned models")
    with pytest.raises(ValueError, match="got a folded one"):
        expert(fold(based), 0)


def test_several_share_one_module(tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned = copies(tiny_vit, 2)
    module = noisy_copy(tiny_vit, 9).train()
    both = experts(module, finetuned)
    for _ in range(2):
        for name, one in both.items():
            outputs = one(IMAGES)
            assert not outputs.requires_grad
            with torch.no_grad():
                assert torch.equal(outputs, finetuned[name].eval()(IMAGES))
            assert one.module is module and module.training
    with pytest.raises(ValueError, match="t0 lacks"):
        experts(nn.Linear(2, 2), finetuned)


def test_only_those_wanted_are_read(tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned = copies(tiny_vit, 3)
    model, reads = parametrize(tiny_vit, finetuned, rank=2), Counter[str]()

    class Reads(dict[str, Any]):
        def __init__(self, name: str, module: nn.Module) -> None:
            super().__init__(module.state_dict())
            self.name, self.shapes = name, {key: list(value.shape) for key, value in self.items()}

        def __getitem__(self, key: str) -> Any:
            reads[self.name] += 1
            return super().__getitem__(key)

    files = {name: Reads(name, module) for name, module in finetuned.items()}
    assert [name for name, _ in experts_of(model, files, ["t2"])] == ["t2"]
    assert reads == {"t2": len(tiny_vit.state_dict())}
    assert [name for name, _ in experts_of(model, None, {"t1"})] == ["t1"]


def test_names(tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned = copies(tiny_vit, 3)
    model = parametrize(tiny_vit, finetuned, rank=2)
    more = {"other": tiny_vit, **dict(reversed(finetuned.items()))}
    assert (
        list(named_experts(model, more)) == list(named_experts(model, list(finetuned.values()))) == ["t0", "t1", "t2"]
    )
    with pytest.raises(ValueError, match="expected a copy for every task, got none for t1, t2"):
        named_experts(model, {"t0": tiny_vit})
    with pytest.raises(ValueError, match=r"expected 3 copies \(t0, t1, t2\), got 1"):
        named_experts(model, [tiny_vit])
