"""Checkpoints in the formats that others write: the same tensors, features and settings, read one by one."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize
from support import clip, hf_files, open_clip_files, pickled_modules
from support.checkpoint_cases import FORMATS, TOWERS, WHOLE, Writer, assert_same, built, expected_tower, features

import pareto_merging as pm
from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.checkpoints.convert import convert_checkpoint
from pareto_merging.checkpoints.export import export_hugging_face, export_open_clip
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_network")


# those whose file says everything that the model does
DESCRIBED = [name for name in FORMATS if name.startswith(("hf", "open_clip folder", "task vectors"))]
NORMALISED = [name for name in DESCRIBED if name != "open_clip folder, no preprocessing"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_tensors(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path, 3, True)
    checkpoint = open_checkpoint(path)
    expected = expected_tower(name, seed=3)
    assert_same(checkpoint, expected)
    assert len(checkpoint) == len(expected)
    assert checkpoint.shapes == {key: list(tensor.shape) for key, tensor in expected.items()}
    assert checkpoint.dtypes == {key: tensor.dtype for key, tensor in expected.items()}
    assert isinstance(checkpoint.format, str) and checkpoint.format
    assert checkpoint.source == str(path)


@pytest.mark.parametrize("name", WHOLE)
def test_the_rest_of_a_whole_clip_is_its_text_side(name: str, tmp_path: Path) -> None:
    assert_same(open_checkpoint(WHOLE[name](tmp_path, 3, True)).text, clip.text_state(3))


@pytest.mark.parametrize("name", [name for name in TOWERS if not name.startswith("task vectors")])
def test_a_tower_alone_has_no_text_side(name: str, tmp_path: Path) -> None:
    assert list(open_checkpoint(TOWERS[name](tmp_path, 0, True)).text) == []


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    path = open_clip_files.open_clip_file(tmp_path / "a.pt")
    assert_same(open_checkpoint(str(path)), expected_tower(""))


def test_separate_and_joined_projections_are_the_same_tensors(tmp_path: Path) -> None:
    apart = open_checkpoint(hf_files.huggingface_folder(tmp_path / "hf", 5, kind="clip"))
    joined = open_checkpoint(open_clip_files.open_clip_file(tmp_path / "clip.pt", 5))
    assert apart.shapes == joined.shapes
    assert_same(apart, dict(joined))
    assert_same(apart.text, dict(joined.text))
    first, second = joined["transformer.resblocks.0.attn.in_proj_weight"].chunk(3)[:2]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "write",
    [
        lambda path, dtype: hf_files.huggingface_folder(path / "model", dtype=dtype, kind="clip"),
        lambda path, dtype: hf_files.huggingface_folder(path / "model", dtype=dtype, kind="clip", weights="bin"),
        lambda path, dtype: open_clip_files.open_clip_file(path / "clip.pt", dtype=dtype),
        lambda path, dtype: open_clip_files.open_clip_file(path / "clip.pt", dtype=dtype, legacy=True),
        lambda path, dtype: open_clip_files.open_clip_file(path / "clip.safetensors", dtype=dtype),
        lambda path, dtype: pickled_modules.task_vectors_encoder(path / "finetuned.pt", dtype=dtype),
    ],
    ids=["hf", "hf bin", "pt", "legacy", "safetensors", "task vectors"],
)
def test_half_precision_stays(write: Callable[[Path, torch.dtype], Path], dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, dtype))
    assert_same(checkpoint, {key: tensor.to(dtype) for key, tensor in expected_tower("").items()})
    assert set(checkpoint.dtypes.values()) == {dtype}


def test_openais_archive(tmp_path: Path) -> None:
    from open_clip.model import convert_weights_to_lp

    archive = open_checkpoint(open_clip_files.torchscript_archive(tmp_path / "ViT-B-32.pt", 4))
    model = clip.clip(4)
    convert_weights_to_lp(model, torch.float16)
    assert model.visual.conv1.weight.dtype == torch.float16 != model.visual.ln_pre.weight.dtype
    assert_same(archive, dict(model.visual.state_dict()))
    # input_resolution, context_length and vocab_size are no weights
    assert_same(archive.text, {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")})
    # every model that was published so has it
    assert archive.quick_gelu is not False


def test_a_name_that_is_not_there_is_a_key_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(open_clip_files.open_clip_file(tmp_path / "a.pt"))
    assert "ln_pre.weight" in checkpoint and "visual.ln_pre.weight" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["visual.ln_pre.weight"]


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("name", DESCRIBED)
def test_the_encoder_computes_the_same_features(name: str, quick_gelu: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FORMATS[name](tmp_path, 6, quick_gelu))
    assert checkpoint.quick_gelu is quick_gelu
    missing = {"proj": clip.tower(6).proj} if name.startswith("hf vision") else {}
    found = features(built(checkpoint, **missing))
    if name.startswith("hf"):
        with torch.no_grad():
            expected = hf_files.huggingface_model(6, quick_gelu)(clip.images()).image_embeds
    else:
        with torch.no_grad():
            expected = clip.clip(6, quick_gelu).encode_image(clip.images())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # the other activation is further away than that
    assert (found - features(clip.tower(6, not quick_gelu))).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in DESCRIBED])
def test_a_state_dict_does_not_tell_its_activation(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FORMATS[name](tmp_path, 0, True))
    assert checkpoint.quick_gelu is None
    assert checkpoint.preprocessing is None


@pytest.mark.parametrize("name", NORMALISED)
def test_the_normalisation_is_the_checkpoints(name: str, tmp_path: Path) -> None:
    preprocessing = open_checkpoint(FORMATS[name](tmp_path, 0, True)).preprocessing
    assert preprocessing == {"size": clip.IMAGE, "mean": list(clip.MEAN), "std": list(clip.STD)}


def bytes_read() -> int:
    """By this process through read calls, since it started."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc/self/io")
