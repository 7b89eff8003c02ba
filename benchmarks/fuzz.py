"""``python -m benchmarks.fuzz``: damage checkpoints at random and look for anything but an error or the right answer.

Each reader gets a small valid file of its own and mutants of it: flipped bits, bytes set, slices deleted, doubled,
swapped or taken from another file, numbers replaced by interesting ones, the end cut off; and by structure: opcodes of
a pickle inserted, deleted, moved, records of a zip archive changed with their checksums made right again, values of a
JSON header replaced. A mutant is opened and every tensor read, in a worker process with little memory. It must give

- a UserError of one line and fewer than 500 characters, or
- the right answer: the original tensors, where one byte of a container with checksums was changed; where there are
  none, what the bytes at the tensor's place say; and always tensors that fit into the file, and inert objects.

Anything else (another exception, more than a second, too much memory, a crash, a file or process that the payload
made) is a finding; the mutant is kept. The same seed makes the same mutants. The exit code is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import itertools
import json
import math
import os
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import types
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results
from pareto_merging.errors import UserError
from pareto_merging.system.progress import progress_bar

SECONDS, STALLED_SECONDS, MEMORY, LONGEST_MESSAGE = 1.0, 30.0, 512 * 2**20, 500
KEPT_FINDINGS = 20
# if it were called it would make this file in the working directory, which is the mutant's folder
CANARY = "canary"
PAYLOAD_GLOBALS = (
    "os system",
    "posix system",
    "subprocess getoutput",
    "builtins exec",
    "torch.hub load_state_dict_from_url",
)

Files = dict[str, bytes]
Answer = dict[str, Tensor]


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


@dataclass(frozen=True)
class Mutant:
    """A damaged checkpoint.

    Attributes:
        kind: what was done. span: [first, last) of the bytes that changed, where the length is the same. forbidden: a
            global that must be named in an error.
    """

    files: Files
    kind: str
    file: str
    span: tuple[int, int] | None = None
    forbidden: str | None = None


@dataclass
class Finding:
    """A mutant that gave neither an error of one line nor the right answer."""

    index: int
    kind: str
    what: str
    path: str = ""


@dataclass
class Summary:
    """What came of the mutants of one reader. ``kinds``: how many of each; seconds are the workers' own."""

    reader: str
    seed: int
    mutations: int
    refused: int = 0
    right: int = 0
    findings: list[Finding] = field(default_factory=list)
    found: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0


# --- valid files ----------------------------------------------------------------------------------------------------


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
    files, opened, container = _valid(reader)
    with tempfile.TemporaryDirectory() as folder:
        answer = READERS[reader](_write(Path(folder), files, opened))
    return Sample(files, opened, answer, container)


@cache
def _valid(reader: str) -> tuple[Files, str, str]:
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


def _write(folder: Path, files: Files, opened: str) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / opened if opened else folder


# --- readers --------------------------------------------------------------------------------------------------------


def _read_checkpoint(path: Path) -> Answer:
    from pareto_merging.checkpoints.readers import open_checkpoint

    checkpoint = open_checkpoint(path)
    return {name: checkpoint[name] for name in checkpoint}


def _read_archive(path: Path) -> Answer:
    from pareto_merging.checkpoints.archives import open_archive
    from pareto_merging.checkpoints.modules import find_tensors

    archive = open_archive(path)
    check_inert(archive.root)
    return {name: archive.tensor(stored) for name, stored in find_tensors(archive.root, str(path)).items()}


def _read_safetensors(path: Path) -> Answer:
    from pareto_merging.system.files import SafetensorsFile

    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.shapes}


def _read_head(path: Path) -> Answer:
    from pareto_merging.checkpoints.readers import open_head

    weight, scale = open_head(path)
    return {"weight": weight, "scale": torch.tensor(scale)}


def _read_pickle(path: Path) -> Answer:
    from pareto_merging.checkpoints.pickles import read_pickle

    with path.open("rb") as stream:
        check_inert(read_pickle(stream, str(path)))
    return {}


