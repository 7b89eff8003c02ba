"""``pareto-merging convert``: every format becomes one safetensors file that says the same, or nothing at all."""

import json
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import one_line, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import clip, hf_files, open_clip_files, pickled_modules
from support.checkpoint_cases import assert_bits
from torch import Tensor

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.checkpoints.convert import convert_checkpoint
from pareto_merging.data.tasks import read_head
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

RELEASE = Path(__file__).parents[2] / "data" / "task_vectors"
Writer = Callable[[Path], Path]


def hugging_face(**options: Any) -> Writer:
    return lambda folder: hf_files.huggingface_folder(folder / "model", 3, **options)


def open_clip_file(name: str, **options: Any) -> Writer:
    return lambda folder: open_clip_files.open_clip_file(folder / name, 3, **options)


def task_vectors(**options: Any) -> Writer:
    return lambda folder: pickled_modules.task_vectors_encoder(folder / "finetuned.pt", 3, **options)


def file_of(write: Writer, name: str) -> Writer:
    """The weights inside a folder, named themselves."""
    return lambda folder: write(folder) / name


FORMATS: dict[str, Writer] = {
    "hf vision": hugging_face(),
    "hf vision, transformers 4, bin, position_ids": hugging_face(transformers4=True, weights="bin", position_ids=True),
    "hf vision, GELU": hugging_face(quick_gelu=False),
    "hf vision, no preprocessor": hugging_face(preprocessor=False),
    "hf projected": hugging_face(kind="vision_with_projection"),
    "hf projected, shards": hugging_face(kind="vision_with_projection", shards=True),
    "hf clip": hugging_face(kind="clip"),
    "hf clip, transformers 4": hugging_face(kind="clip", transformers4=True, position_ids=True),
    "hf clip, bin, shards": hugging_face(kind="clip", weights="bin", shards=True),
    "hf clip, processor": hugging_face(kind="clip", processor=True),
    "hf clip, bfloat16": hugging_face(kind="clip", dtype=torch.bfloat16),
    "hf clip, the file": file_of(hugging_face(kind="clip"), "model.safetensors"),
    "open_clip pt": open_clip_file("clip.pt"),
    "open_clip pt, legacy": open_clip_file("clip.pt", legacy=True),
    "open_clip training": open_clip_file("epoch_32.pt", training=True),
    "open_clip training, legacy": open_clip_file("epoch_32.pt", training=True, legacy=True),
    "open_clip safetensors": open_clip_file("clip.safetensors"),
    "open_clip float16": open_clip_file("clip.pt", dtype=torch.float16),
    "open_clip float64": open_clip_file("clip.safetensors", dtype=torch.float64),
    "open_clip visual": open_clip_file("visual.pth", part="visual"),
    "open_clip visual safetensors": open_clip_file("visual.safetensors", part="visual"),
    "open_clip folder": lambda folder: open_clip_files.open_clip_folder(folder / "model", 3),
    "open_clip folder, GELU": lambda folder: open_clip_files.open_clip_folder(folder / "model", 3, False),
    "open_clip folder, no preprocessing": lambda folder: open_clip_files.open_clip_folder(
        folder / "model", 3, preprocess=False
    ),
    "torchscript": lambda folder: open_clip_files.torchscript_archive(folder / "ViT-B-32.pt", 3),
    "task vectors": task_vectors(),
    "task vectors, legacy": task_vectors(legacy=True),
    "task vectors, keep_lang": task_vectors(keep_lang=True),
    "task vectors, GELU": task_vectors(quick_gelu=False),
    **{
        f"release {name}": lambda folder, name=name: RELEASE / name  # type: ignore[misc]
        for name in ("zeroshot.pt", "MNIST/finetuned.pt", "DTD/finetuned.pt", "keep_lang.pt", "legacy.pt")
    },
}


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An open_clip file in a folder of its own."""
    return open_clip_files.open_clip_file(tmp_path / "in" / "clip.pt", 3)


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    convert_checkpoint(source, tmp_path / "out" / "a.safetensors", progress=False)
    return tmp_path / "out" / "a.safetensors"


# what comes out


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_converted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tensors, encoder, activation and normalisation as reading the checkpoint itself gives."""
    path, out = FORMATS[name](tmp_path / "in"), tmp_path / "out" / "a.safetensors"
    before = open_checkpoint(path)
    # what transformers said when it wrote the checkpoint
    capsys.readouterr()
    assert run("convert", path, out) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: ") and captured.out.count("\n") == 1
    assert captured.err == ""
    assert names_in(tmp_path / "out") == ["a.safetensors"]
    after = open_checkpoint(out)
    assert_bits(after, before)
    assert after.encoder == before.encoder
    assert after.architecture == before.architecture
    assert after.quick_gelu is before.quick_gelu
    assert after.preprocessing == before.preprocessing
    # plain tensors for any reader of safetensors
    assert_bits(load_file(out), dict(before))
    if not name.startswith("release"):
        # what was written into the checkpoint, not only what was read from it
        state = dict(clip.tower(3).state_dict())
        for key, tensor in after.items():
            assert torch.equal(tensor, state[key].to(tensor.dtype)), key
        assert set(state) - set(after) <= {"proj"}
        assert after.quick_gelu in (None, "GELU" not in name)


