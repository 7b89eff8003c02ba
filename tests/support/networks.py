"""Networks of every kind that is parametrized, and their merged weights by hand."""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from torch import Tensor, nn

import pareto_merging as pm
from pareto_merging.model.learned import learned_parameters

GAMMAS = [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.embed(tokens))))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4, bias=False))


def hugging_face_clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return transformers.CLIPVisionModel(config)


def open_clip_attention() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=8,
        patch_size=4,
        width=32,
        layers=1,
        heads=2,
        mlp_ratio=2.0,
        output_dim=8,
        qk_norm=True,
        scale_heads=True,
    )


def transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)


def recurrent() -> nn.Module:
    return nn.LSTM(5, 7, num_layers=2, batch_first=True)


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "conv": (conv_net, IMAGES, "all"),
    "mlp": (mlp, torch.randn(5, 6, generator=torch.Generator().manual_seed(5)), "all"),
    "tied": (Tied, torch.arange(10).view(5, 2), "all"),
    "tied λ only": (Tied, torch.arange(10).view(5, 2), "none"),
    "Hugging Face": (hugging_face_clip, IMAGES, "attention"),
    "open_clip Attention": (open_clip_attention, IMAGES, "attention"),
    "encoder layer": (transformer_layer, torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(5)), "all"),
    "LSTM": (recurrent, torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(5)), "none"),
}


def build(name: str) -> tuple[nn.Module, Tensor, str]:
    make, x, low_rank = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), x, low_rank


def output(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result.pooler_output if hasattr(result, "pooler_output") else result[0]


def by_hand(pretrained: nn.Module, copies: dict[str, nn.Module], model: nn.Module, gamma: list[float]) -> nn.Module:
    """The merged model from the formula, in plain loops over names: no code of ours but the learned numbers."""
    merged = copy.deepcopy(pretrained).double()
    base = {name: p.double() for name, p in pretrained.named_parameters(remove_duplicate=False)}
    learned = {name: value.detach().double() for name, value in learned_parameters(model).items()}
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            value = base[name].clone()
            for k, other in enumerate(copies.values()):
                tau = dict(other.named_parameters(remove_duplicate=False))[name].double() - base[name]
                if f"lam.{name}" in learned:
                    value += learned[f"lam.{name}"][k] * tau
            if f"A.{name}" in learned:
                core = sum(g * learned[f"G.{name}"][:, :, k] for k, g in enumerate(gamma))
                value += learned[f"A.{name}"] @ core @ learned[f"B.{name}"].T
            parameter.copy_(value)
    return merged


class Scaled(nn.Module):
    """A linear layer that was given a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.fc.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.fc.scale


class Extra(nn.Linear):
    """A module that keeps more than tensors in its state dict."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}


def shared_module() -> nn.Module:
    activation, linear = nn.PReLU(), nn.Linear(4, 4)
    return nn.Sequential(linear, activation, nn.LayerNorm(4), linear, activation)


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())


class Lazy(Mapping[str, Tensor]):
    """Reads: every access is new memory, and what was read before must be gone by then."""

    def __init__(self, tensors: Mapping[str, Tensor], with_shapes: bool = True) -> None:
        self.tensors = tensors
        self.reads: Counter[str] = Counter()
        self.last: weakref.ref[Any] | None = None
        if with_shapes:
            self.shapes = {name: tuple(value.shape) for name, value in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        assert self.last is None or self.last() is None, f"{name} is read while another tensor is held"
        self.reads[name] += 1
        value = self.tensors[name].detach().clone()
        # the memory, whatever tensors there are of it
        self.last = weakref.ref(value.untyped_storage())
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def bits(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (value.dtype, value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


TASKS = 3


class Everything(nn.Module):
    """Tied embedding and output, convolution, batch norm, attention with q, k and v apart, GRU, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 4, 1)
        self.bn = nn.BatchNorm1d(4)
        self.attn = nn.MultiheadAttention(4, 2, kdim=6, vdim=6, batch_first=True)
        self.gru = nn.GRU(4, 5, batch_first=True)
        self.self_attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(5, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x)
        q = self.bn(self.conv(e.transpose(1, 2))).transpose(1, 2)
        a, _ = self.attn(q, e, e)
        h, _ = self.gru(a)
        z = self.norm(self.fc(h))
        # query alone, then key and value together: rows of the in-projection
        return self.out(z + self.self_attn(z, e, e, need_weights=False)[0])


def pareto(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Everything().eval().to(dtype)
    settings = {"rank": 2, "low_rank": "all", **settings}
    return randomize(pm.parametrize(net, {f"t{k}": noisy_copy(net, k + 1, 0.2) for k in range(TASKS)}, **settings))


def linears(dtype: torch.dtype = torch.float32, low_rank: str = "all") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 5)).to(dtype)
    finetuned = {f"t{k}": noisy_copy(net, k + 1, 0.2) for k in range(TASKS)}
    return randomize(pm.parametrize(net, finetuned, rank=2, low_rank=low_rank))
