"""What torch.save and TorchScript wrote, read without running any of it."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import clip, open_clip_files
from support.checkpoint_cases import FORMATS, assert_same, expected_tower

from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.checkpoints.records import ForbiddenGlobal
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_is_the_readers_own(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FORMATS[name](tmp_path, 0, True))
    for key in ("conv1.weight", "transformer.resblocks.1.attn.in_proj_bias", "class_embedding"):
        first = checkpoint[key]
        kept = first.clone()
        first.zero_()
        assert torch.equal(checkpoint[key], kept), key
        # a slice of a larger memory would keep all of that alive
        assert first.untyped_storage().nbytes() == first.numel() * first.element_size(), key


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_device(
    protocol: int, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if the tensors were on a GPU that this machine does not have
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    path = tmp_path / "a.pt"
    torch.save(clip.clip().state_dict(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    assert b"cuda:3" in path.read_bytes()
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint, expected_tower(""))
    assert checkpoint["proj"].device == torch.device("cpu")


@pytest.mark.parametrize("name", ["hf clip", "hf clip, bin", "open_clip safetensors", "open_clip pt", "task vectors"])
def test_damage_elsewhere_does_not_matter(name: str, tmp_path: Path) -> None:
    """Opening reads no tensor: one whose bytes are damaged is noticed, if at all, when it is read."""
    path = FORMATS[name](tmp_path, 0, True)
    (weights,) = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in (".safetensors", ".bin")]
    content = weights.read_bytes()
    damaged = clip.tower().state_dict()["transformer.resblocks.1.mlp.c_fc.weight"].numpy().tobytes()
    assert content.count(damaged) == 1
    weights.write_bytes(content.replace(damaged, bytes(len(damaged))))
    checkpoint = open_checkpoint(path)
    expected = expected_tower("")
    for key in checkpoint:
        if key != "transformer.resblocks.1.mlp.c_fc.weight":
            assert torch.equal(checkpoint[key], expected[key]), key
    if weights.suffix == ".safetensors":
        assert checkpoint["transformer.resblocks.1.mlp.c_fc.weight"].count_nonzero() == 0
    else:
        # a zip archive has a checksum for every tensor
        with pytest.raises(UserError, match=rf"{weights.name}.*checksum"):
            checkpoint["transformer.resblocks.1.mlp.c_fc.weight"]


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda model, trap: {**model, "x": trap}, lambda model, trap: [trap, model]])
def test_nothing_of_a_pickle_is_run(wrap: Callable[[Any, Any], Any], legacy: bool, tmp_path: Path) -> None:
    marker = tmp_path / "run"
    torch.save(
        wrap(clip.clip().state_dict(), Trap(marker)), tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(ForbiddenGlobal, match=r"a\.pt.*mkdir") as raised:
        open_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(raised.value)
    assert str(raised.value).count("a.pt") == 1
    assert not marker.exists()
    # the trap works
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert marker.exists()


def test_a_tensor_with_attributes_of_its_own(tmp_path: Path) -> None:
    """torch saves it by way of _rebuild_from_type_v2; complex numbers beside it are nobody's weights."""
    state = dict(clip.tower(7).state_dict())
    state["proj"].note = "kept by Python"
    torch.save({"state_dict": state, "spectrum": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "x.pt")
    assert_same(open_checkpoint(tmp_path / "x.pt"), expected_tower("", 7))


def test_a_directory_that_is_larger_than_it_says(tmp_path: Path) -> None:
    """zipfile believes the zip64 record before the end record, whatever that says."""
    path = open_clip_files.open_clip_file(tmp_path / "x.pt", 8)
    data = path.read_bytes()
    end = data.rfind(b"PK\x05\x06")
    record = (
        b"PK\x06\x06"
        + (44).to_bytes(8, "little")
        + bytes(12)
        + b"".join(value.to_bytes(8, "little") for value in (3, 3, 3 * 10**9, 0))
    )
    locator = b"PK\x06\x07" + bytes(4) + end.to_bytes(8, "little") + (1).to_bytes(4, "little")
    path.write_bytes(data[:end] + record + locator + data[end:])
    with pytest.raises(UserError, match=r"expected a directory of at most \d+ bytes .* got 3000000000 bytes"):
        open_checkpoint(path)


def test_a_forbidden_name_is_said_as_it_is_known(tmp_path: Path) -> None:
    """torch.save's protocol 2 writes the name that Python 2 had: the error has both."""

    class Runs:
        def __reduce__(self) -> Any:
            return subprocess.Popen, (["touch", str(tmp_path / "ran")],)

    torch.save({"w": torch.zeros(1), "x": Runs()}, tmp_path / "x.pt")
    with pytest.raises(ForbiddenGlobal, match=r"names commands\.Popen \(subprocess\.Popen\), which could run code"):
        open_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