READERS: dict[str, Callable[[Path], Answer]] = {
    "safetensors": _read_safetensors,
    "folder": _read_checkpoint,
    "zip": _read_archive,
    "legacy": _read_archive,
    "torchscript": _read_archive,
    "task-vectors": _read_checkpoint,
    "head": _read_head,
    "converted": _read_checkpoint,
    "pickle": _read_pickle,
}


def check_inert(root: Any) -> None:
    """Raises AssertionError unless ``root`` is made of plain data and the machine's own records, all the way down."""
    from pareto_merging.checkpoints.pickles import Global, Record, Storage, StoredTensor

    plain = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype)
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if type(value) in plain or id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is dict:
            waiting += itertools.chain(value.keys(), value.values())
        elif type(value) is Record:
            waiting += [value.type, value.arguments, value.state, value.items]
        elif type(value) in (list, tuple, Global, Storage, StoredTensor):
            waiting += value
        else:
            raise AssertionError(f"a {type(value).__module__}.{type(value).__qualname__} came out of the pickle")


# --- damage ---------------------------------------------------------------------------------------------------------

_INTERESTING = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_STRUCTURED = 0.45


def mutate(reader: str, seed: int, index: int) -> Mutant:
    """The mutant of this index: the same for the same seed, whatever came before it."""
    rng = random.Random(f"{reader}:{seed}:{index}")
    original = sample(reader)
    name = rng.choice(sorted(original.files))
    data = original.files[name]
    if rng.random() < _STRUCTURED:
        changed, kind, forbidden = _structured(original, name, data, rng)
        span = None
    else:
        changed, kind, span = _blind(data, rng, reader)
        forbidden = None
        for _ in range(rng.choice((0, 0, 0, 0, 1, 3))):
            changed, _, _ = _blind(changed, rng, reader)
            kind, span = f"{kind}+" if not kind.endswith("+") else kind, None
    return Mutant({**original.files, name: changed}, kind, name, span, forbidden)


def _blind(data: bytes, rng: random.Random, reader: str) -> tuple[bytes, str, tuple[int, int] | None]:
    """Damage that knows nothing of the format: (content, kind, what changed if the length is the same)."""
    if not data:
        return bytes([rng.randrange(256)]), "insert", None
    at = rng.randrange(len(data))
    # headers, directories and the pickle are where the numbers lie
    if rng.random() < 0.3:
        at = rng.randrange(min(len(data), 300))
    elif rng.random() < 0.2:
        at = len(data) - 1 - rng.randrange(min(len(data), 600))
    length = min(rng.choice((1, 2, 4, 8, 30, 200)), len(data) - at)
    kind = rng.choice(
        ("flip", "flip", "flip", "set", "set", "delete", "insert", "double", "truncate", "swap", "number", "splice")
    )
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :], kind, (at, at + 1)
    if kind == "set":
        return data[:at] + bytes([rng.choice((0, 255, rng.randrange(256)))]) + data[at + 1 :], kind, (at, at + 1)
    if kind == "delete":
        return data[:at] + data[at + length :], kind, None
    if kind == "insert":
        return data[:at] + rng.randbytes(length) + data[at:], kind, None
    if kind == "double":
        return data[: at + length] + data[at : at + length] * rng.choice((1, 1, 50)) + data[at + length :], kind, None
    if kind == "truncate":
        return data[:at], kind, None
    if kind == "number":
        width = rng.choice((1, 2, 4, 8))
        number = (rng.choice(_INTERESTING) % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "little", "big")))
        number = number[: len(data) - at]
        return data[:at] + number + data[at + len(number) :], kind, (at, at + len(number))
    other_at = rng.randrange(len(data))
    if kind == "swap":
        first, second = sorted((at, other_at))
        length = min(length, second - first, len(data) - second)
        middle = data[first + length : second]
        swapped = data[second : second + length] + middle + data[first : first + length]
        return data[:first] + swapped + data[second + length :], kind, (first, second + length)
    files, opened, _ = _valid(rng.choice([name for name in READERS if name != "folder"]))
    donor = files[opened]
    start = rng.randrange(len(donor))
    taken = donor[start : start + rng.choice((4, 40, 400, 4000))]
    return data[:at] + taken + data[at + rng.choice((0, len(taken))) :], kind, None


