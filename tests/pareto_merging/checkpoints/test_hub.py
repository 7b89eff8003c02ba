"""Checkpoints by name: of the hub and of open_clip, from their caches alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import clip, hf_files, open_clip_files
from support.checkpoint_cases import assert_same, built, expected_tower, features

from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with owner/name, at main and at v1, while the hub is said to be out of reach."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    hf_files.hub_cache(cache, "owner/name", hf_files.huggingface_folder(tmp_path / "main", 1))
    other = hf_files.huggingface_folder(tmp_path / "v1", 2, kind="clip", transformers4=True, weights="bin", shards=True)
    hf_files.hub_cache(cache, "owner/name", other, revision="v1", commit="f" * 40)
    hf_files.hub_cache(cache, "owner/open-clip.model_1", open_clip_files.open_clip_folder(tmp_path / "open_clip", 3))
    for name, value in {"HF_HUB_OFFLINE": True, "HF_HUB_CACHE": str(cache)}.items():
        monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv(name, str(int(value)) if isinstance(value, bool) else value)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize(
    ("source", "name", "seed"),
    [
        ("owner/name", "hf vision", 1),
        ("owner/name@main", "hf vision", 1),
        (f"owner/name@{hf_files.REVISION}", "hf vision", 1),
        ("owner/name@v1", "hf clip", 2),
        (f"owner/name@{'f' * 40}", "hf clip", 2),
        ("owner/open-clip.model_1", "open_clip folder", 3),
    ],
)
def test_a_name_on_the_hub_is_found_in_the_cache(source: str, name: str, seed: int, hub: Path) -> None:
    checkpoint = open_checkpoint(source)
    assert_same(checkpoint, expected_tower(name, seed))
    assert checkpoint.quick_gelu is True
    assert checkpoint.preprocessing == {"size": clip.IMAGE, "mean": list(clip.MEAN), "std": list(clip.STD)}
    assert source.partition("@")[0] in checkpoint.source


@pytest.mark.parametrize("source", ["owner/other", "owner/name@v2", f"owner/name@{'e' * 40}"])
def test_a_name_that_is_not_in_the_cache(source: str, hub: Path) -> None:
    with pytest.raises(UserError, match=rf"^{source.partition('@')[0]}") as raised:
        open_checkpoint(source)
    assert "\n" not in str(raised.value)
    assert "cache" in str(raised.value)


def test_a_folder_comes_before_a_name_on_the_hub(hub: Path, tmp_path: Path) -> None:
    hf_files.huggingface_folder(tmp_path / "owner" / "name", 9)
    assert_same(open_checkpoint("owner/name"), expected_tower("hf vision", 9))


@pytest.mark.slow
def test_the_environment_variables_of_the_hub_are_followed(hub: Path) -> None:
    code = (
        "from pareto_merging.checkpoints.checkpoint import open_checkpoint\n"
        "from pareto_merging.errors import UserError\n"
        "print(open_checkpoint('owner/name')['ln_pre.bias'].double().sum().item())\n"
        "try:\n    open_checkpoint('owner/other')\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    total, message = done.stdout.splitlines()
    assert float(total) == clip.tower(1).ln_pre.bias.detach().double().sum().item()
    assert message.startswith("owner/other")


@pytest.fixture
def tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """open_clip knows a model "tiny" with three tags, and downloads it from the disk; the list is what it was asked."""
    import open_clip
    from open_clip import factory, pretrained

    path = open_clip_files.open_clip_file(tmp_path / "open_clip_model.safetensors", 7)
    asked: list[dict[str, Any]] = []

    def download(cfg: dict[str, Any], *_: Any, **__: Any) -> str:
        asked.append(cfg)
        return str(path)

    known = {"mean": clip.MEAN, "std": clip.STD}
    tags = {
        "openai": pretrained._pcfg(hf_hub="owner/tiny.openai/", quick_gelu=True),
        "some_data_e32": pretrained._pcfg(hf_hub="owner/tiny.some_data/", **known),
        "quick": pretrained._pcfg(hf_hub="owner/tiny.quick/", quick_gelu=True, **known),
    }
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", clip.MODEL_CONFIG)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", tags)
    monkeypatch.setattr("pareto_merging.checkpoints.hub._answers", lambda repository: True)
    for module in (open_clip, factory, pretrained):
        monkeypatch.setattr(module, "download_pretrained", download)
    return asked


@pytest.mark.parametrize(("name", "quick_gelu"), [("openai", True), ("some_data_e32", False), ("quick", True)])
def test_a_name_of_open_clip(name: str, quick_gelu: bool, tag: list[dict[str, Any]]) -> None:
    from open_clip.constants import OPENAI_DATASET_MEAN

    checkpoint = open_checkpoint(f"open_clip:tiny/{name}")
    assert [cfg["hf_hub"].split("/")[0] for cfg in tag] == ["owner"]
    assert_same(checkpoint, expected_tower("", 7))
    assert_same(checkpoint.text, clip.text_state(7))
    assert checkpoint.quick_gelu is quick_gelu
    assert checkpoint.preprocessing is not None
    assert checkpoint.preprocessing["mean"] == list(OPENAI_DATASET_MEAN if name == "openai" else clip.MEAN)
    assert checkpoint.preprocessing["size"] == clip.IMAGE
    torch.testing.assert_close(features(built(checkpoint)), features(clip.tower(7, quick_gelu)), atol=1e-5, rtol=0)
    assert f"tiny/{name}" in checkpoint.source


def test_open_clips_word_on_a_tag_goes_before_the_modules_of_its_archive(
    tag: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = open_clip_files.torchscript_archive(tmp_path / "tiny.pt", 3)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda cfg: str(archive))
    assert open_checkpoint(archive).quick_gelu is True
    assert open_checkpoint("open_clip:tiny/some_data_e32").quick_gelu is False
    assert open_checkpoint("open_clip:tiny/openai").quick_gelu is True


@pytest.mark.parametrize("source", ["open_clip:tiny/other", "open_clip:tini/openai", "open_clip:tiny", "open_clip:"])
def test_a_name_that_open_clip_does_not_know(source: str, tag: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"open_clip") as raised:
        open_checkpoint(source)
    assert "\n" not in str(raised.value)
    assert tag == []


@pytest.mark.parametrize("source", ["missing.pt", "missing.safetensors", "folder", "a/b/c"])
def test_what_is_not_there(source: str, tmp_path: Path, hub: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"{source}") as raised:
        open_checkpoint(source)
    assert "\n" not in str(raised.value)


def test_a_repository_for_timm_and_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json is timm's and so is pytorch_model.bin: open_clip's own files are the ones to take."""
    folder = open_clip_files.open_clip_folder(tmp_path / "both", 5)
    (folder / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224"}')
    torch.save(
        {"cls_token": torch.zeros(1, 1, 8), "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, folder / "t.bin"
    )
    (folder / "t.bin").rename(folder / "pytorch_model.bin")
    assert_same(open_checkpoint(folder), expected_tower("", 5))
    cache = hf_files.hub_cache(tmp_path / "cache", "timm/vit", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(open_checkpoint("timm/vit"), expected_tower("", 5))
    # as copied from a browser
    assert_same(open_checkpoint("https://huggingface.co/timm/vit/tree/main"), expected_tower("", 5))


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(UserError, match=r"x\.pt: expected a checkpoint, got a link to .*gone\.pt, which is missing"):
        open_checkpoint(tmp_path / "x.pt")
