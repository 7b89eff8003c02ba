"""The closed form against dense least squares in float64, and against models that it must reproduce."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import noisy_copy
from method_cases import conv_net
from torch import Tensor, nn

import pareto_merging as pm
from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task
from pareto_merging.errors import UserError
from pareto_merging.methods import regmean, sequential
from pareto_merging.methods.chains import Batch
from pareto_merging.methods.sequential import merge_sequential, start_sequential
from pareto_merging.model.learned import get_lambda
from pareto_merging.model.parameters import merged_parameters


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(data: Mapping[str, Tensor]) -> dict[str, Task]:
    """The heads are not run."""
    return {name: Task(TensorImages(images), nn.Identity()) for name, images in data.items()}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 4))).double()


class Features(nn.Module):
    """A vision model of transformers as others are used: images to features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).pooler_output


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": 8, "patch_size": 4}
    if kind == "clip":
        return seeded(lambda: Features(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)))).eval()
    return seeded(lambda: Features(transformers.ViTModel(transformers.ViTConfig(**sizes)))).eval()


def timm_vit(**settings: Any) -> nn.Module:
    timm = pytest.importorskip("timm.models.vision_transformer")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return seeded(lambda: timm.VisionTransformer(**sizes, **settings)).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def solved(model: nn.Module, copies: Any, data: Mapping[str, Tensor], **settings: Any) -> Any:
    settings = {"rank": 2, "progress": False, **settings}
    return merge_sequential(model, copies, tasks=on(data), **settings)


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def ridge_regression(rows: Tensor, errors: Tensor, ridge: float) -> Tensor:
    """Regress errors [M, N] on rows [M, D] as least squares with rows for the ridge, ρ of the mean diagonal."""
    damping = (ridge * (rows.t() @ rows).diagonal().mean()).sqrt()
    system = torch.cat([rows, damping * torch.eye(rows.shape[1], dtype=rows.dtype)])
    right = torch.cat([errors, torch.zeros(rows.shape[1], errors.shape[1], dtype=rows.dtype)])
    return torch.linalg.lstsq(system, right).solution.t()


def test_two_layers_against_dense_least_squares() -> None:
    """With terms of full rank each chain is what least squares gives, layer after layer."""
    net = mlp()
    copies = {f"t{k}": noisy_copy(net, k, 0.3) for k in range(3)}
    data = {f"t{k}": random(20 + k, 5, seed=k).double() for k in range(3)}
    result = solved(net, copies, data, rank=16, low_rank="all", ridge=0.02, batch_size=6)
    start = regmean.merge(net, copies, tasks=on(data), images=400, alpha=1.0, ridge=1e-3, progress=False).model()
    base, own, experts = list(data.values()), list(data.values()), list(data.values())
    for index in (0, 3):
        ys = [model[index](x).detach() for model, x in zip(copies.values(), experts, strict=True)]
        first = torch.cat([start[index].weight, start[index].bias[:, None]], dim=1).detach()
        rows = torch.cat([torch.cat([u, u.new_ones(len(u), 1)], dim=1) for u in base])
        whole = first + ridge_regression(rows, torch.cat(ys) - rows @ first.t(), 0.02)
        weight, bias = whole[:, :-1], whole[:, -1]
        torch.testing.assert_close(result.model()[index].weight.detach(), weight, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(result.model()[index].bias.detach(), bias, rtol=1e-8, atol=1e-8)
        # on the tasks' own chains, from the base that is solved
        residuals = [y - u @ weight.t() - bias for u, y in zip(own, ys, strict=True)]
        maps = [ridge_regression(u, e, 0.02) for u, e in zip(own, residuals, strict=True)]
        grams = [u.t() @ u for u in own]
        inverses = [torch.linalg.inv(g + 0.02 * g.diagonal().mean() * torch.eye(len(g)).double()) for g in grams]
        shared = sum(maps) @ torch.linalg.inv(sum(inverses))
        maps = [m - shared @ inverse for m, inverse in zip(maps, inverses, strict=True)]
        for k, name in enumerate(data):
            got = result.model({name: 1.0})[index].weight.detach()
            torch.testing.assert_close(got, weight + maps[k], rtol=1e-7, atol=1e-7)
        base = [torch.tanh(u @ weight.t() + bias) for u in base]
        own = [torch.tanh(u @ (weight + m).t() + bias) for u, m in zip(own, maps, strict=True)]
        experts = [torch.tanh(y) for y in ys]
    assert result.preference_aware and result.facts["way"] == "plain" and result.facts["maps"] == 2
    assert result.facts["images"] == {"t0": 20, "t1": 21, "t2": 22} and result.facts["ridge"] == 0.02


def test_inputs_that_hardly_vary_leave_weights_of_their_size() -> None:
    """Else a step in the map before them changes everything, however small the rate.

    Of the inputs' five dimensions, turned, one hardly varies and one is almost nothing; the tasks' own differ.
    """
    net = mlp()
    copies = {f"t{k}": noisy_copy(net, k, 0.3) for k in range(3)}
    few, turned = random(4, 5, seed=9).double(), torch.linalg.qr(random(5, 5, seed=30).double()).Q
    scales = torch.diag(torch.tensor([1, 1, 1, 1e-3, 1e-5]).double())
    rows = [random(40, 4, seed=k).double() @ few + 1e-5 * random(40, 5, seed=10 + k).double() for k in range(3)]
    skewed = {f"t{k}": x @ turned @ scales for k, x in enumerate(rows)}
    result = solved(net, copies, skewed, rank=2, low_rank="all", ridge=1e-3, batch_size=20)
    largest = max(float(torch.linalg.matrix_norm(copy[0].weight.detach(), 2)) for copy in copies.values())
    assert float(torch.linalg.matrix_norm(result.model()[0].weight.detach(), 2)) < 4 * largest


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "conv": conv_net,
    "clip": lambda: hugging_face("clip"),
    "vit": lambda: hugging_face("vit"),
    "timm": timm_vit,
    "timm-scaled": lambda: timm_vit(init_values=0.3),
}
CLASSES = {"clip": "CLIPEncoderLayer", "vit": "ViTLayer", "timm": "Block", "open_clip": "ResidualAttentionBlock"}