def test_separate_and_joined_projections_become_the_same_file(tmp_path: Path) -> None:
    """Hugging Face's q, k, v and open_clip's in-projection: the same tensors in the same order, byte for byte."""
    for name in ("hf clip", "open_clip folder", "task vectors"):
        convert_checkpoint(FORMATS[name](tmp_path / name), tmp_path / f"{name}.safetensors", progress=False)
    first, *others = [dict(load_file(tmp_path / f"{name}.safetensors")) for name in ("hf clip", "open_clip folder")]
    for other in others:
        assert_bits(other, first)
    # what the files say of the encoder is the same as well
    said = []
    for name in ("hf clip", "open_clip folder", "task vectors"):
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
        said.append({key: json.loads(metadata[key]) for key in ("encoder", "preprocessing", "checksums")})
        # of the header, which says where it came from
        said[-1]["checksums"].pop("")
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("name", ["hf clip", "open_clip folder, GELU", "task vectors", "torchscript"])
def test_a_converted_file_builds_the_encoder_again(name: str, tmp_path: Path) -> None:
    path, out = FORMATS[name](tmp_path / "in"), tmp_path / "a.safetensors"
    assert run("convert", path, out, "--dtype", "float32", "--quiet") == 0
    found = open_checkpoint(out)
    assert found.encoder is not None
    model = encoders.build(found.encoder)
    model.load_state_dict(load_file(out))
    expected = clip.tower(3, quick_gelu="GELU" not in name)
    if name == "torchscript":
        expected.load_state_dict({key: tensor.float() for key, tensor in open_checkpoint(path).items()})
    with torch.no_grad():
        torch.testing.assert_close(model(clip.images()), expected(clip.images()), atol=1e-5, rtol=0)
        other = clip.tower(3, quick_gelu="GELU" in name)
        assert (model(clip.images()) - other(clip.images())).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["hf clip", "open_clip float16", "open_clip float64", "torchscript"])
def test_the_dtype_of_the_numbers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path, out = FORMATS[name](tmp_path / "in"), tmp_path / "a.safetensors"
    assert run("convert", path, out, "--dtype", str(dtype).removeprefix("torch."), "--quiet") == 0
    before, after = open_checkpoint(path), open_checkpoint(out)
    assert_bits(after, {key: tensor.to(dtype) for key, tensor in before.items()})
    assert after.encoder == before.encoder


def test_numbers_that_a_narrower_dtype_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """70000 is inf in float16: the file could not be read again, so none is written."""
    state = clip.clip().state_dict()
    state["visual.ln_pre.weight"][3] = 70000.0
    save_file(state, tmp_path / "clip.safetensors")
    assert run("convert", tmp_path / "clip.safetensors", tmp_path / "a.safetensors", "--dtype", "float16") == 2
    assert "clip.safetensors" in one_line(capsys)
    assert names_in(tmp_path) == ["clip.safetensors"]
    # bfloat16 has the range of float32
    assert run("convert", tmp_path / "clip.safetensors", tmp_path / "a.safetensors", "--dtype", "bfloat16") == 0
    assert len(dict(open_checkpoint(tmp_path / "a.safetensors"))) == len(clip.tower().state_dict())


