"""A small valid file for each reader."""

import argparse
import contextlib
import io
import json
import struct
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fuzz.readers import READERS, Answer
from torch import Tensor, nn

Files = dict[str, bytes]


@dataclass(frozen=True)
class Sample:
    """A valid checkpoint.

    Attributes:
        files: name -> content. opened: the name of what is opened, ``""`` for the folder. tensors: the right answer;
            empty for the pickle machine, whose answer is no tensors. container: how its bytes are laid out.
    """

    files: Files
    opened: str
    tensors: Answer
    container: str

    @property
    def has_checksums(self) -> bool:
        """Whether every byte that matters is covered by a checksum."""
        return self.container == "zip"


def _tensors() -> Answer:
    """A few small tensors of several types, all values different, one a view of another's storage."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) + 0.5
    return {
        "first.weight": base,
        "first.part": base[1:3, ::2],
        "second.half": torch.arange(100, 112, dtype=torch.float16),
        "second.bfloat": (torch.arange(7) + 300).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7.25),
    }


def _clip(heads: int = 2) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = VisionTransformer(
            image_size=8, patch_size=4, width=8, layers=1, heads=heads, mlp_ratio=2.0, output_dim=4
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model.eval()


def _hugging_face() -> tuple[Answer, dict[str, Any]]:
    """The weights of :func:`_clip` in Hugging Face's names, and the configuration."""
    state = {name: tensor.detach() for name, tensor in _clip().state_dict().items()}
    block, layer = "transformer.resblocks.0", "vision_model.encoder.layers.0"
    found = {
        "visual_projection.weight": state["proj"].t().contiguous(),
        "vision_model.embeddings.class_embedding": state["class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        found[f"vision_model.pre_layrnorm.{kind}"] = state[f"ln_pre.{kind}"]
        found[f"vision_model.post_layernorm.{kind}"] = state[f"ln_post.{kind}"]
        others = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
        for ours, theirs in {**others, "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}.items():
            found[f"{layer}.{theirs}.{kind}"] = state[f"{block}.{ours}.{kind}"]
        for letter, part in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
            found[f"{layer}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
    config = {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 4,
        "hidden_act": "quick_gelu",
    }
    return found, config


def _saved(value: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _saved_legacy() -> bytes:
    """The legacy format has addresses as names, in their order: chosen and renamed, so that every run has the same."""
    kept: list[Tensor] = []
    tensors: Answer = {}
    for name, tensor in _tensors().items():
        if name == "first.part":
            tensors[name] = tensors["first.weight"][1:3, ::2]
            continue
        for _ in range(10_000):
            kept.append(tensor.clone())
            if not tensors or kept[-1].untyped_storage()._cdata > max(
                t.untyped_storage()._cdata for t in tensors.values()
            ):
                break
        tensors[name] = kept[-1]
    content = _saved(tensors, legacy=True)
    addresses = {str(tensor.untyped_storage()._cdata) for tensor in tensors.values()}
    for index, address in enumerate(sorted(addresses)):
        renamed = str(index + 1).zfill(14)
        # BINUNICODE has the length in front
        old, new = (b"X" + struct.pack("<I", len(text)) + text.encode() for text in (address, renamed))
        content = content.replace(old, new)
    return content


@contextlib.contextmanager
def _strangers_module() -> Iterator[types.ModuleType]:
    """``src.modeling``, while something of it is pickled."""
    package, module = types.ModuleType("src"), types.ModuleType("src.modeling")
    package.modeling = module  # type: ignore[attr-defined]
    # torch.save keeps a module's source where it has a file
    module.__file__ = __file__
    sys.modules.update({"src": package, "src.modeling": module})
    try:
        yield module
    finally:
        del sys.modules["src"], sys.modules["src.modeling"]


def _stranger(module: types.ModuleType, name: str, base: type[nn.Module]) -> Any:
    made = type(name, (base,), {"__module__": "src.modeling"})
    setattr(module, name, made)
    return made


def _task_vectors() -> bytes:
    with _strangers_module() as module:
        encoder = _stranger(module, "ImageEncoder", nn.Module)()
        encoder.model = nn.Module()
        encoder.model.visual = _clip()
        return _saved(encoder)


def _head() -> bytes:
    with _strangers_module() as module:
        head = _stranger(module, "ClassificationHead", nn.Linear)(6, 5)
        weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        head.weight = nn.Parameter(100 * weight / weight.norm(dim=1, keepdim=True))
        head.bias = nn.Parameter(torch.zeros(5))
        head.normalize = True
        return _saved(head)


class _Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        nn.init.constant_(self.inner.weight, 0.25)
        nn.init.constant_(self.inner.bias, 1.5)
        self.register_buffer("kept", torch.arange(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    content: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    return content


@cache
def sample(reader: str) -> Sample:
    """The valid file of one of :data:`READERS`, with the answer that its reader gives."""
    files, opened, container = valid_files(reader)
    with tempfile.TemporaryDirectory() as folder:
        answer = READERS[reader](write_files(Path(folder), files, opened))
    return Sample(files, opened, answer, container)


@cache
def valid_files(reader: str) -> tuple[Files, str, str]:
    """The files of a reader, the name of what is opened (``""`` for their folder), and the container."""
    opened = {"legacy": "x.pth", "pickle": "x.pkl", "folder": ""}.get(reader, "x.pt")
    container = {"legacy": "legacy", "pickle": "pickle", "folder": "folder"}.get(reader, "zip")
    if reader in ("safetensors", "converted"):
        opened, container = "x.safetensors", "safetensors"
    files: Files
    if reader == "safetensors":
        files = {opened: _safetensors(_tensors(), {"note": "valid"})}
    elif reader == "zip":
        files = {opened: _saved(_tensors())}
    elif reader == "legacy":
        files = {opened: _saved_legacy()}
    elif reader == "torchscript":
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(_Scripted().eval()), buffer)
        files = {opened: buffer.getvalue()}
    elif reader == "task-vectors":
        files = {opened: _task_vectors()}
    elif reader == "head":
        files = {opened: _head()}
    elif reader == "pickle":
        training = {"epoch": 3, "args": argparse.Namespace(lr=1e-3, name="x"), "tensors": _tensors(), "none": None}
        with zipfile.ZipFile(
            io.BytesIO(_saved({**training, "seen": {1, 2}, "list": [1.5, True, (1, "a")]}))
        ) as archive:
            files = {opened: archive.read("archive/data.pkl")}
    elif reader == "converted":
        state = {name: tensor.detach() for name, tensor in _clip().state_dict().items()}
        arguments = {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2, "mlp_ratio": 2.0}
        described = {"arguments": {**arguments, "output_dim": 4}, "quick_gelu": True}
        files = {opened: _safetensors(state, {"encoder": json.dumps(described)})}
    elif reader == "folder":
        tensors, config = _hugging_face()
        names = sorted(tensors)
        shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
        weight_map = {name: shard for shard, inside in shards.items() for name in inside}
        files = {
            "config.json": json.dumps(config).encode(),
            "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
            **{shard: _safetensors({name: tensors[name] for name in inside}) for shard, inside in shards.items()},
        }
    else:
        raise ValueError(f"reader: expected one of {', '.join(READERS)}, got {reader!r}")
    return files, opened, container


def write_files(folder: Path, files: Files, opened: str) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / opened if opened else folder
