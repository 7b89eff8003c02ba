"""safetensors files: what is none is refused in one line, and tensors that share memory are written apart."""

from pathlib import Path

import pytest
import torch

from pareto_merging.checkpoints.safetensors import (
    SafetensorsFile,
    read_metadata,
    read_shapes,
    read_tensors,
    write_tensors,
)
from pareto_merging.errors import UserError


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="a pickle, which could run code, is not opened"):
        read_tensors(path)
    with pytest.raises(UserError, match="got no such file"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="got a folder"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff" * 8 + b"{}", b"\x10" + b"\x00" * 7 + b'{"a": 1}', b"\x00" * 64]
)
def test_broken_files_are_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, read_metadata, read_shapes):
        with pytest.raises(UserError, match=r"broken.safetensors: expected a safetensors file, got"):
            read(path)


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    memory = torch.arange(12.0)
    tensors = {
        "whole": memory,
        "again": memory,
        "rows": memory.view(3, 4)[1:],
        "columns": memory.view(3, 4).t(),
        "overlapping": memory[5:9],
        "empty": memory[:0],
        "number": memory[3],
    }
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"said": {"a": 1}})
    file, read = SafetensorsFile(path), read_tensors(path)
    assert file.metadata["said"] == '{"a": 1}'
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor), name
        assert torch.equal(read[name], tensor), name
    assert torch.equal(memory, torch.arange(12.0))
