"""Checkpoints in the formats that others write: the same tensors, features and settings, read one by one, from a path
or a name, and nothing of theirs run."""

from __future__ import annotations

import argparse
import collections
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomize
from safetensors.torch import load_file
from support import clip, hf_files, open_clip_files, pickled_modules
from torch import Tensor, nn

import pareto_merging as pm
from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.checkpoints.convert import convert_checkpoint
from pareto_merging.checkpoints.export import export_hugging_face, export_open_clip
from pareto_merging.checkpoints.heads import open_head
from pareto_merging.checkpoints.references import ForbiddenGlobal
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

RELEASE = Path(__file__).parents[2] / "data" / "task_vectors"
Writer = Callable[[Path, int, bool], Path]


def hugging_face(**options: Any) -> Writer:
    return lambda folder, seed, quick_gelu: hf_files.huggingface_folder(folder / "model", seed, quick_gelu, **options)


def open_clip_file(name: str, **options: Any) -> Writer:
    return lambda folder, seed, _: open_clip_files.open_clip_file(folder / name, seed, **options)


def task_vectors(**options: Any) -> Writer:
    return lambda folder, seed, quick_gelu: pickled_modules.task_vectors_encoder(
        folder / "finetuned.pt", seed, quick_gelu, **options
    )


# the vision tower alone; without its projection where the name says "vision"
TOWERS: dict[str, Writer] = {
    "hf vision": hugging_face(),
    "hf vision, transformers 4": hugging_face(transformers4=True),
    "hf vision, position_ids": hugging_face(position_ids=True),
    "hf vision, transformers 4, position_ids": hugging_face(transformers4=True, position_ids=True),
    "hf vision, bin": hugging_face(weights="bin"),
    "hf vision, transformers 4, bin": hugging_face(transformers4=True, weights="bin"),
    "hf projected": hugging_face(kind="vision_with_projection"),
    "hf projected, transformers 4": hugging_face(kind="vision_with_projection", transformers4=True),
    "hf projected, shards": hugging_face(kind="vision_with_projection", shards=True),
    "open_clip visual pt": open_clip_file("visual.pt", part="visual"),
    "open_clip visual pt, legacy": open_clip_file("visual.pth", part="visual", legacy=True),
    "open_clip visual safetensors": open_clip_file("visual.safetensors", part="visual"),
    "task vectors": task_vectors(),
    "task vectors, legacy": task_vectors(legacy=True),
}
WHOLE: dict[str, Writer] = {
    "hf clip": hugging_face(kind="clip"),
    "hf clip, transformers 4, position_ids": hugging_face(kind="clip", transformers4=True, position_ids=True),
    "hf clip, shards": hugging_face(kind="clip", shards=True),
    "hf clip, processor": hugging_face(kind="clip", processor=True),
    "hf clip, bin": hugging_face(kind="clip", weights="bin"),
    "hf clip, bin, shards": hugging_face(kind="clip", weights="bin", shards=True),
    "open_clip pt": open_clip_file("clip.pt"),
    "open_clip pt, legacy": open_clip_file("clip.pt", legacy=True),
    "open_clip bin": open_clip_file("open_clip_pytorch_model.bin"),
    "open_clip training": open_clip_file("epoch_32.pt", training=True),
    "open_clip training, legacy": open_clip_file("epoch_32.pt", training=True, legacy=True),
    "open_clip safetensors": open_clip_file("clip.safetensors"),
    "open_clip folder": lambda folder, seed, quick_gelu: open_clip_files.open_clip_folder(
        folder / "model", seed, quick_gelu
    ),
    "open_clip folder, no preprocessing": lambda folder, seed, quick_gelu: open_clip_files.open_clip_folder(
        folder / "model", seed, quick_gelu, preprocess=False
    ),
    "task vectors, keep_lang": task_vectors(keep_lang=True),
    "task vectors, keep_lang, legacy": task_vectors(keep_lang=True, legacy=True),
}
FORMATS = TOWERS | WHOLE
# those whose file says everything that the model does
DESCRIBED = [name for name in FORMATS if name.startswith(("hf", "open_clip folder", "task vectors"))]
NORMALISED = [name for name in DESCRIBED if name != "open_clip folder, no preprocessing"]