@pytest.mark.parametrize("kind", [*MODELS, "open_clip"])
def test_one_copy_is_reproduced(kind: str, tiny_vit: nn.Module) -> None:
    net = tiny_vit if kind == "open_clip" else MODELS[kind]()
    other = noisy_copy(net, 1, 0.1)
    # running statistics stay the pretrained model's
    other.load_state_dict({name: value for name, value in state(net).items() if "running" in name}, strict=False)
    images = random(9, 5).double() if kind == "mlp" else random(9, 3, 8, 8)
    result = solved(net, {"t0": other}, {"t0": images}, low_rank="all", batch_size=4)
    assert_same(state(result.model()), state(other), 2e-5)
    assert result.facts.get("block_class") == CLASSES.get(kind)
    assert result.facts["way"] == ("residual" if kind in CLASSES else "plain")


def test_fine_tuned_running_statistics_are_the_fine_tuned_models() -> None:
    """The merged model keeps other statistics than the copy; the map after them makes good what that changes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    other = noisy_copy(net, 1, 0.1)
    with torch.no_grad():
        other[1].running_mean += 1.5
        other[1].running_var *= 3.0
    x = random(40, 5).double()
    merged = solved(net, {"t0": other}, {"t0": x}, low_rank="all", ridge=1e-9, batch_size=16).model()
    assert torch.equal(merged[1].running_mean, net[1].running_mean)
    torch.testing.assert_close(merged(x), other(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "vit", "timm", "open_clip"])
def test_streaming_equals_a_forward_per_map(kind: str, tiny_vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    net = (tiny_vit if kind == "open_clip" else MODELS[kind]()).double()
    copies = {f"t{k}": noisy_copy(net, k, 0.1) for k in range(3)}
    data = {f"t{k}": random(10, 3, 8, 8, seed=k).double() for k in range(3)}
    streamed = solved(net, copies, data, low_rank="attention", batch_size=4)
    run = sequential._Solver.run
    monkeypatch.setattr(sequential._Solver, "run", lambda self, progress: run(self, progress, whole=True))
    whole = solved(net, copies, data, low_rank="attention", batch_size=10)
    assert streamed.facts["maps"] == whole.facts["maps"]
    for gamma in ([1 / 3] * 3, [0.0, 1.0, 0.0]):
        assert_same(state(streamed.model(gamma)), state(whole.model(gamma)), 1e-7)


def test_it_is_nearer_to_the_fine_tuned_models(tiny_vit: nn.Module) -> None:
    """Features at the equal preference beat RegMean's, and those at one-hot preferences beat both."""
    copies = {f"t{k}": noisy_copy(tiny_vit, k, 0.15) for k in range(3)}
    data = {f"t{k}": random(60, 3, 8, 8, seed=k) for k in range(3)}
    result = solved(tiny_vit, copies, data, rank=8, low_rank="all", ridge=1e-2)
    start = regmean.merge(tiny_vit, copies, tasks=on(data), alpha=1.0, progress=False).model()

    @torch.no_grad()
    def error(models: Mapping[str, nn.Module]) -> float:
        return sum(float((models[name](x) - copies[name](x)).square().mean()) for name, x in data.items())

    equal, one_hot = result.model(), {name: result.model({name: 1.0}) for name in data}
    errors = error(one_hot), error(dict.fromkeys(data, equal)), error(dict.fromkeys(data, start))
    assert errors[0] < 0.8 * errors[1] < 0.6 * errors[2]


