"""``pareto-merging export``: plain models that open_clip, transformers and this library load as the merged one."""

import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import one_line, run
from safetensors import safe_open
from safetensors.torch import save_file
from support import clip, hf_files, open_clip_files
from support.checkpoint_cases import assert_bits
from torch import Tensor, nn

import pareto_merging as pm
from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.run.folder import open_run
from pareto_merging.serving import Engine

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

FORMATS = ["safetensors", "open_clip", "huggingface"]
GAMMA = [0.7, 0.3]
OTHER = ["--preference", "0.7,0.3"]
CLIP = {"size": clip.IMAGE, "mean": list(clip.MEAN), "std": list(clip.STD)}


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fine_tuned(seed: int) -> nn.Module:
    """:func:`made.clip` with a small step in every number, as fine-tuning makes."""
    model, moved = clip.clip(0), clip.clip(seed)
    with torch.no_grad():
        for tensor, other in zip(model.state_dict().values(), moved.state_dict().values(), strict=True):
            tensor.lerp_(other, 0.05)
    return model


def write_run(folder: Path, pretrained: Path | str, *, quick_gelu: bool | None = None, dtype: str = "float32") -> Path:
    """A finished run of two tasks beside ``folder``/run.yaml; its low-rank term is not zero."""
    tasks = {}
    for seed, name in ((1, "first"), (2, "second")):
        save_file(dict(fine_tuned(seed).visual.state_dict()), folder / f"{name}.safetensors")
        tasks[name] = {"checkpoint": f"{name}.safetensors"}
    encoder = {"pretrained": str(pretrained), **({} if quick_gelu is None else {"quick_gelu": quick_gelu})}
    method = {"objective": "weight-distance", "steps": 4, "rank": 2, "learning_rate": 0.5}
    config = {"encoder": encoder, "tasks": tasks, "method": method, "dtype": dtype}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert run("train", folder / "run.yaml", "--out", folder / "run", "--quiet") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pretrained checkpoint is a whole CLIP of Hugging Face with a text tower and a tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    hf_files.huggingface_folder(folder / "pretrained", 0, kind="clip")
    (folder / "pretrained" / "vocab.json").write_text("{}")
    return write_run(folder, "pretrained")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pretrained checkpoint is a vision tower alone."""
    folder = tmp_path_factory.mktemp("tower")
    hf_files.huggingface_folder(folder / "pretrained", 0, kind="vision_with_projection")
    return write_run(folder, "pretrained")


@pytest.fixture
def mine(whole: Path, tmp_path: Path) -> Path:
    """A run of one's own, to be written into: its files are in the same folder."""
    shutil.copytree(whole.parent, tmp_path / "mine")
    path = tmp_path / "mine" / "run" / "config.yaml"
    path.write_text(path.read_text().replace(str(whole.parent), str(tmp_path / "mine")))
    return tmp_path / "mine" / "run"


def merged(folder: Path, gamma: Any = GAMMA) -> nn.Module:
    _, model = open_run(folder)
    return pm.merge(model, gamma).eval()


def features(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(clip.images())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach().float(), expected.float(), atol=1e-5, rtol=0)


def by_open_clip(folder: Path) -> Any:
    """open_clip's own way to load a folder, with or without a text tower, and its transform."""
    if (folder / "visual.safetensors").exists():
        settings = {"load_weights": False, "pretrained_image_path": str(folder / "visual.safetensors")}
    else:
        settings = {}
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", **settings)
    return model.eval(), preprocess


def by_transformers(folder: Path, kind: str) -> Any:
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


# what is written


def test_the_run_is_one_that_tells_mistakes_apart(whole: Path) -> None:
    """Otherwise the tests below could not fail: two preferences differ, and so do the two activations."""
    first, second = features(merged(whole)), features(merged(whole, [0.2, 0.8]))
    assert (first - second).abs().max() > 1e-3
    other = clip.tower(0, quick_gelu=False)
    other.load_state_dict(merged(whole).state_dict())
    assert (first - features(other)).abs().max() > 1e-3


