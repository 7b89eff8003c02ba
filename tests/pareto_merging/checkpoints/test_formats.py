"""Files are known by their content: what is no checkpoint is called by its name, and a user's own format is taken."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from command_line import run
from support import clip, open_clip_files
from support.checkpoint_cases import FORMATS, assert_same, expected_tower
from torch import Tensor

import pareto_merging as pm
from pareto_merging.checkpoints import folders, formats, names
from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.checkpoints.contents import Description, Format
from pareto_merging.checkpoints.heads import open_head
from pareto_merging.checkpoints.hugging_face import LAYOUT
from pareto_merging.checkpoints.names import NAMINGS
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605\n"),
        ("page.safetensors", b"<!DOCTYPE html><html></html>"),
        ("empty.pt", b""),
        ("empty.safetensors", b""),
        ("zeros.bin", bytes(1000)),
        ("zip.pt", b"PK\x05\x06" + bytes(18)),
    ],
)
def test_a_file_that_is_no_checkpoint(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}") as raised:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["open_clip pt", "open_clip pt, legacy", "open_clip safetensors", "task vectors"])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_download_that_broke_off(name: str, kept: float, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path, 0, True)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=rf"{path.name}") as raised:
        dict(open_checkpoint(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "an HTML page"),
        (b"<HTML>404</HTML>", "an HTML page"),
        (b'{"error": "Repository not found"}', "a JSON file"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"\x1f\x8b\x08\x00", "a gzip archive"),
        (b"\x00" * 257 + b"ustar\x0000", "a tar archive"),
        (b"", "an empty file"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_what_is_no_checkpoint_is_called_by_its_name(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: expected a checkpoint, got {said}|{name}: .*{said}") as raised:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("low", [*b"{[<\n \x1f\x80P"])
def test_a_safetensors_header_of_any_length(low: int, tmp_path: Path) -> None:
    """Its length comes first, and may begin as other files do."""
    path = open_clip_files.open_clip_file(tmp_path / "clip.safetensors", 9)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    longer = size + (low - size) % 256
    path.write_bytes(longer.to_bytes(8, "little") + data[8 : 8 + size].ljust(longer) + data[8 + size :])
    assert path.read_bytes()[0] == low
    assert_same(open_checkpoint(path), expected_tower("", 9))


class ToyTensors:
    """A user's own container: a line of JSON with names and shapes, then the numbers as text."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        self.files = [path]
        self.shapes: dict[str, list[int]] = json.loads(lines[0].removeprefix("TOY"))
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)
        self._lines = dict(zip(self.shapes, lines[1:], strict=True))

    def read(self, name: str) -> Tensor:
        return torch.tensor(json.loads(self._lines[name])).reshape(self.shapes[name])


TOY = Format("toy", lambda path, start: start[:3] == b"TOY", ToyTensors)


def write_toy(path: Path, seed: int) -> Path:
    state = clip.tower(seed).state_dict()
    header = json.dumps({name: list(tensor.shape) for name, tensor in state.items()})
    path.write_text("\n".join([f"TOY{header}", *(str(tensor.flatten().tolist()) for tensor in state.values())]))
    return path


@pytest.fixture
def toy() -> Iterator[None]:
    formats.register(TOY)
    yield
    del formats.FORMATS[TOY.name]


def test_a_format_of_ones_own_is_taken_everywhere(toy: None, tmp_path: Path) -> None:
    paths = [write_toy(tmp_path / f"{seed}.toy", seed) for seed in range(3)]
    checkpoint = pm.open_checkpoint(paths[0])
    assert checkpoint.format == "toy"
    assert checkpoint.weights == checkpoint.files == [paths[0]]
    assert_same(checkpoint, expected_tower(""))

    model, finetuned = pm.load_models(paths[0], {"a": paths[1], "b": paths[2]}, quick_gelu=True, device="cpu")
    assert_same(model.state_dict(), expected_tower(""))
    assert_same(finetuned["b"], expected_tower("", 2))

    assert run("convert", paths[1], tmp_path / "b.safetensors", "--quiet") == 0
    converted = pm.open_checkpoint(tmp_path / "b.safetensors")
    assert converted.origin["source_format"] == "toy"
    assert_same(converted, expected_tower("", 1))


def test_a_head_in_a_format_of_ones_own(toy: None, tmp_path: Path) -> None:
    """What the format has as ``metadata`` is read as a safetensors file's is."""
    path, rows = tmp_path / "head.toy", torch.randn(4, 6)
    path.write_text(f'TOY{{"weight": [4, 6], "other": [4, 6]}}\n{rows.flatten().tolist()}\n{[0.0] * 24}')
    weight, scale = open_head(path)
    assert torch.equal(weight, rows) and scale == 100.0
    torch.testing.assert_close(pm.read_head(path, "other").weight, torch.zeros(4, 6))
    path.write_text(f'TOY{{"a": [4, 6]}}\n{[0.0] * 24}')
    with pytest.raises(UserError, match=r"head\.toy: expected a tensor named weight or b, got a"):
        open_head(path, "b")

    class WithScale(ToyTensors):
        metadata: ClassVar = {"logit_scale": "41.5", "source": "theirs"}

    path.write_text(f'TOY{{"weight": [4, 6]}}\n{rows.flatten().tolist()}')
    formats.register(replace(TOY, open=WithScale), replace=True)
    assert open_head(path)[1] == 41.5
    assert run("convert", path, tmp_path / "head.safetensors", "--quiet") == 0
    weight, scale = open_head(tmp_path / "head.safetensors")
    assert torch.equal(weight, rows) and scale == 41.5
    assert formats.open_tensors(tmp_path / "head.safetensors").metadata["source"] == "theirs"


def test_what_a_format_says_of_its_tensors_is_compared_with_them(toy: None, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "a.toy", 0)
    said = Description(heads=clip.HEADS, quick_gelu=True, no_text="none")
    with_heads = replace(TOY, name="toy with heads", describe=lambda tensors, source: said)
    formats.register(with_heads)
    try:
        checkpoint = pm.open_checkpoint(path)
        assert (checkpoint.format, checkpoint.heads, checkpoint.quick_gelu) == ("toy with heads", clip.HEADS, True)
    finally:
        del formats.FORMATS[with_heads.name]
    assert pm.open_checkpoint(path).quick_gelu is None


def test_a_name_is_taken_once(toy: None) -> None:
    for register, member in (
        (formats.register, TOY),
        (folders.register, LAYOUT),
        (names.register, NAMINGS["open_clip"]),
        (formats.register, replace(TOY, name="torchscript")),
    ):
        with pytest.raises(ValueError, match=r"expected a new name, got '.+', which is taken"):
            register(member)


def test_a_format_that_is_no_longer_registered_is_refused(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "a.toy", 0)
    with pytest.raises(UserError, match=r"a\.toy: expected a checkpoint that torch or safetensors wrote"):
        pm.open_checkpoint(path)
