"""Default strategy, modules and a short training run on a CUDA GPU, against the CPU in float64."""

from collections.abc import Callable

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn

import pmkernels
from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task, ZeroShotHead
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.fold import fold, merge
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import set_preference
from pareto_merging.model.strategy import merged_bytes, set_strategy
from pmkernels import reference

pytestmark = pytest.mark.gpu
Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def exact_and_cuda(gamma_lead: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (4, 9, 24),
        "weight": (40, 24),
        "task_vectors": (3, 40, 24),
        "lam": (3,),
        "A": (40, 4),
        "G": (4, 4, 3),
        "B": (24, 4),
        "gamma": (*gamma_lead, 3),
        "bias": (40,),
    }
    small = ("lam", "A", "G", "B", "gamma")
    cuda, exact = {}, {}
    for name, shape in shapes.items():
        value = torch.rand(shape, generator=generator).to(torch.float32 if name in small else dtype)
        frozen = name in ("weight", "task_vectors")
        cuda[name] = value.cuda().requires_grad_(not frozen)
        exact[name] = value.double().requires_grad_(not frozen)
    return exact, cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma_lead", [(), (4, 1), (4, 9)])
def test_pareto_linear(gamma_lead: tuple[int, ...], dtype: torch.dtype) -> None:
    exact, cuda = exact_and_cuda(gamma_lead, dtype)
    expected, y = reference.pareto_linear(**exact), pmkernels.pareto_linear(**cuda)
    tolerance = 16 * torch.finfo(dtype).eps
    assert (y.double().cpu() - expected).abs().max() <= tolerance * expected.abs().max()
    names = [name for name, value in exact.items() if value.requires_grad]
    dy = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad(expected, [exact[n] for n in names], dy.double())
    ours = torch.autograd.grad(y, [cuda[n] for n in names], dy.cuda().to(dtype))
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a.double().cpu() - b).abs().max() <= 2 * tolerance * b.abs().max(), name


