"""Exported folders: transformers and open_clip load them by themselves and compute the same; nothing half-written."""

import json
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.exports import EXPORTS, PREPROCESSING, encoder, parts, small_clip
from torch import Tensor

from pareto_merging.checkpoints import export, safetensors
from pareto_merging.checkpoints.architecture import from_description
from pareto_merging.checkpoints.export import export_hugging_face, export_open_clip
from pareto_merging.checkpoints.hugging_face import (
    check_hugging_face_config,
    from_hugging_face_text_config,
    preprocessing_from_hugging_face,
)
from pareto_merging.checkpoints.names import text_pieces, vision_pieces
from pareto_merging.checkpoints.open_clip import preprocessing_from_open_clip
from pareto_merging.errors import UserError
from pareto_merging.system import files

open_clip = pytest.importorskip("open_clip")

IMAGES = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[97, 3, 98, 0, 0, 0, 0], [97, 7, 9, 11, 13, 98, 0]])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Lazy(Mapping[str, Tensor]):
    """Tensors that are made when they are read, and counted."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, dict.fromkeys(tensors, 0)

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def write(export_to: Callable[..., Path], folder: Path, *, with_text: bool = True, **options: Any) -> Path:
    vision, text = parts(small_clip())
    settings = {
        "encoder": encoder(),
        "preprocessing": PREPROCESSING,
        "text": text if with_text else {},
        "text_heads": 3,
    }
    return export_to(vision, folder, **{**settings, **options})


def hugging_face(kind: str, folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-5, rtol=1e-5)


def names_left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_loads_a_whole_clip(quick_gelu: bool, tmp_path: Path) -> None:
    clip = small_clip(quick_gelu)
    folder = write(export_hugging_face, tmp_path / "new" / "clip", encoder=encoder(quick_gelu))
    assert names_left(folder) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    model = hugging_face("CLIPModel", folder)
    with torch.no_grad():
        images, texts = clip.encode_image(IMAGES), clip.encode_text(TOKENS)
        close(model.get_image_features(IMAGES).pooler_output, images)
        close(model.get_text_features(TOKENS).pooler_output, texts)
        close(model(input_ids=TOKENS, pixel_values=IMAGES).logits_per_image, clip.get_logits(IMAGES, TOKENS)[0])
        # the other activation would have been seen
        other = small_clip(not quick_gelu)
        assert (other.encode_image(IMAGES) - images).abs().max() > 1e-2
        assert (other.encode_text(TOKENS) - texts).abs().max() > 1e-2


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_loads_a_vision_tower(quick_gelu: bool, tmp_path: Path) -> None:
    clip = small_clip(quick_gelu)
    folder = write(export_hugging_face, tmp_path / "tower", with_text=False, encoder=encoder(quick_gelu))
    model = hugging_face("CLIPVisionModelWithProjection", folder)
    with torch.no_grad():
        close(model(IMAGES).image_embeds, clip.encode_image(IMAGES))
        assert (small_clip(not quick_gelu).encode_image(IMAGES) - model(IMAGES).image_embeds).abs().max() > 1e-2


def test_transformers_chooses_the_class_and_the_processor_itself(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    folder = write(export_hugging_face, tmp_path / "clip")
    assert type(transformers.AutoModel.from_pretrained(folder)).__name__ == "CLIPModel"
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert type(processor).__name__.startswith("CLIPImageProcessor")
    colours = torch.randint(256, (20, 30, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    image = Image.fromarray(colours.numpy())
    found = processor(images=image, return_tensors="pt")["pixel_values"][0]
    expected = open_clip.image_transform(12, False, PREPROCESSING["mean"], PREPROCESSING["std"])(image)
    assert found.shape == expected.shape == (3, 12, 12)
    # two libraries' bicubic: half of one of 255 steps
    assert (found - expected).abs().mean() < 1 / 255 / 0.4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_text", [False, True])
def test_hugging_face_keeps_dtype_and_bits(dtype: torch.dtype, with_text: bool, tmp_path: Path) -> None:
    vision, text = parts(small_clip(), dtype)
    folder = export_hugging_face(
        vision,
        tmp_path / "clip",
        encoder=encoder(),
        preprocessing=PREPROCESSING,
        text=text if with_text else {},
        text_heads=3,
    )
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    for pieces, ours in ((vision_pieces(stored), vision), (text_pieces(stored), text if with_text else {})):
        assert pieces.keys() == ours.keys()
        for name, piece in pieces.items():
            back = torch.cat([stored[s] for s in piece.sources]) if piece.sources[1:] else stored[piece.sources[0]]
            assert torch.equal(back.t() if piece.transpose else back, ours[name]), name
    model = hugging_face("CLIPModel" if with_text else "CLIPVisionModelWithProjection", folder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_float16_features_are_those_of_open_clip(tmp_path: Path) -> None:
    clip = small_clip().half()
    vision, _ = parts(clip, torch.float16)
    folder = export_hugging_face(vision, tmp_path / "clip", encoder=encoder(), preprocessing=PREPROCESSING)
    model = hugging_face("CLIPVisionModelWithProjection", folder, dtype=torch.float32)
    with torch.no_grad():
        close(model(IMAGES).image_embeds, clip.float().encode_image(IMAGES))


def test_a_float32_scalar_does_not_make_a_float16_model_wide(tmp_path: Path) -> None:
    vision, text = parts(small_clip(), torch.float16)
    text["logit_scale"] = torch.tensor([4.6])  # a dimension, as some of open_clip's models have
    folder = export_hugging_face(
        vision, tmp_path / "clip", encoder=encoder(), preprocessing=PREPROCESSING, text=text, text_heads=3
    )
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert hugging_face("CLIPModel", folder).logit_scale.shape == ()
    assert load_file(folder / "model.safetensors")["logit_scale"].dtype == torch.float32


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_open_clip_loads_a_whole_clip(quick_gelu: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    clip = small_clip(quick_gelu)
    vision, text = parts(clip, dtype)
    folder = export_open_clip(
        vision,
        tmp_path / "clip",
        encoder=encoder(quick_gelu),
        preprocessing=PREPROCESSING,
        text=text,
        text_heads=3,
    )
    assert names_left(folder) == ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]
    stored = load_file(folder / "open_clip_model.safetensors")
    assert stored.keys() == clip.state_dict().keys()
    assert all(torch.equal(stored[f"visual.{name}"], tensor) for name, tensor in vision.items())
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model, clip = model.eval(), clip.to(dtype).float()
    with torch.no_grad():
        assert torch.equal(model.encode_image(IMAGES), clip.encode_image(IMAGES))
        assert torch.equal(model.encode_text(TOKENS), clip.encode_text(TOKENS))
    assert list(preprocess.transforms[-1].mean) == PREPROCESSING["mean"]
    assert list(preprocess.transforms[-1].std) == PREPROCESSING["std"]


def test_open_clip_takes_the_file_under_the_name_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(export_open_clip, tmp_path / "clip")
    model_cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-small", {**model_cfg, "quick_gelu": False})
    weights = str(folder / "open_clip_model.safetensors")
    model = open_clip.create_model("ViT-small", pretrained=weights, force_quick_gelu=True).eval()
    with torch.no_grad():
        assert torch.equal(model.encode_image(IMAGES), small_clip().encode_image(IMAGES))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip_takes_a_vision_tower_alone(quick_gelu: bool, tmp_path: Path) -> None:
    folder = write(export_open_clip, tmp_path / "tower", with_text=False, encoder=encoder(quick_gelu))
    assert names_left(folder) == ["README.md", "open_clip_config.json", "visual.safetensors"]
    name, path = f"local-dir:{folder}", str(folder / "visual.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms(name, load_weights=False, pretrained_image_path=path)
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(IMAGES), small_clip(quick_gelu).encode_image(IMAGES))
    assert list(preprocess.transforms[-1].std) == PREPROCESSING["std"]
    # never a random text tower without anybody having asked for it
    with pytest.raises((RuntimeError, AssertionError), match=r"Missing key|pos_embed width"):
        open_clip.create_model_and_transforms(name)


def test_a_tower_takes_the_place_of_a_whole_clips(tmp_path: Path) -> None:
    whole = write(export_open_clip, tmp_path / "whole")
    other = parts(small_clip())[0]
    other["proj"] = other["proj"] * 2
    tower = export_open_clip(other, tmp_path / "tower", encoder=encoder(), preprocessing=PREPROCESSING)
    model = open_clip.create_model(f"local-dir:{whole}", pretrained_image_path=str(tower / "visual.safetensors")).eval()
    with torch.no_grad():
        close(model.encode_image(IMAGES), small_clip().encode_image(IMAGES) * 2)
        close(model.encode_text(TOKENS), small_clip().encode_text(TOKENS))


def test_an_encoder_without_a_projection(tmp_path: Path) -> None:
    tower = small_clip().visual
    tower.proj = None
    description = encoder()
    description["arguments"]["output_dim"] = None
    vision = dict(tower.state_dict())
    options: dict[str, Any] = {"encoder": description, "preprocessing": PREPROCESSING}
    folder = export_hugging_face(vision, tmp_path / "hf", **options)
    with torch.no_grad():
        expected = tower(IMAGES)
        close(hugging_face("CLIPVisionModel", folder)(IMAGES).pooler_output, expected)
        folder = export_open_clip(vision, tmp_path / "oc", **options)
        path = str(folder / "visual.safetensors")
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_image_path=path)
        assert torch.equal(model.eval().encode_image(IMAGES), expected)
    for export_to in EXPORTS:
        with pytest.raises(UserError):
            export_to(vision, tmp_path / "text", **options, text=parts(small_clip())[1], text_heads=3)
    assert names_left(tmp_path) == ["hf", "oc"]


def test_configurations_are_read_back_as_they_were_meant(tmp_path: Path) -> None:
    folder = write(export_hugging_face, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    check_hugging_face_config(config, from_description(encoder()), "config.json")
    assert from_hugging_face_text_config(config) == (3, True)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessing_from_hugging_face(preprocessor) == PREPROCESSING
    folder = write(export_open_clip, tmp_path / "oc")
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert preprocessing_from_open_clip(config["preprocess_cfg"], 12) == PREPROCESSING


@pytest.mark.parametrize("export_to", EXPORTS)
def test_lazy_tensors_are_read_once_and_the_bytes_are_the_same(export_to: Callable[..., Path], tmp_path: Path) -> None:
    vision, text = parts(small_clip())
    vision_lazy, text_lazy = Lazy(vision), Lazy(text)
    options: dict[str, Any] = {"encoder": encoder(), "preprocessing": PREPROCESSING, "text_heads": 3}
    first = export_to(vision_lazy, tmp_path / "a", text=text_lazy, **options)
    second = export_to(dict(reversed(vision.items())), tmp_path / "b", text=dict(reversed(text.items())), **options)
    assert set(vision_lazy.reads.values()) == set(text_lazy.reads.values()) == {1}
    for name in names_left(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_tied_and_strided_tensors_are_written(tmp_path: Path) -> None:
    vision, _ = parts(small_clip())
    vision["ln_post.weight"] = vision["ln_pre.weight"]
    vision["proj"] = vision["proj"].t().contiguous().t()
    vision["class_embedding"] = torch.tensor(0.5).expand(32)
    for export_to in EXPORTS:
        export_to(vision, tmp_path / export_to.__name__, encoder=encoder(), preprocessing=PREPROCESSING)
    stored = load_file(tmp_path / "export_open_clip" / "visual.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in vision.items())


def test_tensors_that_are_not_the_encoders_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    vision, text = parts(small_clip())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tensors": {k: t for k, t in vision.items() if k != "conv1.weight"}}, "got none named conv1.weight"),
        ({"tensors": {**vision, "head.weight": torch.zeros(2)}}, "got also head.weight"),
        ({"tensors": {**vision, "proj": torch.zeros(32, 9)}}, r"proj: expected shape \[32, 8\], got \[32, 9\]"),
        ({"tensors": {**vision, "proj": torch.zeros(32, 8).long()}}, "proj: expected floating point"),
        ({"encoder": {"architecture": "RN50"}}, "encoder RN50"),
        ({"preprocessing": {"size": 12}}, "preprocessing: mean"),
        ({"text": {**text, "text_projection": torch.zeros(24, 9)}}, "expected a projection to 8 features"),
        ({"text": {**text, "logit_bias": torch.zeros(())}}, "got also logit_bias"),
        ({"text_heads": None}, "heads: expected the number"),
        ({"extra_files": {"../x": b""}}, "extra_files: expected plain names"),
        ({"extra_files": {"README.md": b""}}, "extra_files: expected plain names"),
        ({"extra_files": {"other.safetensors": b""}}, "extra_files: expected no weights"),
    ]
    for export_to in EXPORTS:
        for change, message in cases:
            settings = {"encoder": encoder(), "preprocessing": PREPROCESSING, "text": text, "text_heads": 3, **change}
            with pytest.raises(UserError, match=message):
                export_to(settings.pop("tensors", vision), tmp_path / "x", **settings)
            assert names_left(tmp_path) == []


@pytest.mark.parametrize("export_to", EXPORTS)
def test_extra_files_and_the_card_are_written(export_to: Callable[..., Path], tmp_path: Path) -> None:
    folder = write(export_to, tmp_path / "x", card="# Mine\n", extra_files={"vocab.json": b"\x00{}", "merges.txt": b""})
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert (folder / "vocab.json").read_bytes() == b"\x00{}"
    mode = 0o666 & ~_umask()
    assert all(stat.S_IMODE(path.stat().st_mode) == mode for path in folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_transformers_is_not_imported() -> None:
    code = "import sys, pareto_merging.checkpoints.export; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("export_to", EXPORTS)
def test_an_existing_folder_is_refused_and_replaced_only_when_asked(
    export_to: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write(export_to, tmp_path / "x", card="old", extra_files={"left.txt": b"1"})
    before = content(folder)
    with pytest.raises(UserError, match="expected a new folder, got an existing one"):
        write(export_to, folder, card="new")
    assert content(folder) == before
    write(export_to, folder, card="new", overwrite=True)
    assert content(folder).keys() == before.keys() - {"left.txt"}
    assert content(folder)["README.md"] == b"new"
    assert names_left(tmp_path) == ["x"]


def test_only_a_model_folder_is_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    nested = write(export_hugging_face, tmp_path / "nested")
    (nested / "checkpoints").mkdir()
    settings = tmp_path / "settings"
    settings.mkdir()
    (settings / "config.json").write_text("{}")
    for target in (home, nested, settings):
        with pytest.raises(UserError, match="expected a model folder to replace"):
            write(export_hugging_face, target, overwrite=True)
    with pytest.raises(UserError, match="expected a folder to write, got a file"):
        write(export_hugging_face, file, overwrite=True)
    assert (home / "thesis.txt").read_text() == file.read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (write(export_hugging_face, empty, overwrite=True) / "config.json").exists()


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    real = write(export_hugging_face, tmp_path / "disk" / "real", card="old")
    link = tmp_path / "link"
    link.symlink_to(real)
    write(export_hugging_face, link, card="new", overwrite=True)
    assert link.is_symlink() and (real / "README.md").read_text() == "new"


def _failing_after(count: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    calls = iter(range(count))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("export_to", EXPORTS)
def test_an_error_at_any_write_leaves_the_old_folder_or_none(
    export_to: Callable[..., Path],
    overwrite: bool,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, before = tmp_path / "x", {}
    if overwrite:
        before = content(write(export_to, folder, card="old"))
    points = [
        (export, "write_tensors", 1),
        (export, "write_bytes", 3 if export_to is export_hugging_face else 2),
        (files, "sync", 4),
    ]
    for module, name, count in points:
        for after in range(count):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, _failing_after(after, getattr(module, name), error))
                with pytest.raises(type(error)):
                    write(export_to, folder, card="new", overwrite=overwrite)
            assert names_left(tmp_path) == (["x"] if overwrite else []), (name, after)
            assert not overwrite or content(folder) == before, (name, after)
    for after in range(2 if overwrite else 1):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", _failing_once(after, Path.rename, error))
            with pytest.raises(type(error)):
                write(export_to, folder, card="new", overwrite=overwrite)
        assert names_left(tmp_path) == (["x"] if overwrite else []), after
        assert not overwrite or content(folder) == before, after


def _failing_once(at: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    calls = iter(range(10))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return real(*args, **kwargs)

    return call


def test_a_full_disk_inside_safetensors_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(export_hugging_face, tmp_path / "x")
    assert names_left(tmp_path) == []


KILLED = """
import os, sys, torch
from pathlib import Path
from pareto_merging.checkpoints import export
from pareto_merging.system import files

name, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
owner = {"rename": Path, "sync": files}.get(name, export)
real, calls = getattr(owner, name), []

def killed(*args, **kwargs):
    calls.append(1)
    if len(calls) > count:
        os._exit(9)
    return real(*args, **kwargs)

setattr(owner, name, killed)
from safetensors.torch import load_file
export.export_open_clip(
    load_file(folder.parent.parent / "vision.safetensors"), folder, encoder={encoder!r},
    preprocessing={preprocessing!r}, card="new", overwrite=True,
)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [("write_tensors", 0), ("write_bytes", 0), ("write_bytes", 1), ("sync", 3), ("rename", 0), ("rename", 1)],
)
def test_a_kill_leaves_the_old_folder_or_none(name: str, count: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(parts(small_clip())[0], tmp_path / "vision.safetensors")
    folder = write(export_open_clip, tmp_path / "models" / "x", with_text=False, card="old")
    before = content(folder)
    code = textwrap.dedent(KILLED).replace("{encoder!r}", repr(encoder()))
    code = code.replace("{preprocessing!r}", repr(PREPROCESSING))
    arguments = [sys.executable, "-c", code, name, str(count), str(folder)]
    result = subprocess.run(arguments, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 9
    if (name, count) == ("rename", 1):
        assert not folder.exists()
    else:
        assert content(folder) == before
    left = [path for path in folder.parent.iterdir() if path != folder]
    assert left
    assert all(path.name.startswith(".x.") and path.name.endswith(".tmp") for path in left)
    if name in ("write_tensors", "write_bytes"):
        assert not any((path / "open_clip_config.json").exists() for path in left)


def test_metadata_is_what_transformers_asks_for(tmp_path: Path) -> None:
    folder = write(export_hugging_face, tmp_path / "x")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.pop("checksums")
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("export_to", EXPORTS)
def test_the_configuration_is_written_last(
    export_to: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("write_tensors", "write_bytes"):
        real = getattr(export, name)
        monkeypatch.setattr(export, name, lambda path, *args, real=real: (order.append(path.name), real(path, *args)))
    write(export_to, tmp_path / "x", extra_files={"vocab.json": b"{}"})
    assert order[0].endswith(".safetensors")
    assert order[-1] in ("config.json", "open_clip_config.json")
    assert "vocab.json" in order