def _structured(original: Sample, name: str, data: bytes, rng: random.Random) -> tuple[bytes, str, str | None]:
    """Damage that keeps the format's outer layers right: (content, kind, the global that must be refused)."""
    if name.endswith(".json"):
        return *_json_mutant(data, rng), None
    if name.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        header, kind = _json_mutant(data[8 : 8 + size], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + size :], kind, None
    if original.container == "pickle":
        return _pickle_mutant(data, rng)
    if original.container == "legacy":
        parts = _legacy_parts(data)
        # the fourth is the object; a payload in any of them must be refused
        which = rng.choice((0, 1, 2, 3, 3, 3, 3, 4))
        changed, kind, forbidden = _pickle_mutant(parts[which], rng)
        if changed[:1] != b"\x80" and which == 0:
            # no longer a file that torch wrote: refused before it is read as a pickle
            forbidden = None
        return b"".join([*parts[:which], changed, *parts[which + 1 :]]), kind, forbidden
    records = dict(_records(data))
    pickle_name = next(key for key in records if key.endswith("/data.pkl"))
    if rng.random() < 0.8:
        records[pickle_name], kind, forbidden = _pickle_mutant(records[pickle_name], rng)
        return _zip(list(records.items())), f"zip-{kind}", forbidden
    listed = list(records.items())
    at = rng.randrange(len(listed))
    kind = rng.choice(("record-damage", "record-drop", "record-double", "record-rename", "record-swap"))
    if kind == "record-damage":
        listed[at] = (listed[at][0], _blind(listed[at][1], rng, "")[0])
    elif kind == "record-drop":
        del listed[at]
    elif kind == "record-double":
        listed.insert(rng.randrange(len(listed)), listed[at])
    elif kind == "record-rename":
        listed[at] = (rng.choice((*records, "../x", "/x", "archive/data/9", "other/data.pkl")), listed[at][1])
    else:
        other = rng.randrange(len(listed))
        (a, first), (b, second) = listed[at], listed[other]
        listed[at], listed[other] = (a, second), (b, first)
    return _zip(listed), kind, None


@cache
def _records(data: bytes) -> tuple[tuple[str, bytes], ...]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return tuple((info.filename, archive.read(info)) for info in archive.infolist())


def _zip(records: Sequence[tuple[str, bytes]]) -> bytes:
    """A zip archive, stored, with the right checksums."""
    body, directory = bytearray(), bytearray()
    for name, content in records:
        encoded = name.encode()
        numbers = struct.pack(
            "<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(content), len(content), len(content), len(encoded), 0
        )
        directory += (
            b"PK\1\2" + struct.pack("<H", 20) + numbers + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + encoded
        )
        body += b"PK\3\4" + numbers + encoded + content
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), len(body), 0)
    return bytes(body + directory + tail)


@cache
def _opcodes(data: bytes) -> tuple[int, ...]:
    """Where the opcodes of a valid pickle begin."""
    return tuple(position for _, _, position in pickletools.genops(data) if position is not None)


@cache
def _legacy_parts(data: bytes) -> tuple[bytes, ...]:
    """The five pickles of a legacy file, and what is behind them."""
    parts, stream = [], io.BytesIO(data)
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(data[start : stream.tell()])
    return (*parts, data[stream.tell() :])


def _payload(rng: random.Random) -> tuple[bytes, str]:
    """Opcodes that would make the canary and leave the stack as it was; and the global that must be named."""
    dotted = rng.choice(PAYLOAD_GLOBALS)
    module, name = dotted.split()
    source = f"open({CANARY!r}, 'w')" if name == "exec" else f"touch {CANARY}"
    argument = b"X" + struct.pack("<I", len(source)) + source.encode()
    strings = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)]
    reached = rng.choice((f"c{module}\n{name}\n".encode(), b"".join(strings) + b"\x93"))
    if rng.random() < 0.3:
        return b"(" + argument + f"i{module}\n{name}\n".encode() + b"0", f"{module}.{name}"
    return reached + argument + b"\x85R0", f"{module}.{name}"