def expected_tower(name: str, seed: int = 0) -> dict[str, Tensor]:
    state = dict(clip.tower(seed).state_dict())
    if name.startswith("hf vision"):
        del state["proj"]
    return state


def assert_same(found: Any, expected: dict[str, Tensor]) -> None:
    """Names, types, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        read = found[name]
        assert read.dtype == tensor.dtype, name
        assert read.is_contiguous(), name
        assert torch.equal(read, tensor), name


def features(model: nn.Module, size: int = clip.IMAGE) -> Tensor:
    with torch.no_grad():
        return model(clip.images(size=size))


def built(checkpoint: Any, **missing: Tensor) -> nn.Module:
    """The encoder that a checkpoint describes, with its weights, and a projection where it has none."""
    # a description is stored as JSON beside what is learned
    description = json.loads(json.dumps(checkpoint.encoder))
    if "proj" in missing:
        assert description["arguments"]["output_dim"] is None
        description["arguments"]["output_dim"] = missing["proj"].shape[1]
    model = encoders.build(description)
    model.load_state_dict({**checkpoint, **missing})
    return model.float()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever tries to reach another machine fails, and so does the test, even if the attempt is forgiven."""
    attempts = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        attempts.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert attempts == []


# tensors


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


def test_a_name_that_is_not_there_is_a_key_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(open_clip_files.open_clip_file(tmp_path / "a.pt"))
    assert "ln_pre.weight" in checkpoint and "visual.ln_pre.weight" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["visual.ln_pre.weight"]


# the model


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


# one by one


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


# names of the hub


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


# names of open_clip


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


@pytest.mark.parametrize("source", ["open_clip:tiny/other", "open_clip:tini/openai", "open_clip:tiny", "open_clip:"])
def test_a_name_that_open_clip_does_not_know(source: str, tag: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"open_clip") as raised:
        open_checkpoint(source)
    assert "\n" not in str(raised.value)
    assert tag == []


# the release of task_vectors, as open_clip 2.0.2 wrote it


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


# heads


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("scale", [100.0, 41.5])
def test_a_head_of_task_vectors(scale: float, legacy: bool, transposed: bool, tmp_path: Path) -> None:
    path = pickled_modules.task_vectors_head(
        tmp_path / "head.pt", 3, logit_scale=scale, legacy=legacy, transposed=transposed
    )
    weight, logit_scale = open_head(path)
    assert weight.dtype == torch.float32 and weight.shape == (5, clip.EMBED)
    torch.testing.assert_close(weight, clip.head_rows(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(5), atol=1e-6, rtol=0)
    assert logit_scale == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("name", ["head_MNISTVal.pt", "head_DTDVal.pt"])
def test_the_heads_of_the_release(name: str) -> None:
    weight, logit_scale = open_head(str(RELEASE / name))
    torch.testing.assert_close(weight, load_file(RELEASE / "expected.safetensors")[name], atol=1e-6, rtol=0)
    assert logit_scale == pytest.approx(100.0, rel=1e-5)


def test_an_encoder_is_no_head_and_a_head_no_encoder() -> None:
    with pytest.raises(UserError, match=r"zeroshot\.pt") as raised:
        open_head(RELEASE / "zeroshot.pt")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"head_DTDVal\.pt") as raised:
        open_checkpoint(RELEASE / "head_DTDVal.pt")
    assert "\n" not in str(raised.value)