def test_a_model_moves_to_the_gpu_and_gives_the_same_results(tiny_vit: nn.Module, copies: Copies) -> None:
    model = randomize(parametrize(tiny_vit, copies(tiny_vit, 3), rank=2))
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gammas = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    set_preference(model, gammas)
    expected = model(images)
    model.cuda()
    for moved in (model, fold(model)):
        set_preference(moved, gammas)
        torch.testing.assert_close(moved(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)
    alone = merge(model, gammas[2])(images[2:3].cuda()).cpu()
    torch.testing.assert_close(alone, expected[2:3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_runs_and_repeats(tiny_vit: nn.Module, copies: Copies, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tasks = {
        f"t{k}": Task(
            TensorImages(torch.randn(20, 3, 8, 8, generator=generator)),
            ZeroShotHead(torch.randn(5, 8, generator=generator), 10.0).cuda(),
        )
        for k in range(2)
    }
    settings = MethodSettings.model_validate({"steps": 8, "batch_size": 6, "rank": 2})
    finetuned = {name: module.cuda() for name, module in copies(tiny_vit, 2).items()}
    runs = []
    for _ in range(2):
        model = parametrize(tiny_vit.cuda(), finetuned, rank=2).to(dtype)
        result = learn_pareto_set(model, tasks, settings, progress=False)
        assert result.steps == 8
        runs.append({name: p.detach().clone() for name, p in learned_parameters(model).items()})
    for name, value in runs[0].items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, runs[1][name])


def _tasks(count: int, generator: torch.Generator) -> dict[str, Task]:
    return {
        f"t{k}": Task(
            TensorImages(torch.randn(20, 3, 8, 8, generator=generator)),
            ZeroShotHead(torch.randn(5 + k, 8, generator=generator), 10.0).cuda(),
        )
        for k in range(count)
    }


@pytest.mark.parametrize("strategy", ["auto", "cached", "streamed", "fused", "eager"])
@pytest.mark.parametrize("objective", ["entropy", "weight-distance"])
def test_a_captured_step_has_the_bits_of_one_that_is_not(
    tiny_vit: nn.Module, copies: Copies, objective: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a convolution's gradient may otherwise be computed in another way the second time
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings = MethodSettings.model_validate({"steps": 6, "batch_size": 6, "rank": 2, "objective": objective})
    finetuned = {name: module.cuda() for name, module in copies(tiny_vit, 2).items()}
    runs = {}
    for graphs in ("off", "on"):
        tasks = _tasks(2, torch.Generator().manual_seed(0)) if objective == "entropy" else None
        model = parametrize(tiny_vit.cuda(), finetuned, rank=2)
        set_strategy(model, strategy)
        learn_pareto_set(model, tasks, settings, progress=False, cuda_graphs=graphs)
        runs[graphs] = {name: p.detach().clone() for name, p in learned_parameters(model).items()}
    for name, value in runs["off"].items():
        assert torch.equal(value, runs["on"][name]), name


@pytest.mark.parametrize("strategy", ["auto", "cached", "streamed", "fused", "eager"])
def test_every_strategy_learns_the_same(tiny_vit: nn.Module, copies: Copies, strategy: str) -> None:
    settings = MethodSettings.model_validate({"steps": 5, "batch_size": 6, "rank": 2})
    generator = torch.Generator().manual_seed(0)
    on_cpu = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    tasks = _tasks(2, generator)
    finetuned = {name: module.cuda() for name, module in copies(tiny_vit, 2).items()}
    model = parametrize(tiny_vit.cuda(), finetuned, rank=2)
    set_strategy(model, strategy)
    learn_pareto_set(model, tasks, settings, progress=False)
    for task in tasks.values():
        task.head.cpu()
    learn_pareto_set(on_cpu, tasks, settings, progress=False)
    expected = learned_parameters(on_cpu)
    for name, value in learned_parameters(model).items():
        # Adam's first steps have the size of the rate whatever the gradient: half of them is a sign gone wrong
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-2, atol=5e-4, msg=name)


def test_a_model_that_cannot_be_captured_is_learned_without(tiny_vit: nn.Module, copies: Copies) -> None:
    class Waits(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y if float(y.sum()) > -1e30 else -y

    settings = MethodSettings.model_validate({"steps": 4, "batch_size": 6, "rank": 2})
    finetuned = {name: Waits(module).cuda() for name, module in copies(tiny_vit, 2).items()}
    said: list[str] = []
    runs = {}
    for graphs in ("auto", "off"):
        model = parametrize(Waits(tiny_vit).cuda(), finetuned, rank=2)
        tasks = _tasks(2, torch.Generator().manual_seed(0))
        learn_pareto_set(model, tasks, settings, progress=False, cuda_graphs=graphs, on_warning=said.append)
        runs[graphs] = {name: p.detach().clone() for name, p in learned_parameters(model).items()}
    assert [text for text in said if text.startswith("cuda_graphs: going on without")] == said[:1] != []
    for name, value in runs["off"].items():
        assert torch.equal(value, runs["auto"][name]), name


def test_the_budget_decides_what_is_kept(tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned = {name: module.cuda() for name, module in copies(tiny_vit, 2).items()}
    model = randomize(parametrize(tiny_vit.cuda(), finetuned, rank=2))
    images = torch.randn(5, 3, 8, 8, device="cuda")
    expected = model(images)
    needed = merged_bytes(model)
    with pytest.raises(ValueError, match=r"memory_budget: expected at least \d+ bytes"):
        set_strategy(model, "cached", memory_budget=needed - 1)
    with pytest.raises(ValueError, match=r"memory_budget: expected at most the .* of cuda:0"):
        set_strategy(model, "cached", memory_budget=2**50)
    set_strategy(model, "cached", memory_budget=needed)
    for _ in range(2):
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    assert model.pareto.now.cache.bytes <= needed