@pytest.mark.parametrize("has_text", [False, True])
def test_open_clip_loads_it(has_text: bool, whole: Path, tower: Path, tmp_path: Path) -> None:
    folder, out = whole if has_text else tower, tmp_path / "out"
    assert run("export", folder, *OTHER, "--format", "open_clip", "--out", out, "--quiet") == 0
    model, preprocess = by_open_clip(out)
    close(model.encode_image(clip.images()), features(merged(folder)))
    assert tuple(preprocess.transforms[-1].mean) == clip.MEAN
    assert tuple(preprocess.transforms[-1].std) == clip.STD
    if has_text:
        close(model.encode_text(clip.tokens()), clip.clip(0).encode_text(clip.tokens()))


@pytest.mark.parametrize("has_text", [False, True])
def test_transformers_loads_it(has_text: bool, whole: Path, tower: Path, tmp_path: Path) -> None:
    folder, out = whole if has_text else tower, tmp_path / "out"
    assert run("export", folder, *OTHER, "--format", "huggingface", "--out", out, "--quiet") == 0
    expected = features(merged(folder))
    if has_text:
        model = by_transformers(out, "CLIPModel")
        close(model.get_image_features(clip.images()).pooler_output, expected)
        texts = hf_files.huggingface_model(0, kind="clip").get_text_features(clip.tokens()).pooler_output
        close(model.get_text_features(clip.tokens()).pooler_output, texts.detach())
        # whatever belongs to the text tower goes with it
        assert (out / "vocab.json").read_bytes() == b"{}"
    else:
        close(by_transformers(out, "CLIPVisionModelWithProjection")(clip.images()).image_embeds, expected)
    processor = transformers.CLIPImageProcessor.from_pretrained(out)
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (clip.MEAN, clip.STD)
    assert processor.crop_size["height"] == clip.IMAGE


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_text", [False, True])
def test_it_is_read_back_bit_by_bit(format: str, has_text: bool, whole: Path, tower: Path, tmp_path: Path) -> None:
    """An export opened again is the merged model: tensors, encoder, activation, normalisation, text tower."""
    folder = whole if has_text else tower
    out = tmp_path / ("out.safetensors" if format == "safetensors" else "out")
    assert run("export", folder, *OTHER, "--format", format, "--out", out, "--quiet") == 0
    found = open_checkpoint(out)
    assert_bits(found, merged(folder).state_dict())
    assert found.quick_gelu is True
    assert found.preprocessing == CLIP
    assert found.encoder is not None
    model = encoders.build(found.encoder)
    model.load_state_dict(dict(found))
    assert torch.equal(features(model), features(merged(folder)))
    assert_bits(found.text, clip.text_state(0) if has_text and format != "safetensors" else {})