@pytest.mark.parametrize(
    "name", ["open_clip pt", "open_clip training", "open_clip training, legacy", "task vectors", "task vectors, legacy"]
)
def test_only_what_is_asked_for_is_read(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path, 0, True)
    open_checkpoint(path)["ln_pre.weight"]
    before = bytes_read()
    checkpoint = open_checkpoint(path)
    assert checkpoint.shapes["ln_pre.weight"] == [clip.WIDTH]
    opened = bytes_read()
    checkpoint["ln_pre.weight"]
    first = bytes_read()
    size = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.values())
    everything = bytes_read()
    assert opened - before < size / 5
    assert first - opened < size / 20
    # nothing twice, and nothing of the optimizer's or the text side's
    assert everything - first < 1.2 * size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
def test_a_large_file_is_not_loaded(tmp_path: Path) -> None:
    """A safetensors file with 512 MB of text embeddings, which take no space on the disk."""
    header: dict[str, Any] = {}
    end = 0
    state = {f"visual.{name}": tensor for name, tensor in clip.tower().state_dict().items()} | clip.text_state()
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    shapes["token_embedding.weight"] = [2**21, clip.TEXT_WIDTH]
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)

    def peak() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    checkpoint = open_checkpoint(path)
    assert sum(tensor.numel() for tensor in checkpoint.values()) == sum(p.numel() for p in clip.tower().parameters())
    assert checkpoint.text["ln_final.bias"].shape == (clip.TEXT_WIDTH,)
    assert peak() - before < 100_000  # kB


def test_a_number_that_is_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = clip.clip().state_dict()
    state["visual.ln_pre.bias"][3] = float("nan")
    save_file(state, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(checkpoint["ln_pre.weight"], state["visual.ln_pre.weight"])
    with pytest.raises(UserError, match=r"a\.safetensors.*NaN.*ln_pre\.bias"):
        checkpoint["ln_pre.bias"]


def test_a_text_tower_of_another_kind_is_left_out(tmp_path: Path) -> None:
    """The vision encoder does not care, but a CLIP written with that tower would be another one."""
    folder = open_clip_files.open_clip_folder(tmp_path / "odd", 3)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"pool_type": "eos", "eos_id": 1}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    found = open_checkpoint(folder)
    assert_same(found, expected_tower("", 3))
    assert not found.text
    assert "pool_type eos" in found.no_text and "eos_id 1" in found.no_text
    for text in (None, [], "x"):
        config["model_cfg"]["text_cfg"] = text
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        assert_same(open_checkpoint(folder), expected_tower("", 3))


def test_unknown_tensors_beside_the_tower_leave_out_the_text(tmp_path: Path) -> None:
    state = clip.clip(4).state_dict()
    torch.save({**state, "logit_bias": torch.zeros(())}, tmp_path / "siglip.pt")
    assert not open_checkpoint(tmp_path / "siglip.pt").text
    torch.save({**state, "attn_mask": torch.zeros(8, 8)}, tmp_path / "clip.pt")
    assert open_checkpoint(tmp_path / "clip.pt").text


END_TO_END: dict[str, Writer] = {
    **FORMATS,
    "torchscript": lambda folder, seed, _: open_clip_files.torchscript_archive(folder / "ViT-B-32.pt", seed),
}


@pytest.mark.parametrize("name", END_TO_END)
def test_from_checkpoints_to_exports_and_back(name: str, tmp_path: Path) -> None:
    """Each format is loaded, merged, exported to both libraries, and read again: the same bits."""
    sources = [END_TO_END[name](tmp_path / str(seed), seed, True) for seed in (0, 1, 2)]
    if name.startswith("hf vision"):
        # the projection is the pretrained model's
        sources[0] = hf_files.huggingface_folder(tmp_path / "whole", 0, kind="clip")
    pretrained, finetuned = pm.load_models(sources[0], {"a": sources[1], "b": sources[2]}, quick_gelu=True)
    model = randomize(pm.parametrize(pretrained, finetuned, rank=2, copy=False))
    merged = pm.merge(model, {"a": 0.7}).state_dict()
    assert not torch.equal(merged["conv1.weight"], open_checkpoint(sources[0])["conv1.weight"].float())
    whole = open_checkpoint(sources[0])
    encoder = {**(whole.encoder or {}), "quick_gelu": True}
    text = {key: tensor.float() for key, tensor in whole.text.items()}
    for export in (export_hugging_face, export_open_clip):
        folder = tmp_path / export.__name__
        export(merged, folder, encoder=encoder, preprocessing=encoders.default_preprocessing(encoder), text=text)
        again = open_checkpoint(folder)
        assert_same(again, merged)
        assert again.quick_gelu is True
        assert_same(again.text, text)
        convert_checkpoint(folder, tmp_path / f"{export.__name__}.safetensors", progress=False)
        assert_same(open_checkpoint(tmp_path / f"{export.__name__}.safetensors"), merged)
