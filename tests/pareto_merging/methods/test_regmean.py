"""RegMean against plain matrix products of the inputs that hooks and hand-written forwards see."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import noisy_copy
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_merging.data.sources import TensorImages, batch_indices
from pareto_merging.data.tasks import Task
from pareto_merging.errors import UserError
from pareto_merging.methods import regmean
from pareto_merging.methods.regmean import GramRecorder, Rows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 4, bias=False)))


def on(data: Mapping[str, Tensor]) -> dict[str, Task]:
    """The heads are not run."""
    return {name: Task(TensorImages(images), nn.Identity()) for name, images in data.items()}


def plain(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], alpha: float = 0.9, ridge: float = 1e-6, right: bool = False
) -> Tensor:
    """The equation in float64: K inputs [*, D], K weights [N, D] ([D, N] with ``right``)."""
    ws = [w.detach().double() if right else w.detach().double().t() for w in weights]
    grams = []
    for x in inputs:
        x = x.detach().double().reshape(-1, x.shape[-1])
        gram = x.t() @ x / len(x)
        grams.append(alpha * gram + (1 - alpha) * torch.diag(gram.diagonal()))
    total = sum(grams)
    eps = ridge * total.diagonal().mean()
    target = sum(g @ w for g, w in zip(grams, ws, strict=True)) + eps * sum(ws) / len(ws)
    solved = torch.linalg.inv(total + eps * torch.eye(len(total), dtype=torch.float64)) @ target
    return solved if right else solved.t()


def hooked(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """The inputs of modules of a copy, from forward hooks."""
    model, found = copy.deepcopy(model).eval(), {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found.setdefault(name, args[0].detach())
        )
    model(images)
    return found


def assert_close(got: Tensor, expected: Tensor, name: str = "", rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(
        got.detach().double(), expected.detach().double(), rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}"
    )


def mean(tensors: Sequence[Tensor]) -> Tensor:
    return sum(t.detach().double() for t in tensors) / len(tensors)


def test_worked_example() -> None:
    """One input: x = 1 and 2, w = 0 and 5: (1·0 + 4·5) / (1 + 4) = 4. Two inputs, α = 1/2, by hand below."""
    net = nn.Linear(1, 1, bias=False)
    copies = {"a": {"weight": torch.zeros(1, 1)}, "b": {"weight": torch.full((1, 1), 5.0)}}
    data = {"a": torch.ones(3, 1), "b": torch.full((2, 1), 2.0)}
    merged = regmean.merge(net, copies, tasks=on(data), ridge=0.0, progress=False).model()
    assert_close(merged.weight, torch.tensor([[4.0]]))

    # X_a = [[1, 1], [1, 1]]: G = [[1, 1], [1, 1]], scaled [[1, ½], [½, 1]]; X_b = [[2, 0]]: G = [[4, 0], [0, 0]]
    # the sum [[5, ½], [½, 1]], Σ G W = [[1, ½], [½, 1]]·(2, 0) + [[4, 0], [0, 0]]·(7, 3) = (30, 1)
    # its inverse is 4/19·[[1, −½], [−½, 5]]: W = 4/19·(29½, −10) = (118, −40)/19
    net = nn.Linear(2, 1, bias=False)
    copies = {"a": {"weight": torch.tensor([[2.0, 0.0]])}, "b": {"weight": torch.tensor([[7.0, 3.0]])}}
    data = {"a": torch.ones(2, 2), "b": torch.tensor([[2.0, 0.0]])}
    merged = regmean.merge(net, copies, tasks=on(data), alpha=0.5, ridge=0.0, progress=False)
    assert_close(merged.model().weight, torch.tensor([[118 / 19, -40 / 19]]))
    assert merged.facts == {"linear_maps": ["weight"]} and not merged.preference_aware


def test_minimises_the_distance_of_outputs() -> None:
    """α = 1, ridge = 0: argmin_W Σ_k ‖X_k Wᵀ − X_k W_kᵀ‖² / rows_k, by least squares on the stacked rows."""
    net = nn.Linear(5, 3).double()
    copies = {f"t{k}": noisy_copy(net, k, 1.0) for k in range(3)}
    data = {f"t{k}": random(6 + 5 * k, 5, seed=k).double() for k in range(3)}
    merged = regmean.merge(
        net, copies, tasks=on(data), alpha=1.0, ridge=0.0, images=30, batch_size=4, progress=False
    ).model()
    rows = torch.cat([x / len(x) ** 0.5 for x in data.values()])
    targets = torch.cat([x @ copies[n].weight.detach().t() / len(x) ** 0.5 for n, x in data.items()])
    assert_close(merged.weight, torch.linalg.lstsq(rows, targets).solution.t(), rtol=1e-9, atol=1e-9)
    assert_close(merged.bias, mean([m.bias for m in copies.values()]))


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_mlp_against_plain_products(alpha: float) -> None:
    net = mlp().train()
    copies = {f"t{k}": noisy_copy(net, k, 0.5) for k in range(3)}
    data = {f"t{k}": random(20, 5, seed=k) for k in range(3)}
    chosen = batch_indices(20, 15, 0, (2, 3))
    merged = regmean.merge(
        net, copies, tasks=on(data), alpha=alpha, images=15, batch_size=4, seed=2, progress=False
    ).model()
    seen = [hooked(copies[name], ["0", "3"], data[name][chosen]) for name in copies]
    for name in ("0", "3"):
        weights = [model.get_submodule(name).weight for model in copies.values()]
        expected = plain([inputs[name] for inputs in seen], weights, alpha)
        assert_close(merged.get_submodule(name).weight, expected, name)
        assert not torch.allclose(expected, mean(weights), atol=1e-2)
    assert_close(merged[0].bias, mean([model[0].bias for model in copies.values()]))


def test_vit_attention_and_projection(tiny_vit: nn.Module) -> None:
    """Each linear map of open_clip's transformer, against inputs from hooks and an attention written out."""
    copies = {f"t{k}": noisy_copy(tiny_vit, k, 0.2) for k in range(2)}
    data = {name: random(7, 3, 8, 8, seed=k) for k, name in enumerate(copies)}
    result = regmean.merge(tiny_vit, copies, tasks=on(data), batch_size=3, progress=False)
    merged = result.model()
    blocks = [f"transformer.resblocks.{index}" for index in range(2)]
    parts = {"attn.in_proj_weight": "ln_1", "mlp.c_fc.weight": "mlp.c_fc", "mlp.c_proj.weight": "mlp.c_proj"}
    maps = [f"{block}.{name}" for block in blocks for name in (*parts, "attn.out_proj.weight")] + ["proj"]
    assert sorted(result.facts["linear_maps"]) == sorted(maps)
    inputs: dict[str, list[Tensor]] = {name: [] for name in maps}
    for name, model in copies.items():
        wanted = [f"{b}.{part}" for b in blocks for part in parts.values()]
        seen = hooked(model, wanted, data[name])
        for block in blocks:
            x = F.layer_norm(seen[f"{block}.ln_1"], (32,), *model.get_submodule(f"{block}.ln_1").parameters())
            inputs[f"{block}.attn.in_proj_weight"].append(x)
            inputs[f"{block}.attn.out_proj.weight"].append(heads(model.get_submodule(f"{block}.attn"), x, x, x))
            for part in ("c_fc", "c_proj"):
                inputs[f"{block}.mlp.{part}.weight"].append(seen[f"{block}.mlp.{part}"])
        without = copy.deepcopy(model).eval()
        without.proj = None
        inputs["proj"].append(without(data[name]))
    for name, xs in inputs.items():
        weights = [model.get_parameter(name) for model in copies.values()]
        expected = plain(xs, weights, right=name == "proj")
        assert_close(merged.get_parameter(name), expected, name, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(expected, mean(weights), atol=1e-2), name
    for name, parameter in merged.named_parameters():
        if name not in maps:
            assert_close(parameter, mean([model.get_parameter(name) for model in copies.values()]), name)


def heads(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What enters the output projection of a batch-first attention: [batch, L, E]."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    biases = attention.in_proj_bias.chunk(3)
    q, k, v = (
        (x @ w.t() + b).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    scores = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
    return (scores @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_fused_transformer_layer(norm_first: bool, batch_first: bool) -> None:
    """PyTorch's fused path of an encoder layer in eval mode without gradients must not swallow the calls."""
    layer = seeded(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first, dropout=0.3)
    )
    net = nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first),
        nn.Flatten(),
        nn.Linear(24, 3, bias=False),
    ).eval()
    copies = {f"t{k}": noisy_copy(net, k, 0.2) for k in range(2)}
    data = {name: random(6, 3, 8, seed=k) for k, name in enumerate(copies)}
    result = regmean.merge(net, copies, tasks=on(data), batch_size=6, progress=False)
    assert len(result.facts["linear_maps"]) == 9
    merged, start = result.model()[0].layers[0], [data[n][batch_indices(6, 6, 0, (0, 3))] for n in copies]
    xs = [copies[n][0].layers[0].norm1(x) if norm_first else x for n, x in zip(copies, start, strict=True)]
    attentions = [model[0].layers[0].self_attn for model in copies.values()]
    assert_close(merged.self_attn.in_proj_weight, plain(xs, [a.in_proj_weight for a in attentions]), "in_proj")
    if batch_first:
        joined = [heads(a, x, x, x) for a, x in zip(attentions, xs, strict=True)]
        expected = plain(joined, [a.out_proj.weight for a in attentions])
        assert_close(merged.self_attn.out_proj.weight, expected, "out_proj")


class Cross(nn.Module):
    """Queries that are parameters, and keys and values that are the same, or not, or of other widths."""

    def __init__(self, kdim: int | None, same: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True, kdim=kdim, vdim=kdim)
        self.query = nn.Parameter(torch.randn(1, 2, 4))
        self.same = same

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query.expand(len(x), -1, -1), x, x if self.same else torch.tanh(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(*self.inputs(x))[0].flatten(1)


@pytest.mark.parametrize(("kdim", "same"), [(None, True), (None, False), (3, True), (3, False)])
def test_cross_attention(kdim: int | None, same: bool) -> None:
    net = seeded(lambda: Cross(kdim, same))
    copies = {f"t{k}": noisy_copy(net, k, 0.3) for k in range(2)}
    data = {name: random(6, 5, kdim or 4, seed=k) for k, name in enumerate(copies)}
    merged = regmean.merge(net, copies, tasks=on(data), progress=False).model().attn
    inputs = [copies[name].inputs(x) for name, x in data.items()]
    attentions = [model.attn for model in copies.values()]
    for part, name in enumerate(("q_proj_weight", "k_proj_weight", "v_proj_weight")):
        if kdim is None:
            got, weights = merged.in_proj_weight.chunk(3)[part], [a.in_proj_weight.chunk(3)[part] for a in attentions]
        else:
            got, weights = getattr(merged, name), [getattr(a, name) for a in attentions]
        assert_close(got, plain([x[part] for x in inputs], weights), name, atol=1e-4)
    joined = [heads(a, *x) for a, x in zip(attentions, inputs, strict=True)]
    assert_close(merged.out_proj.weight, plain(joined, [a.out_proj.weight for a in attentions]), "out_proj")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_recording_changes_no_result(need_weights: bool, average: bool, masked: bool) -> None:
    attention = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=masked)).eval()
    x = random(3, 5, 8)
    one = x[0]
    how: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average}
    if masked:
        how["key_padding_mask"] = torch.arange(5) >= torch.tensor([[3], [5], [4]])
        how["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        expected = attention(x, x, x, **how)
        single = attention(one, one, one)
        with GramRecorder(dict(attention.named_parameters())) as recorder:
            got = attention(x, x, x, **how)
            alone = attention(one, one, one)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(alone, single)
    means = recorder.means()
    assert set(means) == {Rows("in_proj_weight", 0, 24, False), Rows("out_proj.weight", 0, 8, False)}
    rows = torch.cat([x.flatten(0, 1), one])
    assert_close(means[Rows("in_proj_weight", 0, 24, False)], rows.t() @ rows / 20)


def test_self_and_cross_use_of_one_attention() -> None:
    """Some rows have Grams of both kinds of use; each kind is averaged over its own rows."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            other = torch.sin(x[:, :2])
            return self.attn(x, x, x)[0].sum() + self.attn(other, x, x)[0].sum()

    net = seeded(Both)
    copies = {f"t{k}": noisy_copy(net, k, 0.3) for k in range(2)}
    data = {name: random(6, 4, 4, seed=k) for k, name in enumerate(copies)}
    merged = regmean.merge(net, copies, tasks=on(data), progress=False).model().attn.in_proj_weight.chunk(3)
    weights = [model.attn.in_proj_weight.chunk(3) for model in copies.values()]
    # as many rows of either: x twice, so that the sum of means is that of the stacked rows, up to a factor
    queries = [torch.cat([x, torch.sin(x[:, :2]), torch.sin(x[:, :2])], dim=1) for x in data.values()]
    assert_close(merged[0], plain(queries, [w[0] for w in weights]), "query", atol=1e-4)
    for part in (1, 2):
        assert_close(merged[part], plain(list(data.values()), [w[part] for w in weights]), "key, value", atol=1e-4)


class Uses(nn.Module):
    """One matrix, used in every way that is seen, and in one that is not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.matrix, self.how = nn.Parameter(torch.randn(4, 4)), how

    def forward(self, x: Tensor) -> Tensor:
        return {
            "matmul": lambda: torch.matmul(x, self.matrix),
            "method": lambda: x.matmul(self.matrix),
            "keyword": lambda: torch.matmul(input=x, other=self.matrix),
            "mm": lambda: torch.mm(x, self.matrix),
            "mm method": lambda: x.mm(mat2=self.matrix),
            "operator": lambda: x @ self.matrix,
            "linear": lambda: F.linear(x, self.matrix),
            "linear by keyword": lambda: F.linear(input=x, weight=self.matrix, bias=None),
            "twice": lambda: F.linear(x, self.matrix) + F.linear(torch.sin(x), self.matrix),
            "both ways": lambda: F.linear(x, self.matrix) + torch.sin(x) @ self.matrix,
            "embedding too": lambda: F.linear(x + F.embedding(torch.tensor(1), self.matrix).detach() * 0, self.matrix),
            "vector": lambda: torch.stack([row @ self.matrix for row in x]),
            "other operand": lambda: self.matrix @ x.t(),
        }[self.how]()

    @staticmethod
    def data() -> dict[str, Tensor]:
        return {f"t{k}": random(9, 4, seed=k) for k in range(2)}


@pytest.mark.parametrize("how", ["matmul", "method", "keyword", "mm", "mm method", "operator", "vector"])
def test_every_way_to_multiply_from_the_right(how: str) -> None:
    check_use(how, lambda data, weights: plain(list(data.values()), weights, right=True))


@pytest.mark.parametrize("how", ["linear", "linear by keyword", "both ways", "embedding too"])
def test_every_way_to_call_linear(how: str) -> None:
    check_use(how, lambda data, weights: plain(list(data.values()), weights))


def test_grams_of_two_uses_add_and_other_uses_average() -> None:
    twice = [torch.cat([x, torch.sin(x)]) for x in Uses.data().values()]
    check_use("twice", lambda data, weights: plain(twice, weights))
    check_use("other operand", lambda data, weights: mean(weights))


def check_use(how: str, expected: Callable[[Mapping[str, Tensor], Sequence[Tensor]], Tensor]) -> None:
    net, data = seeded(lambda: Uses(how)), Uses.data()
    copies = {name: noisy_copy(net, k, 0.5) for k, name in enumerate(data)}
    merged = regmean.merge(net, copies, tasks=on(data), progress=False).model()
    assert_close(merged.matrix, expected(data, [model.matrix for model in copies.values()]))


def test_one_copy_and_equal_copies(tiny_vit: nn.Module) -> None:
    """Whatever the rounding of badly conditioned Grams: two images, α = 1 and next to no ridge."""
    tuned = noisy_copy(tiny_vit, 1)
    for count in (1, 3):
        tasks = on({f"task_{k + 1}": random(2, 3, 8, 8, seed=k) for k in range(count)})
        merged = regmean.merge(tiny_vit, [tuned] * count, tasks=tasks, alpha=1.0, ridge=1e-9, progress=False).model()
        assert type(merged) is type(tiny_vit)
        for name, parameter in merged.named_parameters():
            assert_close(parameter, tuned.get_parameter(name), name, rtol=1e-5, atol=1e-6)


def test_inputs_that_never_fire_give_the_average() -> None:
    net = nn.Linear(4, 2, bias=False)
    copies = {f"t{k}": noisy_copy(net, k, 0.5) for k in range(2)}
    data = {name: random(9, 4, seed=k) * torch.tensor([1.0, 1.0, 0.0, 1.0]) for k, name in enumerate(copies)}
    merged = regmean.merge(net, copies, tasks=on(data), progress=False).model()
    average = mean([model.weight for model in copies.values()])
    assert_close(merged.weight[:, 2], average[:, 2])
    assert not torch.allclose(merged.weight[:, 0].double(), average[:, 0], atol=1e-3)
    with pytest.raises(ValueError, match="ridge: expected more than 0, for the inputs of weight"):
        regmean.merge(net, copies, tasks=on(data), ridge=0.0, progress=False)
    nothing = on({name: torch.zeros(3, 4) for name in copies})
    assert_close(regmean.merge(net, copies, tasks=nothing, ridge=0.0, progress=False).model().weight, average)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("counter", torch.tensor(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def test_tied_weights_buffers_and_state_dicts() -> None:
    net = seeded(Tied)
    copies = {f"t{k}": noisy_copy(net, k, 0.3) for k in range(2)}
    data = {name: random(9, 4, seed=k) for k, name in enumerate(copies)}
    merged = regmean.merge(net, copies, tasks=on(data), progress=False).model()
    assert merged.second.weight is merged.first.weight
    seen = [hooked(copies[name], ["first", "second"], data[name]) for name in copies]
    inputs = [torch.cat([s["first"], s["second"]]) for s in seen]
    assert_close(merged.first.weight, plain(inputs, [model.first.weight for model in copies.values()]))
    assert_close(merged.norm.running_mean, mean([model.norm.running_mean for model in copies.values()]))
    assert int(merged.counter) == 5
    dicts = {name: dict(model.state_dict()) for name, model in copies.items()}
    # a file may name a tied tensor once, and not by its first name
    del dicts["t1"]["first.weight"]
    again = regmean.merge(net, dicts, tasks=on(data), progress=False).model()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in merged.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    net = mlp().to(dtype)
    copies = {f"t{k}": noisy_copy(net, k, 0.5) for k in range(2)}
    data = {name: random(20, 5, seed=k) for k, name in enumerate(copies)}
    merged = regmean.merge(net, copies, tasks=on(data), progress=False).model()
    assert all(p.dtype == dtype for p in merged.parameters())
    seen = [hooked(copies[name], ["0", "3"], data[name].to(dtype)) for name in copies]
    for name in ("0", "3"):
        expected = plain([s[name] for s in seen], [m.get_submodule(name).weight for m in copies.values()])
        # the inputs are the same 16-bit numbers, so only the result is rounded
        assert_close(
            merged.get_submodule(name).weight,
            expected,
            name,
            rtol=1e-9 if dtype == torch.float64 else 2**-7,
            atol=1e-9 if dtype == torch.float64 else 1e-3,
        )


def test_nothing_is_left_behind_and_same_bits(tiny_vit: nn.Module) -> None:
    copies = {f"t{k}": noisy_copy(tiny_vit, k).train() for k in range(2)}
    tasks = on({name: random(9, 3, 8, 8, seed=k) for k, name in enumerate(copies)})
    models = (tiny_vit, *copies.values())
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in models]
    state = torch.get_rng_state()
    first, second, other = (
        regmean.merge(tiny_vit, copies, tasks=tasks, images=4, seed=seed, progress=False).model().state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["proj"], other["proj"])
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(values[n], v) for n, v in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not tiny_vit.training and all(model.training for model in copies.values())


def test_errors() -> None:
    net = mlp()
    copies = {f"t{k}": noisy_copy(net, k) for k in range(2)}
    tasks = on({name: random(4, 5) for name in copies})
    with pytest.raises(ValueError, match="tasks: expected images and a head for t1, got t0"):
        regmean.merge(net, copies, tasks={"t0": tasks["t0"]}, progress=False)
    with pytest.raises(ValueError, match="tasks: expected images for t1, got none"):
        regmean.merge(net, copies, tasks={**tasks, "t1": Task([], nn.Identity())}, progress=False)
    bad = on({"t1": torch.full((2, 5), torch.inf)})
    with pytest.raises(UserError, match=r"task t1: expected finite inputs of 0\.weight"):
        regmean.merge(net, copies, tasks={**tasks, **bad}, progress=False)
    for wrong, match in (
        ({"alpha": 1.5}, r"alpha: expected a number in \[0, 1\]"),
        ({"ridge": float("inf")}, "ridge: expected a number that is finite"),
        ({"images": True}, "images: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
    ):
        with pytest.raises(ValueError, match=match):
            regmean.merge(net, copies, tasks=tasks, progress=False, **wrong)
