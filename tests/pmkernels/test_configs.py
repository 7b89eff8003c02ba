"""What the configuration files say."""

import json

import pytest
import torch

from pmkernels import configs, dispatch
from pmkernels.configs import Configs

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_every_shipped_configuration_can_be_read_and_every_kernel_has_one() -> None:
    files = configs.config_files()
    assert "default" in files
    for text in files.values():
        assert configs.read_entries(text)
        for arch in configs.architectures(text):
            assert arch.startswith("sm_")
    ops = {"linear", "weight_grad", "merge_grad", "merge", "flat", "shrink", "factor_grad", "core_grad"}
    for op in (*ops, "preference_grad"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows, rank, aligned in ((1, 0, True), (8224, 64, False), (100, 16, True)):
                found = dispatch.config(op, torch.zeros(1, dtype=dtype), rows=rows, rank=rank, aligned=aligned)
                sizes = [size for size in (found.block_m, found.block_n, found.block_d) if size]
                assert sizes
                assert all(size & (size - 1) == 0 for size in sizes)


def test_files_are_those_that_were_given() -> None:
    files = configs.config_files()
    given = Configs(files)
    entries = given.entries("sm_90")
    files.clear()
    assert given.entries("sm_90") == entries
    with pytest.raises(TypeError, match="does not support item assignment"):
        given.files["sm_90"] = "{}"  # type: ignore[index]


def test_a_gpus_own_file_comes_first() -> None:
    default = configs.config_files()["default"]
    line = {"op": "merge", "dtype": "any", "config": {"block_n": 8, "block_d": 512}}
    files = {"default": default, "some-gpu": json.dumps({"architectures": ["sm_90"], "entries": [line]})}
    with dispatch.using(Configs(files, file="some-gpu")):
        assert dispatch.config("merge", torch.zeros(1, dtype=torch.float32), rows=0, rank=0).block_d == 512
        assert dispatch.config("flat", torch.zeros(1, dtype=torch.float32), rows=0, rank=0).block_n == 1
        assert configs.architectures(files["some-gpu"]) == ("sm_90",)
    with pytest.raises(LookupError, match="expected an entry for nothing"):
        dispatch.config("nothing", torch.zeros(1, dtype=torch.float32), rows=0, rank=0)
    with pytest.raises(TypeError, match="blok_n"):
        configs.read_entries(json.dumps({"entries": [{"op": "merge", "dtype": "any", "config": {"blok_n": 8}}]}))
