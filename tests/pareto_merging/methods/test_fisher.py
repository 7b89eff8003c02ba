"""Fisher merging against plain loops over images, classes and parameters."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers import noisy_copy
from torch import Tensor, nn

from pareto_merging.data.sources import TensorImages, batch_indices
from pareto_merging.data.tasks import Task, ZeroShotHead
from pareto_merging.errors import UserError
from pareto_merging.methods import fisher, weight_averaging


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 4))


def mlp_tasks(count: int, labelled: bool = False) -> dict[str, Task]:
    return {
        f"t{k}": Task(
            TensorImages(random(6, 5, seed=10 + k), torch.arange(6) % 3 if labelled else None),
            ZeroShotHead(random(3, 4, seed=20 + k), 3.0),
        )
        for k in range(count)
    }


def plain_fisher(model: nn.Module, head: nn.Module, images: Tensor, labels: Any = "expected") -> dict[str, Tensor]:
    """Straight from the formula: images [n, …]; ``labels`` expected, or one class per image."""
    model = copy.deepcopy(model).eval()
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for index, image in enumerate(images):
        p = torch.softmax(head(model(image[None]))[0], dim=0).tolist()
        for y in range(len(p)):
            weight = p[y] if labels == "expected" else float(int(labels[index]) == y)
            for name, parameter in model.named_parameters():
                log_p = torch.log_softmax(head(model(image[None]))[0], dim=0)[y]
                (gradient,) = torch.autograd.grad(log_p, parameter, allow_unused=True)
                if gradient is not None:
                    total[name] += weight * gradient.double() ** 2 / len(images)
    return total


def plain_merge(
    copies: Mapping[str, nn.Module], fishers: list[dict[str, Tensor]], floor: float, normalize: bool
) -> dict[str, Tensor]:
    weights = [dict(model.named_parameters()) for model in copies.values()]
    factors = [
        1 / torch.cat([x.flatten() for x in f.values()]).norm() if normalize else torch.ones(()) for f in fishers
    ]
    merged = {}
    for name in weights[0]:
        fs = [f[name] * factor + floor for f, factor in zip(fishers, factors, strict=True)]
        merged[name] = sum(f * w[name].detach().double() for f, w in zip(fs, weights, strict=True)) / sum(fs)
    return merged


def assert_parameters(model: nn.Module, expected: Mapping[str, Tensor], **tolerance: Any) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(),
            expected[name].detach().double(),
            msg=lambda m, n=name: f"{n}: {m}",
            **tolerance,
        )


CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def test_worked_example() -> None:
    """Two classes, logits (w·x, 0) with x = 1 and w = 0 and ln 3: p = 1/2 and 3/4.

    d log p(1)/dw = 1 − p and d log p(2)/dw = −p, so F = p(1 − p)² + (1 − p)p² = p(1 − p): 1/4 and 3/16, and
    W = (1/4·0 + 3/16·ln 3) / (1/4 + 3/16) = 3/7·ln 3.
    """

    class Logits(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return torch.cat([features, torch.zeros_like(features)], dim=-1)

    net = nn.Linear(1, 1, bias=False)
    copies = {name: {"weight": torch.full((1, 1), w)} for name, w in (("a", 0.0), ("b", 1.0986123))}
    tasks = {name: Task(TensorImages(torch.ones(2, 1)), Logits()) for name in copies}
    result = fisher.merge(
        net, copies, tasks=tasks, labels="expected", floor=0.0, normalize=False, images=2, progress=False
    )
    torch.testing.assert_close(result.model().weight.item(), 3 / 7 * 1.0986123)
    torch.testing.assert_close(result.facts["fisher_norms"], [0.25, 0.1875], rtol=1e-5, atol=0)
    # with each F divided by its norm both are 1
    even = fisher.merge(net, copies, tasks=tasks, labels="expected", floor=0.0, progress=False).model()
    torch.testing.assert_close(even.weight.item(), 1.0986123 / 2)


@pytest.mark.parametrize("normalize", [True, False])
def test_mlp_against_loops(normalize: bool) -> None:
    net, tasks = mlp(), mlp_tasks(3)
    copies = {f"t{k}": noisy_copy(net, k, scale=0.3) for k in range(3)}
    fishers = [plain_fisher(copies[name], task.head, task.images.images) for name, task in tasks.items()]
    for name, expected in zip(copies, fishers, strict=True):
        got = fisher.diagonal_fisher(copies[name], tasks[name], labels="expected", progress=False)
        assert list(got) == list(expected)
        for parameter, f in got.items():
            assert f.dtype == torch.float32
            torch.testing.assert_close(f.double(), expected[parameter], rtol=1e-4, atol=1e-8)
    merged = fisher.merge(
        net, copies, tasks=tasks, labels="expected", floor=1e-3, normalize=normalize, progress=False
    ).model()
    assert_parameters(merged, plain_merge(copies, fishers, 1e-3, normalize), **CLOSE)
    # far from the average, which other weights than F would give
    average = weight_averaging.merge(net, copies).model()
    assert bool(((merged[0].weight - average[0].weight).abs() > 0.01).any())


def test_vit_against_loops(tiny_vit: nn.Module) -> None:
    copies = {f"t{k}": noisy_copy(tiny_vit, k) for k in range(2)}
    heads = {name: ZeroShotHead(random(3, 8, seed=5), 5.0) for name in copies}
    data = {name: random(9, 3, 8, 8, seed=k) for k, name in enumerate(copies)}
    tasks = {name: Task(TensorImages(data[name]), heads[name]) for name in copies}
    chosen = batch_indices(9, 2, 0, (4, 3))
    fishers = [plain_fisher(copies[name], heads[name], data[name][chosen]) for name in copies]
    merged = fisher.merge(tiny_vit, copies, tasks=tasks, labels="expected", images=2, seed=4, progress=False).model()
    assert type(merged) is type(tiny_vit)
    assert_parameters(merged, plain_merge(copies, fishers, 1e-6, True), rtol=1e-3, atol=1e-4)


def test_given_labels() -> None:
    net, tasks = mlp(), mlp_tasks(1, labelled=True)
    got = fisher.diagonal_fisher(net, tasks["t0"], labels="given", progress=False)
    data = tasks["t0"].images
    for name, expected in plain_fisher(net, tasks["t0"].head, data.images, data.labels).items():
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match=r"task t0: expected a label in .*got -1"):
        fisher.merge(net, {"t0": net}, tasks=mlp_tasks(1), labels="given", progress=False)
    with pytest.raises(ValueError, match="the task: expected a label"):
        fisher.diagonal_fisher(net, Task(list(data.images), tasks["t0"].head), labels="given", progress=False)


def test_sampled_labels_are_drawn_from_p() -> None:
    """The mean over many seeds is the expectation, and one seed gives the same bits twice."""
    net, tasks = mlp(), mlp_tasks(1)
    expected = fisher.diagonal_fisher(net, tasks["t0"], labels="expected", progress=False)
    draws = [
        fisher.diagonal_fisher(net, tasks["t0"], labels="sampled", seed=seed, progress=False)["0.weight"]
        for seed in range(150)
    ]
    spread = torch.stack(draws).std(dim=0) / 150**0.5
    assert bool(((sum(draws) / 150 - expected["0.weight"]).abs() <= 5 * spread).all())
    again = fisher.diagonal_fisher(net, tasks["t0"], labels="sampled", seed=7, progress=False)
    assert torch.equal(again["0.weight"], draws[7])
    assert not torch.equal(draws[7], draws[8])


def test_one_copy_and_equal_copies(tiny_vit: nn.Module) -> None:
    tuned = noisy_copy(tiny_vit, 1)
    task = Task(TensorImages(random(4, 3, 8, 8)), ZeroShotHead(random(3, 8), 5.0))
    for count in (1, 3):
        tasks = {f"task_{k + 1}": task for k in range(count)}
        result = fisher.merge(tiny_vit, [tuned] * count, tasks=tasks, images=3, progress=False)
        assert result.task_names == tuple(tasks)
        assert not result.preference_aware
        assert_parameters(result.model(), dict(tuned.named_parameters()), rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """A tied matrix, a norm with buffers, a table of which one row is used, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.table = nn.Embedding(3, 4, sparse=True)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("counter", torch.tensor(5))

    def forward(self, x: Tensor) -> Tensor:
        row = self.table(torch.zeros(len(x), dtype=torch.long))
        return self.second(torch.tanh(self.norm(self.first(x)))) + row