_SNIPPETS = (
    *(b"(", b".", b"0", b"2", b"t", b")", b"]", b"}", b"e", b"u", b"s", b"a", b"R", b"b", b"o", b"N", b"1", b"l", b"d"),
    *(b"\x81", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"\x97", b"\x98", b"Q"),
    *(b"\x82\xc8", b"\x83\xc8\0", b"\x84\xc8\0\0\0", b"Pos.system\n", b"h\0", b"h\x05", b"q\0", b"j\xff\xff\0\0"),
    *(
        b"r\xff\xff\xff\xff",
        b"\x8e" + b"\xff" * 8,
        b"B\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\x7f",
        b"\x95" + b"\xff" * 8,
    ),
    *(b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"csrc.modeling\nX\n"),
    *(
        b"c_codecs\nencode\n",
        b"c__builtin__\nset\n",
        b"ctorch\nFloatStorage\n",
        b"J\xff\xff\xff\x7f",
        b"\x8a\x08" + b"\x7f" * 8,
    ),
)


def _pickle_mutant(data: bytes, rng: random.Random) -> tuple[bytes, str, str | None]:
    starts = _opcodes(data)
    ends = (*starts[1:], len(data))
    at = rng.randrange(len(starts))
    start, end = starts[at], ends[at]
    kind = rng.choice(("payload", "opcode", "opcode", "op-delete", "op-double", "op-swap", "op-argument", "op-damage"))
    if kind == "payload":
        payload, name = _payload(rng)
        return data[:start] + payload + data[start:], kind, name
    if kind == "opcode":
        return data[:start] + rng.choice(_SNIPPETS) + data[start:], kind, None
    if kind == "op-delete":
        return data[:start] + data[end:], kind, None
    if kind == "op-double":
        return data[:end] + data[start:end] * rng.choice((1, 1, 3000)) + data[end:], kind, None
    other = rng.randrange(len(starts))
    if kind == "op-swap":
        first, second = sorted((at, other))
        if first == second:
            return data[:start] + data[end:], kind, None
        a, b = data[starts[first] : ends[first]], data[starts[second] : ends[second]]
        return data[: starts[first]] + b + data[ends[first] : starts[second]] + a + data[ends[second] :], kind, None
    if kind == "op-argument":
        # another opcode of the same file in its place, or another number
        number = rng.choice(_INTERESTING)
        width = (number.bit_length() // 8) + 1
        wide = b"\x8a" + bytes([width]) + number.to_bytes(width, "little", signed=True)
        return data[:start] + rng.choice((data[starts[other] : ends[other]], wide)) + data[end:], kind, None
    changed, _, _ = _blind(data[start:end], rng, "pickle")
    return data[:start] + changed + data[end:], kind, None


_JSON_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        7.5,
        1e300,
        10**9,
        2**31,
        2**63,
        2**64,
        10**30,
        "",
        "x",
        "F64",
        "../x",
        "/etc/passwd",
    ),
    *(
        [],
        {},
        [1],
        [[1]],
        {"a": 1},
        "\ud800",
        "a\nb",
        "n" * 2000,
        [0, 8],
        [0, 2**40],
        [-8, 8],
        [2**62, 4],
        "b.safetensors",
    ),
)