def test_what_is_said_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = FORMATS["hf clip"](tmp_path / "in"), tmp_path / "a.safetensors"
    capsys.readouterr()
    assert run("convert", path, out, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    state = clip.tower().state_dict()
    assert found == {
        "kind": "encoder",
        "source": str(path),
        "target": str(out),
        "format": "huggingface",
        "tensors": len(state),
        "numbers": sum(tensor.numel() for tensor in state.values()),
        "encoder": open_checkpoint(path).encoder,
        "preprocessing": {"size": clip.IMAGE, "mean": list(clip.MEAN), "std": list(clip.STD)},
        "projection": True,
        "text_tower": True,
    }


@pytest.mark.parametrize(
    ("name", "said", "unsaid"),
    [
        ("hf vision", ["QuickGELU", "no projection"], ["text tower"]),
        ("hf clip", ["QuickGELU", "text tower was left out"], ["no projection"]),
        ("open_clip folder, GELU", [" GELU,", "text tower was left out"], ["QuickGELU"]),
        ("open_clip visual", ["does not say"], ["text tower", "no projection"]),
    ],
)
def test_what_is_said_to_a_reader(
    name: str, said: list[str], unsaid: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", FORMATS[name](tmp_path / "in"), tmp_path / "a.safetensors") == 0
    line = capsys.readouterr().out
    assert "128-wide, 2 layers, 32 px" in line
    assert all(text in line for text in said), line
    assert not any(text in line for text in unsaid), line


def test_a_progress_bar(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On a terminal, on standard error; none with --quiet, and nothing but JSON with --json."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run("convert", source, tmp_path / "a.safetensors") == 0
    captured = capsys.readouterr()
    count = len(clip.tower().state_dict())
    assert "converting" in captured.err and f"{count}/{count}" in captured.err
    assert captured.out.startswith(str(tmp_path))
    assert run("convert", source, tmp_path / "b.safetensors", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert run("convert", source, tmp_path / "c.safetensors", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == "" and json.loads(captured.out)["kind"] == "encoder"


def test_the_same_input_has_the_same_bytes(source: Path, converted: Path, tmp_path: Path) -> None:
    assert run("convert", source, tmp_path / "b.safetensors", "--quiet") == 0
    assert (tmp_path / "b.safetensors").read_bytes() == converted.read_bytes()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(converted.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("name", ["open_clip pt", "hf vision", "torchscript", "release zeroshot.pt"])
def test_converting_again_changes_nothing(name: str, tmp_path: Path) -> None:
    """A converted file converted once more is the same file, with where its numbers came from first."""
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run("convert", FORMATS[name](tmp_path / "in"), first, "--quiet") == 0
    assert run("convert", first, second, "--quiet") == 0
    assert_bits(open_checkpoint(second), open_checkpoint(first))
    assert second.read_bytes() == first.read_bytes()


# heads


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: pickled_modules.task_vectors_head(folder / "head.pt", 4),
        lambda folder: pickled_modules.task_vectors_head(folder / "head.pt", 4, logit_scale=41.5, legacy=True),
        lambda folder: pickled_modules.task_vectors_head(folder / "head.bin", 4, transposed=True),
        lambda folder: RELEASE / "head_MNISTVal.pt",
        lambda folder: RELEASE / "head_DTDVal.pt",
    ],
    ids=["zip", "legacy", "transposed", "MNIST", "DTD"],
)
def test_a_head_is_converted(write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "in"), tmp_path / "out" / "head.safetensors"
    assert run("convert", path, out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    before, after = read_head(path), read_head(out)
    assert torch.equal(after.weight, before.weight)
    assert after.logit_scale == before.logit_scale == found["logit_scale"]
    assert (found["kind"], found["classes"], found["dim"]) == ("head", *before.weight.shape)
    assert names_in(tmp_path / "out") == ["head.safetensors"]
    assert run("convert", path, out, "--overwrite", "--dtype", "float16") == 0
    assert load_file(out)["weight"].dtype == torch.float16
    torch.testing.assert_close(read_head(out).weight, before.weight, atol=1e-3, rtol=0)
    line = capsys.readouterr().out
    assert f"{found['classes']} classes" in line and f"{before.logit_scale:.4g}" in line


def test_a_pickled_head_is_known_by_its_content(tmp_path: Path) -> None:
    """As every other file is: a wrong name is no other format."""
    path = pickled_modules.task_vectors_head(tmp_path / "head.pt", 4)
    path = path.rename(tmp_path / "head.safetensors")
    assert run("convert", path, tmp_path / "out.safetensors", "--quiet") == 0
    assert read_head(tmp_path / "out.safetensors").weight.shape == (5, clip.EMBED)


def test_a_converted_head_is_converted_again(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run("convert", RELEASE / "head_MNISTVal.pt", first, "--quiet") == 0
    assert run("convert", first, second, "--quiet") == 0
    assert torch.equal(read_head(second).weight, read_head(first).weight)
    assert read_head(second).logit_scale == read_head(first).logit_scale


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "head.safetensors"
    assert run("convert", RELEASE / "head_MNISTVal.pt", out, "--quiet") == 0
    content = bytearray(out.read_bytes())
    content[-7] ^= 1
    out.write_bytes(content)
    with pytest.raises(UserError, match=r"head\.safetensors.*(checksum|damaged)"):
        read_head(out)


# names of the hub and of open_clip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    hf_files.hub_cache(cache, "owner/name", hf_files.huggingface_folder(tmp_path / "main", 3, kind="clip"))
    other = hf_files.huggingface_folder(tmp_path / "v1", 5, transformers4=True, weights="bin", shards=True)
    hf_files.hub_cache(cache, "owner/name", other, revision="v1", commit="f" * 40)
    hf_files.hub_cache(cache, "owner/open-clip", open_clip_files.open_clip_folder(tmp_path / "open_clip", 7))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize(
    ("source", "seed"),
    [
        ("owner/name", 3),
        (f"owner/name@{hf_files.REVISION}", 3),
        ("owner/name@v1", 5),
        ("owner/open-clip", 7),
    ],
)
def test_a_name_on_the_hub(source: str, seed: int, hub: Path, tmp_path: Path, capsys: Any) -> None:
    blobs = names_in(hub)
    assert run("convert", source, tmp_path / "a.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["source"] == source
    found, state = open_checkpoint(tmp_path / "a.safetensors"), clip.tower(seed).state_dict()
    assert len(found) >= len(state) - 1
    for key, tensor in found.items():
        assert torch.equal(tensor, state[key]), key
    assert found.quick_gelu is True
    assert found.preprocessing == {"size": clip.IMAGE, "mean": list(clip.MEAN), "std": list(clip.STD)}
    assert names_in(hub) == blobs


@pytest.mark.parametrize("source", ["owner/other", "owner/name@v2"])
def test_a_name_that_is_not_on_the_hub(source: str, hub: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("convert", source, tmp_path / "new" / "a.safetensors") == 2
    assert source.partition("@")[0] in one_line(capsys)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("tag", "quick_gelu"), [("openai", True), ("some_data_e32", False)])
def test_a_name_of_open_clip(
    tag: str, quick_gelu: bool, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from open_clip import factory, pretrained

    open_clip_files.open_clip_file(tmp_path / "weights" / "open_clip_model.safetensors", 3)
    tags = {
        "openai": pretrained._pcfg(hf_hub="owner/tiny.openai/", quick_gelu=True),
        "some_data_e32": pretrained._pcfg(hf_hub="owner/tiny.some_data/", mean=clip.MEAN, std=clip.STD),
    }
    for known in tags.values():
        hf_files.hub_cache(hub, known["hf_hub"].rstrip("/"), tmp_path / "weights")
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", clip.MODEL_CONFIG)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", tags)
    assert run("convert", f"open_clip:tiny/{tag}", tmp_path / "a.safetensors", "--quiet") == 0
    before, after = open_checkpoint(f"open_clip:tiny/{tag}"), open_checkpoint(tmp_path / "a.safetensors")
    assert_bits(after, dict(clip.tower(3).state_dict()))
    assert after.quick_gelu is quick_gelu
    assert before.preprocessing is not None and after.preprocessing == before.preprocessing
    capsys.readouterr()
    assert run("convert", "open_clip:tiny/none", tmp_path / "b.safetensors") == 2
    assert "one of its 2 tags, got 'none'; such as: openai" in one_line(capsys)


# damage


def test_one_flipped_bit_anywhere_in_the_numbers_is_noticed(converted: Path, tmp_path: Path) -> None:
    content = converted.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__")
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        damaged = bytearray(content)
        damaged[8 + size + (start + end) // 2] ^= 1
        converted.write_bytes(damaged)
        checkpoint = open_checkpoint(converted)
        with pytest.raises(UserError, match=r"a\.safetensors.*checksum") as raised:
            checkpoint[name]
        assert "\n" not in str(raised.value) and name in str(raised.value)
        other = "proj" if name != "proj" else "class_embedding"
        assert torch.equal(checkpoint[other], clip.tower(3).state_dict()[other])


def test_a_damaged_file_is_not_converted_on(converted: Path, tmp_path: Path, capsys: Any) -> None:
    content = bytearray(converted.read_bytes())
    content[-1] ^= 0x80
    converted.write_bytes(content)
    assert run("convert", converted, tmp_path / "new" / "b.safetensors") == 2
    assert "checksum" in one_line(capsys)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["missing", "extra", "text", "not JSON"])
def test_checksums_that_are_not_those_of_the_tensors(kind: str, converted: Path) -> None:
    with safe_open(converted, framework="pt") as file:
        metadata = file.metadata()
    checksums = json.loads(metadata["checksums"])
    if kind == "missing":
        del checksums["proj"]
    elif kind == "extra":
        checksums["other"] = 1
    elif kind == "text":
        checksums["proj"] = "1"
    metadata["checksums"] = "{" if kind == "not JSON" else json.dumps(checksums)
    save_file(load_file(converted), converted, metadata=metadata)
    with pytest.raises(UserError, match=r"a\.safetensors.*checksum") as raised:
        open_checkpoint(converted)
    assert "\n" not in str(raised.value)


# where it is written


def test_an_existing_file_is_replaced_only_when_asked(source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"precious")
    assert run("convert", source, out) == 2
    assert "existing file" in one_line(capsys)
    assert out.read_bytes() == b"precious"
    assert run("convert", source, out, "--overwrite", "--quiet") == 0
    assert_bits(open_checkpoint(out), dict(clip.tower(3).state_dict()))
    # a mistake does not cost the old file
    kept = out.read_bytes()
    assert run("convert", tmp_path / "none.pt", out, "--overwrite") == 2
    assert out.read_bytes() == kept
    assert names_in(tmp_path) == ["a.safetensors", "in", "in/clip.pt"]


def test_a_file_is_not_converted_onto_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = open_clip_files.open_clip_file(tmp_path / "clip.safetensors", 3)
    (tmp_path / "link.safetensors").symlink_to(path)
    os.link(path, tmp_path / "hard.safetensors")
    kept = path.read_bytes()
    for source, out in [
        (path, path),
        (path, "link.safetensors"),
        ("link.safetensors", path),
        (path, "hard.safetensors"),
    ]:
        assert run("convert", tmp_path / source, tmp_path / out, "--overwrite") == 2
        assert "another file than the one that is read" in one_line(capsys)
        assert path.read_bytes() == kept


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("hf clip", "model.safetensors"),
        ("hf projected, shards", "model-00001-of-00009.safetensors"),
        ("open_clip folder", "open_clip_model.safetensors"),
    ],
)
def test_a_folder_is_not_converted_onto_its_own_weights(
    name: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = FORMATS[name](tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert weights in files
    assert run("convert", folder, folder / weights, "--overwrite", "--quiet") == 2
    assert weights in one_line(capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("a.pt", r"ends in .safetensors"),
        ("a", r"ends in .safetensors"),
        ("folder.safetensors", r"folder"),
        ("in/clip.pt/a.safetensors", r"clip.pt"),
    ],
)
def test_places_that_are_none(out: str, message: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    before = names_in(tmp_path)
    for options in ([], ["--overwrite"]):
        assert run("convert", source, tmp_path / out, *options) == 2
        assert message in one_line(capsys)
        assert names_in(tmp_path) == before


def test_an_interrupt_leaves_the_old_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pareto_merging.checkpoints import safetensors

    def stop(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "save_file", stop)
    out = tmp_path / "a.safetensors"
    assert run("convert", source, out, "--quiet") == 130
    assert names_in(tmp_path) == ["in", "in/clip.pt"]
    out.write_bytes(b"precious")
    assert run("convert", source, out, "--overwrite", "--quiet") == 130
    assert out.read_bytes() == b"precious"
    assert names_in(tmp_path) == ["a.safetensors", "in", "in/clip.pt"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files fails in the middle of writing, as a full disk does: one line, exit code 2."""
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"precious")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = run("convert", source, out, "--overwrite", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code == 2
    one_line(capsys)
    assert out.read_bytes() == b"precious"
    assert names_in(tmp_path) == ["a.safetensors", "in", "in/clip.pt"]


# what cannot be converted


def spoilt(kind: str, folder: Path) -> str:
    """A file or folder that is no checkpoint, by the name it has in messages."""
    folder.mkdir()
    state = clip.clip(3).state_dict()
    if kind == "truncated":
        content = open_clip_files.open_clip_file(folder / "a.pt").read_bytes()
        (folder / "a.pt").write_bytes(content[: len(content) // 2])
    elif kind == "truncated safetensors":
        content = open_clip_files.open_clip_file(folder / "a.safetensors").read_bytes()
        (folder / "a.safetensors").write_bytes(content[:-5])
        return "a.safetensors"
    elif kind == "empty":
        (folder / "a.pt").write_bytes(b"")
    elif kind in ("NaN", "inf"):
        state["visual.transformer.resblocks.1.mlp.c_fc.weight"][2, 3] = float(kind)
        torch.save(state, folder / "a.pt")
    elif kind == "ResNet":
        torch.save({"visual.conv1.weight": torch.ones(8, 3, 3, 3), "visual.bn1.weight": torch.ones(8)}, folder / "a.pt")
    elif kind == "BERT":
        torch.save({"bert.embeddings.word_embeddings.weight": torch.ones(8, 4)}, folder / "a.pt")
    elif kind == "BERT folder":
        save_file({"embeddings.word_embeddings.weight": torch.ones(8, 4)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 4}))
        return ""
    elif kind == "empty folder":
        return ""
    elif kind == "folder without weights":
        (hf_files.huggingface_folder(folder) / "model.safetensors").unlink()
        return ""
    elif kind == "a missing shard":
        shards = sorted(hf_files.huggingface_folder(folder, kind="clip", shards=True).glob("model-*.safetensors"))
        shards[1].unlink()
        return ""
    elif kind == "a missing tensor":
        del state["visual.ln_post.bias"]
        torch.save(state, folder / "a.pt")
    elif kind == "integers":
        torch.save({name: tensor.to(torch.int8) for name, tensor in state.items()}, folder / "a.pt")
    elif kind == "code":
        torch.save({**state, "x": os.system}, folder / "a.pt")
    elif kind == "head with a bias":
        with pickled_modules.task_vectors_code():
            torch.save(pickled_modules.ClassificationHead(True, torch.eye(3), torch.ones(3)), folder / "a.pt")
    elif kind == "numbers":
        torch.save([1, 2, 3], folder / "a.pt")
    elif kind == "missing":
        pass
    return "a.pt"


@pytest.mark.parametrize(
    "kind",
    [
        *("truncated", "truncated safetensors", "empty", "NaN", "inf", "ResNet", "BERT", "BERT folder", "empty folder"),
        *("folder without weights", "a missing shard", "a missing tensor", "integers", "code", "head with a bias"),
        *("numbers", "missing"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the file, exit code 2, and no new file or folder."""
    name = spoilt(kind, tmp_path / "in")
    before = names_in(tmp_path)
    path = tmp_path / "in" / name
    capsys.readouterr()
    assert run("convert", path, tmp_path / "new" / "b.safetensors") == 2
    message = one_line(capsys)
    assert str(path) in message
    # its name once and not twice, but for a file inside the folder
    assert message.count(f"{path}:") == 1 or not name, message
    assert names_in(tmp_path) == before