# what is none


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605\n"),
        ("page.safetensors", b"<!DOCTYPE html><html></html>"),
        ("empty.pt", b""),
        ("empty.safetensors", b""),
        ("zeros.bin", bytes(1000)),
        ("zip.pt", b"PK\x05\x06" + bytes(18)),
    ],
)
def test_a_file_that_is_no_checkpoint(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}") as raised:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["missing.pt", "missing.safetensors", "folder", "a/b/c"])
def test_what_is_not_there(source: str, tmp_path: Path, hub: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"{source}") as raised:
        open_checkpoint(source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["open_clip pt", "open_clip pt, legacy", "open_clip safetensors", "task vectors"])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_download_that_broke_off(name: str, kept: float, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path, 0, True)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=rf"{path.name}") as raised:
        dict(open_checkpoint(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_a_shard_is_missing(weights: str, tmp_path: Path) -> None:
    folder = hf_files.huggingface_folder(tmp_path / "model", kind="clip", weights=weights, shards=True)
    shards = sorted(folder.glob(f"*-of-*.{weights}"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"{shards[1].name}") as raised:
        dict(open_checkpoint(folder))
    assert "\n" not in str(raised.value)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = hf_files.huggingface_folder(tmp_path / "model", shards=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (folder / shard).rename(tmp_path / shard)
    index["weight_map"] = {k: f"../{v}" if v == shard else v for k, v in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json"):
        open_checkpoint(folder)


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


def test_a_number_that_is_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = clip.clip().state_dict()
    state["visual.ln_pre.bias"][3] = float("nan")
    save_file(state, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(checkpoint["ln_pre.weight"], state["visual.ln_pre.weight"])
    with pytest.raises(UserError, match=r"a\.safetensors.*NaN.*ln_pre\.bias"):
        checkpoint["ln_pre.bias"]


# what a second look found


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


def test_somebody_elses_configuration_beside_a_file(tmp_path: Path) -> None:
    path = open_clip_files.open_clip_file(tmp_path / "model.safetensors", 6)
    (tmp_path / "config.json").write_text('{"lr": 1e-5}')
    assert_same(open_checkpoint(path), expected_tower("", 6))


def test_a_tensor_with_attributes_of_its_own(tmp_path: Path) -> None:
    """torch saves it by way of _rebuild_from_type_v2; complex numbers beside it are nobody's weights."""
    state = dict(clip.tower(7).state_dict())
    state["proj"].note = "kept by Python"
    torch.save({"state_dict": state, "spectrum": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "x.pt")
    assert_same(open_checkpoint(tmp_path / "x.pt"), expected_tower("", 7))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "an HTML page"),
        (b"<HTML>404</HTML>", "an HTML page"),
        (b'{"error": "Repository not found"}', "a JSON file"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"\x1f\x8b\x08\x00", "a gzip archive"),
        (b"\x00" * 257 + b"ustar\x0000", "a tar archive"),
        (b"", "an empty file"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_what_is_no_checkpoint_is_called_by_its_name(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: expected a checkpoint, got {said}|{name}: .*{said}") as raised:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("low", [*b"{[<\n \x1f\x80P"])
def test_a_safetensors_header_of_any_length(low: int, tmp_path: Path) -> None:
    """Its length comes first, and may begin as other files do."""
    path = open_clip_files.open_clip_file(tmp_path / "clip.safetensors", 9)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    longer = size + (low - size) % 256
    path.write_bytes(longer.to_bytes(8, "little") + data[8 : 8 + size].ljust(longer) + data[8 + size :])
    assert path.read_bytes()[0] == low
    assert_same(open_checkpoint(path), expected_tower("", 9))


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


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(UserError, match=r"x\.pt: expected a checkpoint, got a link to .*gone\.pt, which is missing"):
        open_checkpoint(tmp_path / "x.pt")


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


def test_a_forbidden_name_is_said_as_it_is_known(tmp_path: Path) -> None:
    """torch.save's protocol 2 writes the name that Python 2 had: the error has both."""

    class Runs:
        def __reduce__(self) -> Any:
            return subprocess.Popen, (["touch", str(tmp_path / "ran")],)

    torch.save({"w": torch.zeros(1), "x": Runs()}, tmp_path / "x.pt")
    with pytest.raises(ForbiddenGlobal, match=r"names commands\.Popen \(subprocess\.Popen\), which could run code"):
        open_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
