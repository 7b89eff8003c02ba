"""Model cards: accepted by the hub's library, true, and with code that runs."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.exports import EXPORTS, PREPROCESSING, encoder, parts, small_clip

from pareto_merging.checkpoints.cards import Source, model_card
from pareto_merging.checkpoints.export import export_hugging_face

open_clip = pytest.importorskip("open_clip")


def front_matter(card: str) -> dict[str, Any]:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


SOURCES = [
    Source("pretrained", "openai/clip-vit-base-patch32", "ab12", "openai/clip-vit-base-patch32"),
    Source("MNIST", "/data/mnist.safetensors", "cd34"),
]


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
@pytest.mark.parametrize("has_text", [False, True])
def test_the_card_says_what_the_model_is(library: Any, has_text: bool) -> None:
    card = model_card(
        library,
        encoder=encoder(),
        has_text=has_text,
        preference={"MNIST": 0.7, "DTD": 0.3},
        method="icml2025",
        rank=16,
        lambda_grouping="tensor",
        sources=SOURCES,
        version="1.2",
    )
    front = front_matter(card)
    assert front["library_name"] == library
    assert front["base_model"] == ["openai/clip-vit-base-patch32"]
    assert {"merge", "clip"} <= set(front["tags"])
    assert front["pipeline_tag"] == ("zero-shot-image-classification" if has_text else "image-feature-extraction")
    for text in ("| MNIST | 0.7 |", "| DTD | 0.3 |", "icml2025", "rank 16", "each tensor", "ab12", "cd34", "1.2"):
        assert text in card
    assert "## Licence" in card and "license" not in front


def test_the_hub_library_reads_the_card() -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(model_card("transformers", encoder=encoder(), has_text=True, sources=SOURCES))
    assert card.data.library_name == "transformers"
    assert card.data.base_model == ["openai/clip-vit-base-patch32"]


def code_of(folder: Path) -> str:
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(("with_text", "without_projection"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("export_to", EXPORTS)
def test_the_code_on_the_card_runs(
    export_to: Callable[..., Path],
    with_text: bool,
    without_projection: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if export_to is export_hugging_face:
        pytest.importorskip("transformers")
    from PIL import Image

    vision, text = parts(small_clip())
    description = encoder()
    if without_projection:
        description["arguments"]["output_dim"] = None
        del vision["proj"]
    options: dict[str, Any] = {"encoder": description, "preprocessing": PREPROCESSING, "text_heads": 3}
    folder = export_to(vision, tmp_path / "x", text=text if with_text else {}, **options)
    colours = torch.randint(256, (20, 30, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    Image.fromarray(colours.numpy()).save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    values: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code_of(folder), values)
    assert values["features"].shape == (1, 32 if without_projection else 8)


def test_the_card_of_a_known_model_says_how_to_put_it_into_a_whole_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = model_card("open_clip", encoder={"architecture": "ViT-B-32", "quick_gelu": True}, has_text=False)
    calls = []
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: calls.append((args, kwargs)))
    code = card.split("```python\n")[1].split("```")[0]
    exec('import open_clip\nfolder = "."\nmodel = open_clip.create_model(' + code.split("open_clip.create_model(")[1])
    expected = {"pretrained": "openai", "force_quick_gelu": True, "pretrained_image_path": "./visual.safetensors"}
    assert calls == [(("ViT-B-32",), expected)]


HOSTILE = "x\n---\nlicense: evil\n| <script>alert(1)</script> `a` [b](c) *d*\u202e\x00 ![e](https://f)"


def test_hostile_names_stay_text() -> None:
    card = model_card(
        "transformers",
        encoder=encoder(),
        has_text=False,
        title=HOSTILE,
        preference={HOSTILE: 1.0},
        method=HOSTILE,
        lambda_grouping=HOSTILE,
        version=HOSTILE,
        sources=[Source(HOSTILE, HOSTILE, HOSTILE, HOSTILE), Source("t", hub_id="a/b\nlicense: evil")],
    )
    assert front_matter(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert card.count("\n---\n") == 1
    assert "\u202e" not in card and "\x00" not in card
    ours = "[Pareto Merging](https://arxiv.org/abs/2408.12105)"
    shown = card.split("---\n", 2)[2].replace(ours, "").split("```")[0]
    assert "script" in shown
    # the heading's own sign, and a table's bars and alignment, are all that is not escaped
    shown = "\n".join(line.removeprefix("## ").removeprefix("# ") for line in shown.splitlines())
    assert not re.findall(r"(?<!\\)[`*_\[\]<>#!]", shown)
    assert "https:" not in shown
    rows = [line for line in card.splitlines() if line.startswith("|")]
    unescaped = [line.replace("\\|", "").count("|") for line in rows]
    assert unescaped == [3, 3, 3, 4, 4, 4, 4]
