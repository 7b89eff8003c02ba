"""Modules and state dicts in others' pickles."""

import argparse
import collections
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import clip
from support.checkpoint_cases import RELEASE, assert_same, built, expected_tower, features
from torch import Tensor, nn

from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_network")


def beside(**others: Any) -> Callable[[], Any]:
    return lambda: {"state_dict": clip.clip().state_dict(), **others}


def views_of_one_memory() -> dict[str, Tensor]:
    state = clip.clip().state_dict()
    memory = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = memory.split([tensor.numel() for tensor in state.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(state.items(), parts, strict=True)}


def columns_first() -> dict[str, Tensor]:
    state = clip.clip().state_dict()
    return {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in state.items()}


def named(prefix: str) -> Callable[[], Any]:
    return lambda: {f"{prefix}{name}": tensor for name, tensor in clip.clip().state_dict().items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("make", "quick_gelu"),
    [
        pytest.param(lambda: dict(clip.clip().named_parameters()), None, id="parameters"),
        pytest.param(clip.clip, True, id="module"),
        pytest.param(lambda: clip.clip(quick_gelu=False), False, id="module with GELU"),
        pytest.param(lambda: nn.DataParallel(clip.clip()), True, id="DataParallel"),
        pytest.param(views_of_one_memory, None, id="views"),
        pytest.param(columns_first, None, id="columns first"),
        pytest.param(named("model."), None, id="model."),
        pytest.param(named("module.model."), None, id="module.model."),
        pytest.param(named("_orig_mod."), None, id="torch.compile"),
        pytest.param(lambda: {"model": clip.clip().state_dict(), "epoch": 3}, None, id="model"),
        pytest.param(beside(args=argparse.Namespace(lr=1e-3, out=Path("a"))), None, id="arguments"),
        pytest.param(beside(best=np.float64(0.5), seen=np.arange(3)), None, id="numpy"),
        pytest.param(beside(rng=torch.arange(9, dtype=torch.uint8)), None, id="a tensor"),
        pytest.param(beside(averages={0: torch.ones(3), 1: torch.zeros(2)}), None, id="numbers as keys"),
        pytest.param(beside(scheduler={"milestones": collections.Counter([10, 20])}), None, id="scheduler"),
    ],
)
def test_what_else_is_in_a_training_checkpoint_does_not_matter(
    make: Callable[[], Any], quick_gelu: bool | None, legacy: bool, tmp_path: Path
) -> None:
    torch.save(make(), tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert checkpoint.quick_gelu is quick_gelu
    assert_same(checkpoint, expected_tower(""))
    assert_same(checkpoint.text, clip.text_state())


@pytest.mark.parametrize("name", ["zeroshot.pt", "MNIST/finetuned.pt", "DTD/finetuned.pt", "keep_lang.pt", "legacy.pt"])
def test_the_release_of_task_vectors(name: str) -> None:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    expected = load_file(RELEASE / "expected.safetensors")
    weights = "zeroshot.pt" if name in ("keep_lang.pt", "legacy.pt") else name
    tower = {
        key.removeprefix(f"{weights}/"): tensor
        for key, tensor in expected.items()
        if key.startswith(f"{weights}/") and not key.endswith("/features")
    }
    checkpoint = open_checkpoint(RELEASE / name)
    assert_same(checkpoint, tower)
    assert checkpoint.quick_gelu is True
    # four heads of width 4, which no shape tells
    found = features(built(checkpoint), size=8)
    torch.testing.assert_close(found, expected[f"{name}/features"], atol=1e-5, rtol=0)
    assert checkpoint.preprocessing == {"size": 8, "mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    assert "src" not in sys.modules


def test_the_text_side_of_the_release_of_task_vectors() -> None:
    text = {
        key.removeprefix("keep_lang.pt/"): tensor
        for key, tensor in load_file(RELEASE / "expected.safetensors").items()
        if key.startswith("keep_lang.pt/") and not key.endswith("/features")
    }
    assert "transformer.resblocks.0.attn.in_proj_weight" in text
    assert_same(open_checkpoint(RELEASE / "keep_lang.pt").text, text)


def test_names_that_would_fill_the_memory(tmp_path: Path) -> None:
    """One long name under many modules is one name in the file and many in memory."""
    child = torch.nn.Module()
    child.register_buffer("x" * 5000, torch.zeros(1))
    root = torch.nn.Module()
    for index in range(100):
        root.add_module(str(index), child)
    torch.save(root, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"expected names of at most 1024 letters"):
        open_checkpoint(tmp_path / "x.pt")