@pytest.fixture
def odd() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odd()


def test_tied_unused_buffers_and_state_dicts(odd: nn.Module) -> None:
    odd.first.bias.requires_grad_(False)
    copies = {f"t{k}": noisy_copy(odd, k, 0.3) for k in range(2)}
    tasks = {name: Task(TensorImages(random(4, 4, seed=3)), ZeroShotHead(random(3, 4), 3.0)) for name in copies}
    result = fisher.merge(odd, copies, tasks=tasks, labels="expected", progress=False).model()
    dicts = {name: dict(model.state_dict()) for name, model in copies.items()}
    # a file may name a tied tensor once
    del dicts["t1"]["second.weight"]
    again = fisher.merge(odd, dicts, tasks=tasks, labels="expected", progress=False).model()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in result.state_dict().items())
    assert result.second.weight is result.first.weight
    a, b = copies.values()
    for name in ("unused", "norm.running_var"):
        torch.testing.assert_close(result.state_dict()[name], (a.state_dict()[name] + b.state_dict()[name]) / 2)
    torch.testing.assert_close(result.table.weight[1:], (a.table.weight[1:] + b.table.weight[1:]) / 2)
    assert int(result.counter) == 5
    assert not result.first.bias.requires_grad

    # autograd.grad of the loop wants dense gradients, and flags that are on
    for model in copies.values():
        model.table.sparse = False
        model.requires_grad_(True)
    fishers = [plain_fisher(copies[n], tasks[n].head, tasks[n].images.images) for n in copies]
    assert_parameters(result, plain_merge(copies, fishers, 1e-6, True), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    net, tasks = mlp(), mlp_tasks(2)
    copies = {f"t{k}": noisy_copy(net, k, 0.3).to(dtype) for k in range(2)}
    wide = {name: copy.deepcopy(model).double() for name, model in copies.items()}
    fishers = [plain_fisher(wide[n], t.head, t.images.images.double()) for n, t in tasks.items()]
    merged = fisher.merge(net.to(dtype), copies, tasks=tasks, labels="expected", floor=1e-2, progress=False).model()
    assert all(p.dtype == dtype for p in merged.parameters())
    accumulated = fisher.diagonal_fisher(copies["t0"], tasks["t0"], images=1, progress=False)
    assert {f.dtype for f in accumulated.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    expected = plain_merge(wide, fishers, 1e-2, True)
    # the head is float32; 16-bit gradients move the weights of an average, whose ends are 0.3 apart
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    assert_parameters(merged, expected, **tolerance)


def test_nothing_is_left_behind() -> None:
    net, tasks = mlp(), mlp_tasks(2)
    net.train()
    net[0].weight.requires_grad_(False)
    net[3].bias.grad = torch.ones(4)
    head = nn.Linear(4, 3)
    tasks["t0"].head = head.train()
    copies = {f"t{k}": noisy_copy(net, k).train() for k in range(2)}
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in (net, *copies.values())]
    state = torch.get_rng_state()
    with torch.no_grad():
        fisher.merge(net, copies, tasks=tasks, progress=False)
        fisher.diagonal_fisher(net, tasks["t0"], progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    for model, values in zip((net, *copies.values()), before, strict=True):
        assert all(torch.equal(values[n], v) for n, v in model.state_dict().items())
        assert all(module.training for module in model.modules())
    assert head.training and all(p.grad is None for p in head.parameters())
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert torch.equal(net[3].bias.grad, torch.ones(4)) and net[3].weight.grad is None
    assert all(p._post_accumulate_grad_hooks in (None, {}) for p in net.parameters())
    assert all(p.grad is None for model in copies.values() for p in model.parameters())


def test_no_information_gives_the_average() -> None:
    """One class: p = 1 and every F is 0, which is no error, with a floor or without."""
    net = mlp()
    copies = [noisy_copy(net, 1), noisy_copy(net, 2)]
    task = Task(TensorImages(random(3, 5)), ZeroShotHead(random(1, 4)))
    for floor in (1e-6, 0.0):
        merged = fisher.merge(
            net, copies, tasks={"task_1": task, "task_2": task}, floor=floor, labels="expected", progress=False
        ).model()
        torch.testing.assert_close(merged[0].weight, (copies[0][0].weight + copies[1][0].weight) / 2)


def test_errors() -> None:
    net, tasks = mlp(), mlp_tasks(2)
    copies = {name: noisy_copy(net, 1) for name in tasks}
    call = {"progress": False, "images": 2}
    with pytest.raises(ValueError, match="tasks: expected images and a head for t1, got t0"):
        fisher.merge(net, copies, tasks={"t0": tasks["t0"]}, **call)
    with pytest.raises(ValueError, match="tasks: expected only t0, t1, got t2"):
        fisher.merge(net, copies, tasks=mlp_tasks(3), **call)
    with pytest.raises(ValueError, match="tasks: expected images for t1, got none"):
        fisher.merge(net, copies, tasks={**tasks, "t1": Task([], tasks["t1"].head)}, **call)
    with pytest.raises(TypeError, match="Task for t1, got Linear"):
        fisher.merge(net, copies, tasks={**tasks, "t1": net[0]}, **call)
    bad = Task(TensorImages(torch.full((2, 5), torch.nan)), tasks["t1"].head)
    with pytest.raises(UserError, match="task t1: expected finite logits"):
        fisher.merge(net, copies, tasks={**tasks, "t1": bad}, **call)
    # the logits are finite, but of three labels two are not the predicted one, and 10²⁵ squared is not
    huge = Task(TensorImages(torch.full((3, 5), 1e25), torch.arange(3)), nn.Linear(4, 3))
    flat, given = nn.Linear(5, 4), mlp_tasks(2, labelled=True)
    with pytest.raises(UserError, match=r"task task_2: expected finite gradients.*weight"):
        fisher.merge(flat, [flat, flat], tasks={"task_1": given["t0"], "task_2": huge}, labels="given", progress=False)
    for wrong, match in (
        ({"labels": "true"}, "labels: expected"),
        ({"floor": -1.0}, "floor: expected"),
        ({"images": 0}, "images: expected"),
        ({"seed": -1}, "seed: expected"),
    ):
        with pytest.raises(ValueError, match=match):
            fisher.merge(net, copies, tasks=tasks, **{**call, **wrong})
    with pytest.raises(ValueError, match=r"t1 lacks 0\.bias"):
        fisher.merge(
            net, {**copies, "t1": {k: v for k, v in net.state_dict().items() if k != "0.bias"}}, tasks=tasks, **call
        )