@pytest.mark.parametrize("format", FORMATS)
def test_several_preferences(format: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, suffix = tmp_path / "out", ".safetensors" if format == "safetensors" else ""
    assert run("export", whole, "--preference", "grid:3", "--format", format, "--out", out, "--quiet") == 0
    expected = {f"01{suffix}": [0.0, 1.0], f"02{suffix}": [0.5, 0.5], f"03{suffix}": [1.0, 0.0]}
    listed = json.loads((out / "preferences.json").read_text())
    assert sorted(listed) == sorted(expected)
    assert sorted(list(weights.values()) for weights in listed.values()) == sorted(expected.values())
    assert capsys.readouterr().out.split() == [str(out / name) for name in expected]
    for name, weights in listed.items():
        assert list(weights) == ["first", "second"]
        assert_bits(open_checkpoint(out / name), merged(whole, list(weights.values())).state_dict())
    assert {path.name for path in out.iterdir()} == (
        {*expected, "preferences.json"} | ({"01.md", "02.md", "03.md"} if suffix else set())
    )


def test_a_list_and_its_default_place(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", mine, "--preferences", "0.5,0.5;first=0.9", "--quiet") == 0
    assert capsys.readouterr().out.split() == [str(mine / "merged" / f"0{n}.safetensors") for n in (1, 2)]
    assert_bits(open_checkpoint(mine / "merged" / "02.safetensors"), merged(mine, [0.9, 0.1]).state_dict())
    for format, name in (("safetensors", "merged.safetensors"), ("open_clip", "merged_open_clip")):
        assert run("export", mine, *OTHER, "--format", format, "--quiet") == 0
        assert capsys.readouterr().out.strip() == str(mine / name)
        assert_bits(open_checkpoint(mine / name), merged(mine).state_dict())


def test_a_shorter_list_over_a_longer_one(whole: Path, tmp_path: Path) -> None:
    """What --overwrite leaves is what preferences.json lists, and no model of the earlier list."""
    out = tmp_path / "out"
    for preferences in ("grid:4", "0.5,0.5;0.9,0.1"):
        assert run("export", whole, "--preference", preferences, "--out", out, "--overwrite", "--quiet") == 0
    listed = json.loads((out / "preferences.json").read_text())
    assert sorted(listed) == ["01.safetensors", "02.safetensors"]
    assert {path.name for path in out.glob("*.safetensors")} == set(listed)


def test_converting_an_export_changes_nothing(whole: Path, tmp_path: Path) -> None:
    for format in FORMATS:
        out = tmp_path / f"{format}.safetensors" if format == "safetensors" else tmp_path / format
        assert run("export", whole, *OTHER, "--format", format, "--out", out, "--quiet") == 0
        assert run("convert", out, tmp_path / f"converted_{format}.safetensors", "--quiet") == 0
        found = open_checkpoint(tmp_path / f"converted_{format}.safetensors")
        assert_bits(found, merged(whole).state_dict())
        assert (found.quick_gelu, found.preprocessing) == (True, CLIP)


@pytest.mark.parametrize("has_text", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_an_export_is_the_checkpoint_of_a_next_run(
    format: str, has_text: bool, whole: Path, tower: Path, tmp_path: Path
) -> None:
    """As ``pretrained:`` and as ``checkpoint:``, with nothing else said of the encoder."""
    folder, suffix = whole if has_text else tower, ".safetensors" if format == "safetensors" else ""
    for name, preference in (("base", "0.5,0.5"), ("tuned", "0.9,0.1")):
        out = tmp_path / f"{name}{suffix}"
        assert run("export", folder, "--preference", preference, "--format", format, "--out", out, "--quiet") == 0
    config = {
        "encoder": {"pretrained": f"base{suffix}"},
        "tasks": {"only": {"checkpoint": f"tuned{suffix}"}},
        "method": {"objective": "weight-distance", "steps": 1, "rank": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert run("train", tmp_path / "run.yaml", "--out", tmp_path / "run", "--quiet") == 0
    workspace, _ = open_run(tmp_path / "run")
    assert_bits(workspace.pretrained().state_dict(), merged(folder, [0.5, 0.5]).state_dict())
    assert torch.equal(features(workspace.pretrained()), features(merged(folder, [0.5, 0.5])))
    assert workspace.preprocessing == CLIP


# the text tower


def test_a_text_tower_of_another_checkpoint(tower: Path, whole: Path, tmp_path: Path) -> None:
    """--text-from gives one to a run without, and wins over the pretrained checkpoint's own."""
    open_clip_files.open_clip_folder(tmp_path / "other", 5)
    for folder in (tower, whole):
        for format in ("open_clip", "huggingface"):
            out = tmp_path / f"{folder.parent.name}_{format}"
            options = ["--format", format, "--text-from", tmp_path / "other", "--out", out, "--quiet"]
            assert run("export", folder, *OTHER, *options) == 0
            found = open_checkpoint(out)
            assert_bits(found, merged(folder).state_dict())
            assert_bits(found.text, clip.text_state(5))


@pytest.mark.parametrize("format", ["open_clip", "huggingface"])
def test_a_text_tower_with_another_activation(format: str, tower: Path, tmp_path: Path, capsys: Any) -> None:
    """Its features are as they were, or it is refused: open_clip has one activation for both towers."""
    open_clip_files.open_clip_folder(tmp_path / "gelu", 5, quick_gelu=False)
    out = tmp_path / "out"
    code = run("export", tower, *OTHER, "--format", format, "--text-from", tmp_path / "gelu", "--out", out, "--quiet")
    if code:
        assert code == 2 and "gelu" in one_line(capsys).lower()
        assert not out.exists()
        return
    texts = clip.clip(5, quick_gelu=False).encode_text(clip.tokens())
    if format == "open_clip":
        close(by_open_clip(out)[0].encode_text(clip.tokens()), texts.detach())
    else:
        close(by_transformers(out, "CLIPModel").get_text_features(clip.tokens()).pooler_output, texts.detach())


@pytest.mark.parametrize("kind", ["tower", "missing", "other width", "NaN"])
def test_a_text_tower_that_is_none(kind: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.safetensors"
    state = dict(clip.clip(5).state_dict())
    if kind == "tower":
        open_clip_files.open_clip_file(path, part="visual")
    elif kind == "other width":
        state["text_projection"] = torch.randn(clip.TEXT_WIDTH, clip.EMBED + 8)
        save_file(state, path)
    elif kind == "NaN":
        state["ln_final.bias"][0] = float("nan")
        save_file(state, path)
    capsys.readouterr()
    for format in ("open_clip", "huggingface"):
        out = tmp_path / "new" / "out"
        assert run("export", whole, *OTHER, "--format", format, "--text-from", path, "--out", out, "--quiet") == 2
        assert "text" in one_line(capsys)
        assert not (tmp_path / "new").exists() or content(tmp_path / "new") == {}


def test_a_text_tower_has_no_place_in_one_file(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The vision encoder's file cannot hold one: what was asked for is refused, not passed over."""
    out = tmp_path / "out.safetensors"
    assert run("export", whole, *OTHER, "--text-from", whole.parent / "pretrained", "--out", out, "--quiet") == 2
    assert "text" in one_line(capsys)
    assert not out.exists()


# dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_changes_no_more_than_rounding(dtype: str, tmp_path: Path) -> None:
    """A run in 16 bits exports 16 bits: exactly its own merged model, and the float32 run's up to their roundings."""
    hf_files.huggingface_folder(tmp_path / "pretrained", 0, kind="clip")
    folder = write_run(tmp_path, "pretrained", dtype=dtype)
    workspace, model = open_run(folder)
    own = pm.merge(model, GAMMA).state_dict()
    assert {tensor.dtype for tensor in own.values()} == {getattr(torch, dtype)}
    # the same learned λ, A, G and B on the float32 weights
    finetuned = {name: fine_tuned(seed).visual for seed, name in ((1, "first"), (2, "second"))}
    reference = pm.parametrize(clip.tower(0), finetuned, rank=2)
    learned = pm.learned_parameters(model)
    with torch.no_grad():
        for name, parameter in pm.learned_parameters(reference).items():
            parameter.copy_(learned[name])
    wide = pm.merge(reference, GAMMA).state_dict()
    bound = torch.finfo(getattr(torch, dtype)).eps
    for format in FORMATS:
        out = tmp_path / ("out.safetensors" if format == "safetensors" else format)
        assert run("export", folder, *OTHER, "--format", format, "--out", out, "--quiet") == 0
        found = open_checkpoint(out)
        assert_bits(found, own)
        assert (found.quick_gelu, found.preprocessing) == (True, CLIP)
        assert found.encoder == workspace.encoder_description
        for name, tensor in wide.items():
            # W0, two task vectors and the sum are rounded
            error = (found[name].float() - tensor).abs().max()
            assert error <= 4 * bound * tensor.abs().max(), name
    model_class = by_transformers(tmp_path / "huggingface", "CLIPModel")
    with torch.no_grad():
        found_features = model_class.float().get_image_features(clip.images()).pooler_output
    plain = encoders.build(workspace.encoder_description)
    plain.load_state_dict({name: tensor.float() for name, tensor in own.items()})
    close(found_features, features(plain))


# the card


def card_of(out: Path) -> Path:
    return out.with_suffix(".md") if out.suffix == ".safetensors" else out / "README.md"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_text", [False, True])
def test_the_card_and_its_code(
    format: str, has_text: bool, whole: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub reads its front matter, and its code, run where the card is, gives the merged model's features."""
    from huggingface_hub import ModelCard
    from PIL import Image

    folder = whole if has_text else tower
    place = tmp_path / "place"
    out = place / "out.safetensors" if format == "safetensors" else place
    assert run("export", folder, *OTHER, "--format", format, "--out", out, "--quiet") == 0
    card = ModelCard.load(card_of(out))
    assert card.data.library_name == ("transformers" if format == "huggingface" else "open_clip")
    assert "merge" in card.data.tags
    is_whole = has_text and format != "safetensors"
    assert card.data.pipeline_tag == ("zero-shot-image-classification" if is_whole else "image-feature-extraction")
    text = card.text
    assert re.search(r"\| first \| 0\.7 \|", text) and re.search(r"\| second \| 0\.3 \|", text)
    _, model = open_run(folder)
    for digest in model.pareto.digests.values():
        assert digest[:16] in text
    assert str(tmp_path) not in text and str(folder.parent) not in text
    pixels = torch.randint(256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(place / "photo.jpg")
    monkeypatch.chdir(place)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    scope: dict[str, Any] = {}
    exec(compile(blocks[0], "card", "exec"), scope)
    transform = open_clip.image_transform(clip.IMAGE, is_train=False, mean=clip.MEAN, std=clip.STD)
    with torch.no_grad():
        expected = merged(folder)(transform(Image.open("photo.jpg"))[None])
    # two libraries' bicubic differ by less than a step of 255
    limit = 0.1 if format == "huggingface" else 1e-5
    torch.testing.assert_close(scope["features"].detach(), expected, atol=limit, rtol=0)


def test_the_card_of_checkpoints_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard, constants

    source = hf_files.huggingface_folder(tmp_path / "source", 0, kind="clip")
    hf_files.hub_cache(tmp_path / "hub", "owner/name", source)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = write_run(tmp_path, "owner/name@main")
    assert run("export", folder, *OTHER, "--format", "open_clip", "--out", tmp_path / "out", "--quiet") == 0
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == ["owner/name"]
    assert data.to_dict()["base_model_relation"] == "merge"


def test_the_card_says_what_was_learned(whole: Path, tmp_path: Path) -> None:
    """Without a low-rank term or learned λ, it does not say that there are."""
    config = yaml.safe_load((whole.parent / "run.yaml").read_text())
    config["encoder"]["pretrained"] = str(whole.parent / "pretrained")
    for name, task in config["tasks"].items():
        task["checkpoint"] = str(whole.parent / f"{name}.safetensors")
    cards = {}
    for name, method in {
        "none": {"low_rank": "none"},
        "fixed": {"learn_lambda": False},
        "outer": {"core": "outer-product", "rank": 7},
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "method": {**config["method"], **method}}))
        assert run("train", path, "--out", tmp_path / name, "--quiet") == 0
        assert run("export", tmp_path / name, *OTHER, "--format", "open_clip", "--out", tmp_path / f"{name}_out") == 0
        cards[name] = (tmp_path / f"{name}_out" / "README.md").read_text()
    assert "ow-rank part of rank" not in cards["none"]
    assert "λ learned" not in cards["fixed"]
    # the outer products have a column for each of two tasks, whatever rank says
    assert "rank 7" not in cards["outer"]


def test_the_embedded_suite_in_every_format(tmp_path: Path) -> None:
    """An encoder that is described by a JSON file of arguments, at images of 8 pixels."""
    method = {"objective": "weight-distance", "steps": 1, "rank": 2}
    config = {"suite": "digits", "tasks": ["upright", "rotated"], "method": method}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert run("train", tmp_path / "run.yaml", "--out", tmp_path / "run", "--quiet") == 0
    workspace, model = open_run(tmp_path / "run")
    plain = pm.merge(model, GAMMA).eval()
    images = clip.images(size=8)
    with torch.no_grad():
        expected = plain(images)
    for format in FORMATS:
        out = tmp_path / ("out.safetensors" if format == "safetensors" else format)
        assert run("export", tmp_path / "run", *OTHER, "--format", format, "--out", out, "--quiet") == 0
        found = open_checkpoint(out)
        assert_bits(found, plain.state_dict())
        assert found.quick_gelu is False
        assert found.preprocessing == workspace.preprocessing
    with torch.no_grad():
        close(by_open_clip(tmp_path / "open_clip")[0].encode_image(images), expected)
        model = by_transformers(tmp_path / "huggingface", "CLIPVisionModelWithProjection")
        close(model(images).image_embeds, expected)


# what is there already


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_there_is_replaced_only_when_asked(format: str, whole: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / ("out.safetensors" if format == "safetensors" else "out")
    options = ["--format", format, "--out", out, "--quiet"]
    assert run("export", whole, *OTHER, *options) == 0
    kept = content(tmp_path)
    capsys.readouterr()
    assert run("export", whole, "--preference", "0.1,0.9", *options) == 2
    assert "existing" in one_line(capsys)
    assert content(tmp_path) == kept
    assert run("export", whole, "--preference", "0.1,0.9", *options, "--overwrite") == 0
    assert content(tmp_path).keys() == kept.keys()
    assert_bits(open_checkpoint(out), merged(whole, [0.1, 0.9]).state_dict())
    assert "| first | 0.1 |" in card_of(out).read_text()


def test_somebodys_notes_are_not_taken_for_a_card(whole: Path, tmp_path: Path, capsys: Any) -> None:
    """``model.safetensors`` does not exist yet, but the ``model.md`` beside it is somebody's."""
    (tmp_path / "model.md").write_text("my notes")
    code = run("export", whole, *OTHER, "--out", tmp_path / "model.safetensors", "--quiet")
    assert (tmp_path / "model.md").read_text() == "my notes"
    if code:
        assert code == 2 and "model.md" in one_line(capsys)
        assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("target", "format"),
    [
        ("first.safetensors", "safetensors"),
        ("run/pareto_set.safetensors", "safetensors"),
        ("run/checkpoint.safetensors", "safetensors"),
        ("pretrained/model.safetensors", "safetensors"),
        ("pretrained", "huggingface"),
        ("pretrained", "open_clip"),
        ("run", "huggingface"),
        (".", "open_clip"),
    ],
)
def test_what_a_run_is_made_of_is_not_replaced(target: str, format: str, mine: Path, capsys: Any) -> None:
    """Not a checkpoint, and not the weights inside a checkpoint's folder, even with --overwrite."""
    before = content(mine.parent)
    options = ["--format", format, "--out", mine.parent / target, "--overwrite", "--quiet"]
    assert run("export", mine, *OTHER, *options) == 2
    one_line(capsys)
    assert content(mine.parent) == before


def test_a_folder_with_a_checkpoint_of_the_run_in_it_is_not_replaced(mine: Path, capsys: Any) -> None:
    """A model's folder beside whose weights somebody has put their fine-tuned ones."""
    folder = hf_files.huggingface_folder(mine.parent / "base", 9)
    shutil.move(mine.parent / "first.safetensors", folder / "first.safetensors")
    path = mine / "config.yaml"
    path.write_text(path.read_text().replace("mine/first.safetensors", "mine/base/first.safetensors"))
    merged(mine)
    capsys.readouterr()
    before = content(mine.parent)
    assert run("export", mine, *OTHER, "--format", "huggingface", "--out", folder, "--overwrite", "--quiet") == 2
    one_line(capsys)
    assert content(mine.parent) == before


def test_images_of_a_run_are_not_replaced(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"images": clip.images()}, mine.parent / "images.safetensors")
    path = mine / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["tasks"]["first"]["merging"] = str(mine.parent / "images.safetensors")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    before = content(mine.parent)
    for options in (OTHER, ["--folded"]):
        assert run("export", mine, *options, "--out", mine.parent / "images.safetensors", "--overwrite") == 2
        one_line(capsys)
        assert content(mine.parent) == before


def test_the_checkpoint_of_the_text_tower_is_not_replaced(whole: Path, tmp_path: Path, capsys: Any) -> None:
    folder = hf_files.huggingface_folder(tmp_path / "text", 5, kind="clip")
    capsys.readouterr()
    before = content(tmp_path)
    options = ["--format", "huggingface", "--text-from", folder, "--out", folder, "--overwrite", "--quiet"]
    assert run("export", whole, *OTHER, *options) == 2
    one_line(capsys)
    assert content(tmp_path) == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_leaves_the_old_model_or_none(
    format: str, is_there: bool, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files fails in the middle of writing, as a full disk does: one line, exit code 2."""
    out = tmp_path / ("out.safetensors" if format == "safetensors" else "out")
    options = ["--format", format, "--out", out, "--overwrite", "--quiet"]
    if is_there:
        assert run("export", whole, "--preference", "0.1,0.9", *options) == 0
    before = content(tmp_path)
    capsys.readouterr()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = run("export", whole, *OTHER, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code == 2
    one_line(capsys)
    assert content(tmp_path) == before


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupt_leaves_the_old_model(
    format: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pareto_merging.checkpoints import safetensors

    out = tmp_path / ("out.safetensors" if format == "safetensors" else "out")
    options = ["--format", format, "--out", out, "--overwrite", "--quiet"]
    assert run("export", whole, "--preference", "0.1,0.9", *options) == 0
    before = content(tmp_path)

    def stop(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "save_file", stop)
    assert run("export", whole, *OTHER, *options) == 130
    assert content(tmp_path) == before
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_list_tells_no_lies(
    format: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two of three models that replace others: preferences.json lists no model as what it is not."""
    from pareto_merging.run import export as exports

    out = tmp_path / "out"
    options = ["--format", format, "--out", out, "--overwrite", "--quiet"]
    assert run("export", whole, "--preference", "0.1,0.9;0.2,0.8;0.3,0.7", *options) == 0
    write, count = exports._Exporter.write, 0

    def stop(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        write(*arguments, **options)

    monkeypatch.setattr(exports._Exporter, "write", stop)
    assert run("export", whole, "--preference", "0.9,0.1;0.8,0.2;0.7,0.3", *options) == 130
    listed = json.loads((out / "preferences.json").read_text()) if (out / "preferences.json").exists() else {}
    for name, weights in listed.items():
        if (out / name).exists():
            assert_bits(open_checkpoint(out / name), merged(whole, list(weights.values())).state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preference", "0.7,0.3", "--format", "onnx"], "onnx"),
        (["--folded", "--format", "huggingface"], "--folded"),
        (["--folded", "--text-from", "x"], "--folded"),
        (["--preference", "0.7,0.4", "--format", "huggingface"], "sum of 1"),
        (["--preference", "third=1", "--format", "open_clip"], "third"),
        (["--preference", "grid:3", "--out", "OUT/a.safetensors"], "expected a folder for several preferences"),
        (["--preference", "0.7,0.3", "--out", "OUT/a"], "ends in .safetensors"),
    ],
)
def test_mistakes_leave_nothing(
    arguments: list[str], message: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(whole.parent)
    assert run("export", whole, *(argument.replace("OUT", str(tmp_path / "new")) for argument in arguments)) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "new").exists()
    assert content(whole.parent) == before


def test_a_damaged_export_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    assert run("export", whole, *OTHER, "--out", out, "--quiet") == 0
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    capsys.readouterr()
    assert run("convert", out, tmp_path / "b.safetensors") == 2
    assert "checksum" in one_line(capsys)


# a run of the preset expert: a base of its own, and a constant term

PREFERENCES = torch.tensor([[1.0, 0.0], [0.7, 0.3], [0.5, 0.5], [0.0, 1.0]])


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the preset ``expert`` on few images of the embedded suite; its constant term is not zero."""
    folder = tmp_path_factory.mktemp("guided")
    method = {"preset": "expert", "steps": 4, "start_images": 20, "batch_size": 8, "rank": 2, "constant_rank": 2}
    method |= {"learning_rate": 0.05, "few_images": "as-given", "warm_up": 0}
    config = {"suite": "digits", "tasks": ["upright", "mirrored"], "method": method}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert run("train", folder / "run.yaml", "--out", folder / "run", "--quiet") == 0
    return folder / "run"


def of_guided(guided: Path, gammas: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """The Pareto model, images, and their features [n, D] by the Pareto model itself, each at its own preference."""
    workspace, model = open_run(guided)
    images = torch.stack([workspace.merging_tasks()["upright"].images[at][0] for at in range(len(gammas))])
    rows = []
    for image, gamma in zip(images, gammas, strict=True):
        with torch.no_grad(), pm.preference(model, gamma):
            rows.append(model(image[None]))
    return model, images, torch.cat(rows)


def test_a_guided_run_has_something_to_lose(guided: Path) -> None:
    """Otherwise the tests below could not fail: the constant term, the base and the preference each change features."""
    model, images, expected = of_guided(guided, PREFERENCES[2:3].expand(4, -1))
    _, _, other = of_guided(guided, PREFERENCES[:1].expand(4, -1))
    assert (expected - other).abs().max() > 1e-3
    constant = [(name, p) for name, p in model.named_parameters() if name.endswith("A_c")]
    assert constant and all(p.abs().max() > 1e-3 for _, p in constant)
    with torch.no_grad():
        for _, p in constant:
            p.zero_()
        with pm.preference(model, [0.5, 0.5]):
            assert (model(images) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("at", range(4))
def test_a_guided_run_as_a_plain_model(at: int, guided: Path, tmp_path: Path) -> None:
    gamma, out = PREFERENCES[at], tmp_path / "out.safetensors"
    text = ",".join(str(float(share)) for share in gamma)
    assert run("export", guided, "--preference", text, "--out", out, "--quiet") == 0
    found = open_checkpoint(out)
    assert found.encoder is not None
    plain = encoders.build(found.encoder)
    plain.load_state_dict(dict(found))
    _, images, expected = of_guided(guided, gamma.expand(4, -1))
    with torch.no_grad():
        close(plain.eval()(images), expected)
    assert not any("A_c" in name or "B_c" in name for name in found)


def test_a_guided_run_served_with_a_preference_for_each_image(guided: Path, tmp_path: Path) -> None:
    out = tmp_path / "folded.safetensors"
    assert run("export", guided, "--folded", "--out", out, "--quiet") == 0
    with safe_open(out, "pt") as file:
        assert not [name for name in file.keys() if "A_c" in name or "B_c" in name]  # noqa: SIM118
    engine = Engine(out, "cpu", max_batch=4)
    _, images, expected = of_guided(guided, PREFERENCES)
    close(engine(images, PREFERENCES), expected)
    # one for all: first as it comes, then merged
    for gamma in PREFERENCES:
        _, _, shared = of_guided(guided, gamma.expand(4, -1))
        for _ in range(3):
            close(engine(images, gamma), shared)
    first = images[:1]
    swept = engine.sweep(first, PREFERENCES)[:, 0]
    close(swept, engine(first.expand(4, -1, -1, -1), PREFERENCES))