def test_the_pareto_model_is_what_is_promised(tiny_vit: nn.Module) -> None:
    copies = {f"t{k}": noisy_copy(tiny_vit, k, 0.1) for k in range(2)}
    data = {f"t{k}": random(10, 3, 8, 8, seed=k) for k in range(2)}
    net = tiny_vit.train()
    for other in copies.values():
        other.train()
    model = pm.parametrize(net, copies, rank=3)
    model.train()
    facts = start_sequential(model, net, copies, on(data), progress=False)
    assert all(inner.training for module in (model, net, *copies.values()) for inner in module.modules())
    assert model.pareto.start == "sequential"
    assert not get_lambda(model).any()
    kept = [parameter for parameter in merged_parameters(model) if parameter.A is not None]
    assert len(kept) == 4
    for parameter in kept:
        assert parameter.G.abs().max() > 0 and parameter.G.sum(dim=2).abs().max() < 1e-6
        assert parameter.A.requires_grad and not parameter.weight.requires_grad
    merged = state(pm.merge(model, [0.5, 0.5]))
    for parameter in merged_parameters(model):
        torch.testing.assert_close(merged[parameter.path], parameter.weight.detach(), rtol=1e-5, atol=1e-6)
    # blocks have four maps each, and the projection
    assert facts["maps"] == 9 and facts["block_class"] == "ResidualAttentionBlock" and facts["seconds"] >= 0
    # learning can go on from it
    model(random(2, 3, 8, 8)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_batches_and_repetition(tiny_vit: nn.Module) -> None:
    """The size of batches changes rounding only, and the same call gives the same bits."""
    net = copy.deepcopy(tiny_vit).double()
    copies = {f"t{k}": noisy_copy(net, k, 0.1) for k in range(2)}
    data = {f"t{k}": random(11, 3, 8, 8, seed=k).double() for k in range(2)}
    # five tokens: batches of five look like sequences
    first, *others = (solved(net, copies, data, batch_size=size) for size in (5, 5, 1, 100))
    for gamma in ([0.5, 0.5], [1.0, 0.0]):
        one = state(first.model(gamma))
        assert all(torch.equal(value, state(others[0].model(gamma))[name]) for name, value in one.items())
        for other in others[1:]:
            assert_same(state(other.model(gamma)), one, 1e-8)
    assert solved(net, copies, data, images=4).facts["images"] == {"t0": 4, "t1": 4}


def test_sixteen_bits(tiny_vit: nn.Module) -> None:
    """The solution in bfloat16 is as near to that in float32 as rounding the weights is, by a small factor."""
    copies = {f"t{k}": noisy_copy(tiny_vit, k, 0.1) for k in range(2)}
    data = {f"t{k}": random(40, 3, 8, 8, seed=k) for k in range(2)}
    wide = solved(tiny_vit, copies, data, ridge=0.1)
    narrow_net = copy.deepcopy(tiny_vit).bfloat16()
    narrow = solved(narrow_net, {n: copy.deepcopy(m).bfloat16() for n, m in copies.items()}, data, ridge=0.1)
    assert all(p.A is None or p.A.dtype == torch.float32 for p in merged_parameters(narrow.pareto))
    x = data["t0"]
    for gamma in ([0.5, 0.5], [1.0, 0.0]):
        exact = wide.model(gamma)(x)
        rounded = copy.deepcopy(wide.model(gamma)).bfloat16()(x.bfloat16()).float()
        got = narrow.model(gamma)(x.bfloat16())
        assert got.dtype == torch.bfloat16
        assert (got.float() - exact).norm() < 3 * (rounded - exact).norm()


def test_unread_rows_count_less(tiny_vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the class token is read of the last block: found by the gradient, and seen in the result."""
    copies = {f"t{k}": noisy_copy(tiny_vit, k, 0.2) for k in range(3)}
    data = {f"t{k}": random(50, 3, 8, 8, seed=k) for k in range(3)}

    @torch.no_grad()
    def error(result: Any) -> float:
        model = result.model()
        return sum(float((model(x) - copies[name](x)).square().mean()) for name, x in data.items())

    less = error(solved(tiny_vit, copies, data))
    monkeypatch.setattr(sequential, "UNREAD", 1.0)
    assert less < error(solved(tiny_vit, copies, data))


def test_projection_with_a_low_rank_term(tiny_vit: nn.Module) -> None:
    """open_clip's ``x @ proj`` holds the transposed map, and so its term: with full rank both chains are exact."""
    net = copy.deepcopy(tiny_vit).double()
    copies = {f"t{k}": copy.deepcopy(net) for k in range(2)}
    for k, other in enumerate(copies.values()):
        other.proj.data += 0.1 * random(*other.proj.shape, seed=k)
    # the same images: only then a base that is the mean serves both
    data = dict.fromkeys(copies, random(80, 3, 8, 8).double())
    result = solved(net, copies, data, rank=8, low_rank=lambda name, module: name == "proj", ridge=1e-9)
    for name, other in copies.items():
        torch.testing.assert_close(result.model({name: 1.0})(data[name]), other(data[name]), rtol=1e-4, atol=1e-4)


def test_separate_projections_and_biases() -> None:
    """An attention with several inputs: biases that are parts of a parameter stay, rows are solved by themselves."""

    class Crossed(nn.Module):
        def __init__(self, **sizes: int) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **sizes)
            self.shift = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            other = torch.cat([x, x], dim=-1)[..., : self.attention.kdim] + self.shift
            return self.attention(x, other, other)[0]

    for sizes in ({"kdim": 6, "vdim": 6}, {}):
        net = seeded(lambda sizes=sizes: Crossed(**sizes)).double()
        data = {f"t{k}": random(30, 3, 4, seed=k).double() for k in range(2)}
        other = noisy_copy(net, 1, 0.2)
        other.shift.data.copy_(net.shift)
        assert_same(state(solved(net, {"t0": other}, {"t0": data["t0"]}).model()), state(other), 1e-7)
        copies = {f"t{k}": noisy_copy(net, k, 0.2) for k in range(2)}
        result = solved(net, copies, data, low_rank="all", rank=2)
        assert any(p.G is not None and bool(p.G.any()) for p in merged_parameters(result.pareto))


def test_errors(tiny_vit: nn.Module) -> None:
    copies = {f"t{k}": noisy_copy(tiny_vit, k, 0.1) for k in range(2)}
    data = {f"t{k}": random(6, 3, 8, 8, seed=k) for k in range(2)}
    model = pm.parametrize(tiny_vit, copies, rank=2)
    for name, value in (("ridge", -1.0), ("ridge", float("nan")), ("images", 0), ("batch_size", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}: expected a .*, got"):
            start_sequential(model, tiny_vit, copies, on(data), progress=False, **{name: value})
    with pytest.raises(ValueError, match="tasks: expected images and a head for t1, got t0"):
        start_sequential(model, tiny_vit, copies, on({"t0": data["t0"]}), progress=False)
    with pytest.raises(ValueError, match="model: expected one Pareto model"):
        start_sequential(tiny_vit, tiny_vit, copies, on(data), progress=False)
    with pytest.raises(ValueError, match="model: expected a Pareto model with a learned core, got a folded model"):
        start_sequential(pm.fold(model), tiny_vit, copies, on(data), progress=False)
    outer = pm.parametrize(tiny_vit, copies, core="outer-product")
    with pytest.raises(ValueError, match="with a learned core, got core outer-product"):
        start_sequential(outer, tiny_vit, copies, on(data), progress=False)
    with pytest.raises(ValueError, match="pretrained: expected a plain module, got a Pareto model"):
        start_sequential(model, model, copies, on(data), progress=False)
    data["t1"][2, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"task t1: expected finite inputs of .*, got NaN or inf"):
        start_sequential(model, tiny_vit, copies, on(data), progress=False)


def test_a_model_that_overflows_is_named() -> None:
    """Finite weights whose last outputs are not: RegMean sees inputs only."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    copies = {f"t{k}": noisy_copy(net, k, 0.1) for k in range(2)}
    with torch.no_grad():
        copies["t0"][0].weight.zero_()
        copies["t0"][0].bias.fill_(1.0)
        copies["t0"][1].weight.fill_(5e37)
        copies["t0"][1].bias.fill_(3e38)
    data = {f"t{k}": 1 + random(5, 3, seed=k).abs() for k in range(2)}
    with pytest.raises(UserError, match=r"task t0: expected finite inputs and fine-tuned outputs of 1\.weight"):
        solved(net, copies, data)


def test_singular_inputs_want_a_ridge() -> None:
    net = mlp()
    copies = {f"t{k}": noisy_copy(net, k, 0.1) for k in range(2)}
    data = {f"t{k}": torch.ones(3, 5, dtype=torch.float64) for k in range(2)}
    with pytest.raises(ValueError, match=r"ridge: expected more than 0, for the inputs of 0\.weight"):
        solved(net, copies, data, ridge=0.0)
    assert Batch(torch.zeros(1)).streams == {}
