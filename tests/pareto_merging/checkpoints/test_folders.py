"""Folders whose configuration says what their weights are, or something else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import clip, hf_files, open_clip_files
from support.checkpoint_cases import assert_same, built, expected_tower, features

from pareto_merging.checkpoints import folders
from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.checkpoints.contents import Description, Layout
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: hf_files.huggingface_folder(folder, preprocessor=False),
        lambda folder: open_clip_files.open_clip_folder(folder, preprocess=False),
    ],
    ids=["hf", "open_clip"],
)
def test_a_folder_may_leave_out_the_normalisation(write: Callable[[Path], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "model"))
    assert checkpoint.preprocessing is None
    assert checkpoint.quick_gelu is True


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("model.safetensors", lambda folder: hf_files.huggingface_folder(folder, 2, kind="clip")),
        (
            "pytorch_model.bin",
            lambda folder: hf_files.huggingface_folder(folder, 2, kind="clip", weights="bin"),
        ),
        ("open_clip_model.safetensors", lambda folder: open_clip_files.open_clip_folder(folder, 2)),
    ],
    ids=["hf", "hf bin", "open_clip"],
)
def test_the_file_of_a_folder_is_as_good_as_the_folder(
    name: str, write: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / "model")
    checkpoint = open_checkpoint(folder / name)
    assert (checkpoint.quick_gelu, checkpoint.preprocessing) == (True, open_checkpoint(folder).preprocessing)
    assert checkpoint.preprocessing is not None
    assert_same(checkpoint, expected_tower("", 2))
    # alone, it does not say so much
    (folder / name).rename(tmp_path / name)
    alone = open_checkpoint(tmp_path / name)
    assert (alone.quick_gelu, alone.preprocessing) == (None, None)
    assert_same(alone, expected_tower("", 2))
    assert_same(alone.text, clip.text_state(2))


def test_heads_are_the_configurations(tmp_path: Path) -> None:
    """A tower may have more heads than one for every 64 features; then its features are others."""
    folder = hf_files.huggingface_folder(tmp_path / "model", kind="vision_with_projection")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_attention_heads": 8}))
    import transformers

    model = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(clip.images()).image_embeds
    found = features(built(open_checkpoint(folder)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - features(clip.tower())).abs().max() > 1e-3


@pytest.mark.parametrize("shorten", [True, False])
def test_a_configuration_may_leave_out_what_is_the_default(shorten: bool, tmp_path: Path) -> None:
    """QuickGELU is the default of Hugging Face's CLIP, so version 4 did not write it for a whole CLIP."""
    folder = hf_files.huggingface_folder(tmp_path / "model", kind="clip", transformers4=shorten)
    assert ("hidden_act" in json.loads((folder / "config.json").read_text())["vision_config"]) is not shorten
    assert open_checkpoint(folder).quick_gelu is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip_vision_model"}, r"siglip_vision_model"),
        ({"num_attention_heads": 3}, r"heads.*3"),
        ({"num_hidden_layers": 3}, r"layers.*3"),
        ({"hidden_act": "relu"}, r"relu"),
        ({"layer_norm_eps": 1e-6}, r"1e-06"),
        (None, r"config\.json"),
    ],
)
def test_a_configuration_that_does_not_fit(change: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    folder = hf_files.huggingface_folder(tmp_path / "model")
    path = folder / "config.json"
    path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as raised:
        open_checkpoint(folder)
    assert "\n" not in str(raised.value)
    # which of K checkpoints it is
    assert str(raised.value).startswith(str(folder))


@pytest.mark.parametrize("change", [{"pool_type": "avg"}, {"layers": 3}, {"timm_model_name": "vit_tiny"}])
def test_an_open_clip_configuration_that_does_not_fit(change: dict[str, Any], tmp_path: Path) -> None:
    folder = open_clip_files.open_clip_folder(tmp_path / "model")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=next(iter(change)).removesuffix("_model_name")) as raised:
        open_checkpoint(folder)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(folder))


def test_somebody_elses_configuration_beside_a_file(tmp_path: Path) -> None:
    path = open_clip_files.open_clip_file(tmp_path / "model.safetensors", 6)
    (tmp_path / "config.json").write_text('{"lr": 1e-5}')
    assert_same(open_checkpoint(path), expected_tower("", 6))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_config.json", "a LoRA adapter"),
        ("model_index.json", "a diffusers pipeline"),
        ("pareto_set.safetensors", "a run of ours"),
    ],
)
def test_folders_of_something_else(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path)


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    """Registered, it says what the weights in a folder are; removed, the folder is unknown again."""
    save_file(clip.tower(0).state_dict(), tmp_path / "own.safetensors")
    (tmp_path / "own.json").write_text("{}")
    layout = Layout(
        "own",
        configurations=("own.json",),
        weights=("own.safetensors",),
        recognises=lambda folder: (folder / "own.json").is_file(),
        holds=lambda path: False,
        describe=lambda folder, source: Description(heads=clip.HEADS, quick_gelu=False),
    )
    folders.register(layout)
    try:
        checkpoint = open_checkpoint(tmp_path)
    finally:
        del folders.LAYOUTS[layout.name]
    assert (checkpoint.format, checkpoint.heads, checkpoint.quick_gelu) == ("own", clip.HEADS, False)
    assert checkpoint.files == [tmp_path / "own.safetensors", tmp_path / "own.json"]
    assert_same(checkpoint, expected_tower(""))
    with pytest.raises(UserError, match="expected a folder with"):
        open_checkpoint(tmp_path)