def _json_mutant(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A value of a JSON text replaced, removed, renamed or given twice."""
    root = json.loads(data)
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting:
        value = waiting.pop()
        items: list[tuple[Any, Any]] = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, inner in items:
            places.append((value, key))
            if isinstance(inner, dict | list):
                waiting.append(inner)
    parent, key = rng.choice(places)
    kind = rng.choice(("json-value", "json-value", "json-remove", "json-rename", "json-copy", "json-twice"))
    if kind == "json-value":
        parent[key] = rng.choice(_JSON_VALUES)
    elif kind == "json-remove":
        del parent[key]
    elif kind == "json-copy":
        source, other = rng.choice(places)
        if source is not parent or (isinstance(source, dict) and other in source):
            parent[key] = json.loads(json.dumps(source[other]))
    elif kind == "json-rename" and isinstance(parent, dict):
        parent[rng.choice(("w", "", "dtype", "__metadata__", "\ud800", f"{key}x"))] = parent.pop(key)
    text = json.dumps(root)
    if kind == "json-twice" and isinstance(parent, dict):
        entry = json.dumps({key: rng.choice((parent[key], rng.choice(_JSON_VALUES)))})[1:-1]
        around = json.dumps(parent)
        text = text.replace(around, f"{{{entry}, {around[1:]}", 1)
    return text.encode(), kind


# --- judging --------------------------------------------------------------------------------------------------------


def judge(reader: str, mutant: Mutant, answer: Answer) -> str | None:
    """What is wrong with an answer that a reader gave for a mutant; None if nothing is."""
    original = sample(reader)
    if mutant.forbidden is not None:
        return f"read, though its pickle calls {mutant.forbidden}"
    size = sum(map(len, mutant.files.values()))
    for name, tensor in answer.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return f"{name!r:.60}: no tensor"
        # what is read is put into memory of its own: no more than the file has (a head becomes float32)
        if tensor.nbytes > 2 * size or not tensor.is_contiguous():
            return f"{name!r:.60}: {tensor.nbytes} bytes out of a file of {size}"
    if original.has_checksums and mutant.span is not None and mutant.span[1] - mutant.span[0] == 1:
        return _difference(answer, original.tensors)
    if original.container == "folder" and mutant.file == "model.safetensors.index.json":
        return _difference(answer, original.tensors)
    if original.container == "folder" and mutant.file == "config.json":
        return _difference(answer, original.tensors)
    if reader == "safetensors":
        return _difference(answer, reference_safetensors(mutant.files[mutant.file]))
    if original.container in ("legacy", "safetensors") and mutant.span is not None:
        return _compare_places(original, mutant, answer)
    return None


def _difference(answer: Answer, right: Answer) -> str | None:
    if answer.keys() != right.keys():
        return f"names {sorted(answer.keys() ^ right.keys())!r:.100} are in one of the answers only"
    for name, tensor in answer.items():
        other = right[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype or _raw(tensor) != _raw(other):
            return f"{name!r:.60}: {tensor.dtype} {list(tensor.shape)} differs from the right answer"
    return None


def _raw(tensor: Tensor) -> bytes:
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.tobytes()


def _compare_places(original: Sample, mutant: Mutant, answer: Answer) -> str | None:
    """Where only numbers of contiguous tensors changed: each tensor is what the bytes at its place say."""
    before, after = original.files[mutant.file], mutant.files[mutant.file]
    span = mutant.span
    assert span is not None
    places = {}
    for name, tensor in original.tensors.items():
        raw = _raw(tensor)
        start = before.find(raw)
        if raw and start >= 0 and before.count(raw) == 1 and len(raw) >= 8:
            places[name] = (start, start + len(raw))
    if not any(start <= span[0] and span[1] <= end for start, end in places.values()):
        return None
    if answer.keys() != original.tensors.keys():
        return "other names, though only numbers changed"
    for name, (start, end) in places.items():
        if _raw(answer[name]) != after[start:end]:
            return f"{name!r:.60}: not the bytes at its place"
    return None


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def reference_safetensors(data: bytes) -> Answer:
    """A safetensors file as its specification says, written a second time; raises where it is broken."""
    size = int.from_bytes(data[:8], "little")
    pairs: list[tuple[str, Any]] = json.loads(data[8 : 8 + size], object_pairs_hook=lambda pairs: pairs)
    found: Answer = {}
    for name, entry in pairs:
        if name == "__metadata__":
            continue
        assert name not in found, f"{name!r:.60} twice"
        assert len(dict(entry)) == len(entry), f"{name!r:.60}: a field twice"
        fields = dict(entry)
        dtype, shape = _SAFETENSORS_DTYPES[fields["dtype"]], fields["shape"]
        first, last = fields["data_offsets"]
        assert last - first == math.prod(shape) * dtype.itemsize, f"{name!r:.60}: offsets and shape differ"
        content = data[8 + size + first : 8 + size + last]
        assert len(content) == last - first, f"{name!r:.60}: beyond the end"
        found[name] = (
            torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)
            if content
            else torch.empty(shape, dtype=dtype)
        )
    return found


# --- running --------------------------------------------------------------------------------------------------------


class _Slow(BaseException):
    """No Exception, so that no reader can take it for an error in the file."""


def _too_slow(number: int, frame: object) -> None:
    raise _Slow


# while a mutant is read: what no reader of data may do
_FORBIDDEN_EVENTS = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class"),
    *("socket.connect", "socket.getaddrinfo", "urllib.Request", "shutil.rmtree", "ctypes.dlopen"),
)
_watching: list[str] = []
_armed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _armed:
        return
    if event in _FORBIDDEN_EVENTS:
        _watching.append(event)
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _watching.append(f"open for writing {arguments[0]!r:.80}")


def try_mutant(reader: str, mutant: Mutant, folder: Path) -> tuple[str, str]:
    """("refused" | "right" | "finding", what was said)."""
    global _armed
    path = _write(folder, mutant.files, sample(reader).opened)
    _watching.clear()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        _armed = True
        answer = READERS[reader](path)
        _armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        wrong = judge(reader, mutant, answer)
        outcome = ("right", "") if wrong is None else ("finding", wrong)
    except UserError as error:
        _armed = False
        text = str(error).replace(str(folder), "")
        outcome = ("refused", text)
        if not text.isprintable() or len(text) > LONGEST_MESSAGE:
            outcome = ("finding", f"an error of {len(text)} characters, or with others than text: {text!r:.120}")
        elif mutant.forbidden is not None and not _names(text, mutant):
            outcome = ("finding", f"an error that does not name {mutant.forbidden}: {text!r:.200}")
    except _Slow:
        outcome = ("finding", f"more than {SECONDS} s")
    except BaseException as error:
        outcome = ("finding", f"{type(error).__name__}: {str(error)!r:.200}")
    finally:
        _armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (folder / CANARY).exists():
        (folder / CANARY).unlink()
        outcome = ("finding", "the payload ran")
    elif _watching:
        outcome = ("finding", f"reading it did {', '.join(_watching)[:200]}")
    return outcome


def _names(text: str, mutant: Mutant) -> bool:
    """Whether the error names the payload's global, or is about something in front of it."""
    assert mutant.forbidden is not None
    # in the middle of a line or a frame the payload is text; nothing else stands in front of it in a valid pickle
    return mutant.forbidden in text or mutant.forbidden.replace("posix", "os") in text


def _work(reader: str, seed: int, indices: range, pipe: Any, current: Any, folder: str) -> None:
    """A worker: try mutants, send ("done", how many, kinds, …) and every finding."""
    os.chdir(folder)
    # the traceback of a crash goes where the parent's errors go
    with contextlib.suppress(io.UnsupportedOperation, ValueError):
        faulthandler.enable(file=sys.__stderr__ or sys.stderr)
    signal.signal(signal.SIGPROF, _too_slow)
    sys.addaudithook(_hook)
    inside = Path(folder)
    READERS[reader](_write(inside, sample(reader).files, sample(reader).opened))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    slowest, begun = 0.0, time.perf_counter()
    for index in indices:
        current.value = index
        mutant = mutate(reader, seed, index)
        start = time.process_time()
        outcome, said = try_mutant(reader, mutant, inside)
        slowest = max(slowest, time.process_time() - start)
        counts[outcome] += 1
        kinds[mutant.kind] += 1
        if outcome == "finding":
            pipe.send(("finding", index, mutant.kind, said))
        if index == indices[-1] or sum(counts.values()) == 200:
            pipe.send(("done", counts, kinds, slowest, time.perf_counter() - begun))
            counts, kinds, slowest, begun = Counter(), Counter(), 0.0, time.perf_counter()
    pipe.send(None)


def fuzz(
    reader: str,
    mutations: int,
    seed: int = 0,
    *,
    keep: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Summary:
    """Try ``mutations`` mutants of one reader's file in a worker process, started again where one kills it.

    Args:
        reader: one of :data:`READERS`. keep: a folder for the mutants that are findings. advance: told how many are
            done.
    """
    summary = Summary(reader, seed, mutations)
    # what readers import at their first call is imported here, once
    sample(reader)
    for other in READERS:
        _valid(other)
    context, kinds, begin = get_context("fork"), Counter[str](), 0
    current = context.Value("q", 0, lock=False)
    done = 0
    while begin < mutations:
        receiver, sender = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            arguments = (reader, seed, range(begin, mutations), sender, current, folder)
            current.value = begin
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            sender.close()
            why = "its process ended"
            while True:
                before = current.value
                try:
                    if not receiver.poll(STALLED_SECONDS):
                        if current.value != before:
                            continue
                        why = f"more than {STALLED_SECONDS} s"
                        worker.kill()
                        break
                    message = receiver.recv()
                except EOFError:
                    break
                if message is None:
                    why = ""
                    break
                if message[0] == "finding":
                    _found(summary, message[1], message[2], message[3], keep)
                else:
                    _, counts, some_kinds, slowest, seconds = message
                    summary.refused += counts["refused"]
                    summary.right += counts["right"]
                    kinds += some_kinds
                    summary.slowest = max(summary.slowest, round(slowest, 4))
                    summary.seconds += seconds
                    done += sum(counts.values())
                    if advance is not None:
                        advance(done)
            worker.join()
        if not why:
            break
        code = worker.exitcode
        mutant = mutate(reader, seed, current.value)
        signalled = signal.Signals(-code).name if code is not None and code < 0 else code
        _found(summary, current.value, mutant.kind, f"{why} ({signalled})", keep)
        begin = current.value + 1
    summary.kinds = dict(sorted(kinds.items()))
    summary.seconds = round(summary.seconds, 2)
    return summary


def _found(summary: Summary, index: int, kind: str, what: str, keep: Path | None) -> None:
    summary.found += 1
    if len(summary.findings) >= KEPT_FINDINGS:
        return
    path = ""
    if keep is not None:
        folder = keep / f"{summary.reader}-{summary.seed}-{index}"
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, mutate(summary.reader, summary.seed, index).files, "")
        path = str(folder)
    summary.findings.append(Finding(index, kind, what, path))


def table(summaries: Sequence[Summary]) -> str:
    """One row per reader."""
    lines = ["| reader | mutants | refused | right answer | findings | ms each | slowest, ms |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for one in summaries:
        each = 1000 * one.seconds / max(one.mutations, 1)
        lines.append(
            f"| {one.reader} | {one.mutations} | {one.refused} | {one.right} | {one.found} | {each:.2f} | "
            f"{1000 * one.slowest:.0f} |"
        )
    return "\n".join(lines)


def markdown(report: Mapping[str, Any]) -> str:
    """The committed figures for docs/: a row for each reader."""
    lines = ["| reader | damaged files | refused | right answer | findings |", "|---|---:|---:|---:|---:|"]
    for row in report["rows"]:
        counts = [f"{row[key]:,}" for key in ("mutations", "refused", "right", "found")]
        lines.append(f"| {row['reader']} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if there are findings."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=2000, help="of each reader's file (default: 2000)")
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="repeatable (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same mutants (default: 0)")
    parser.add_argument("--keep", type=Path, help="a folder for mutants that are findings (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep = chosen.keep or Path(tempfile.gettempdir()) / f"fuzz-findings-{os.getpid()}"
    readers = chosen.reader or list(READERS)
    summaries: list[Summary] = []
    start = time.perf_counter()
    with progress_bar("fuzzing", chosen.mutations * len(readers)) as advance:
        for index, reader in enumerate(readers):

            def moved(done: int, reader: str = reader, before: int = index * chosen.mutations) -> None:
                advance(before + done, reader)

            summaries.append(fuzz(reader, chosen.mutations, chosen.seed, keep=keep, advance=moved))
    found = sum(summary.found for summary in summaries)
    if chosen.out is not None:
        report = results.header(["python -m benchmarks.fuzz", *(arguments if arguments is not None else sys.argv[1:])])
        report |= {"suite": "fuzz", "seed": chosen.seed, "rows": [asdict(summary) for summary in summaries]}
        results.write(chosen.out, {**report, "environment": results.machine()})
    for summary in summaries:
        for finding in summary.findings:
            print(f"FINDING {summary.reader} {finding.index} ({finding.kind}): {finding.what} {finding.path}")
    print(table(summaries))
    seconds = time.perf_counter() - start
    print(f"{sum(summary.mutations for summary in summaries)} mutants in {seconds:.0f} s, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
