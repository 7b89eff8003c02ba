"""``python -m benchmarks.checkpoints``: full-size models of every checkpoint format, from their files and back.

For each model and format a pretrained and K fine-tuned checkpoints with random weights are written by the libraries
that write the real ones, and deleted afterwards. A process of their own then does what ``pareto-merging train`` and
``export`` do with a configuration of them, and measures it:

* building the Pareto model: the rise of the process's peak resident memory, beside K + 1 models in the storage dtype,
  the learned parameters, and one tensor;
* one training step on the CPU;
* a merged model exported to safetensors, open_clip and Hugging Face, read again by this library (bit by bit) and by
  open_clip and transformers (features of images beside the merged module's).

What fails is a row with its error. The exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn

from benchmarks import results
from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.checkpoint import CheckpointTensors, open_checkpoint
from pareto_merging.checkpoints.convert import convert_checkpoint
from pareto_merging.checkpoints.safetensors import read_tensors, write_tensors
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.model.files import save_pareto_set
from pareto_merging.model.fold import merge
from pareto_merging.model.learned import learned_parameters
from pareto_merging.preferences import parse_preferences
from pareto_merging.run import export as exports
from pareto_merging.run.config import RunConfig, dump_config, read_config
from pareto_merging.run.folder import CONFIG_NAME, SET_NAME, open_run
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.environment import measured
from pareto_merging.system.files import write_json, write_text
from pareto_merging.system.progress import Advance, progress_bar
from pareto_merging.system.tables import print_table

MIB = 2**20
LIMIT_MIB = 24 * 1024
# objects and code, pieces of a megabyte, and what the C library keeps of freed memory
SLACK_MIB = 8
# of the largest feature: other libraries round in another order
TOLERANCE = 1e-4
PREFERENCE = "t1=0.7"
CLASSES, IMAGES, BATCH = 10, 4, 2
WARM_UP = {"suite": "digits", "tasks": ["upright", "mirrored"], "device": "cpu"}
# model -> K
MODELS = {"ViT-B-32": 8, "ViT-L-14": 2}
TINY, TINY_TASKS = "tiny", 2
TINY_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
}
RUN_FILE, ROW_FILE = "run.yaml", "row.json"


@dataclass
class Row:
    """One model in one format; memory in MiB, times in seconds, None where it did not come to that.

    ``files_bytes``: of all K + 1 checkpoints. ``build_peak_mib``: the rise while the Pareto model was built;
    ``build_models``: that, in models of the storage dtype. ``tensor_mib``: the largest tensor as its file has it; where
    that is another dtype, of W0 and of one copy, and what rounding changed. ``bound_mib``: K + 1 models and one such
    tensor; ``within``: whether the rise less ``learned_mib``, the learned parameters, is at most that and
    :data:`SLACK_MIB`.
    ``step_peak_mib``, ``export_peak_mib``, ``peak_mib``: of the whole process. ``bit_equal``: all three exports as this
    library reads them. ``features``: the largest of the merged module's; ``…_error``: the largest difference from them.
    """

    model: str
    format: str
    dtype: str
    tasks: int
    status: str = "failed"
    error: str | None = None
    text_tower: bool | None = None
    files_bytes: int | None = None
    write_seconds: float | None = None
    build_seconds: float | None = None
    build_peak_mib: float | None = None
    build_models: float | None = None
    tensor_mib: float | None = None
    bound_mib: float | None = None
    learned_mib: float | None = None
    within: bool | None = None
    step_seconds: float | None = None
    step_peak_mib: float | None = None
    export_seconds: float | None = None
    export_peak_mib: float | None = None
    peak_mib: float | None = None
    bit_equal: bool | None = None
    features: float | None = None
    open_clip_error: float | None = None
    transformers_error: float | None = None

    def problem(self, text_tower: bool) -> str | None:
        """What a finished row has not kept to, or None; ``text_tower``: whether its format has one."""
        if self.text_tower != text_tower:
            return f"expected {'a' if text_tower else 'no'} text tower, got {'one' if self.text_tower else 'none'}"
        if not self.within:
            return f"building took {self.build_peak_mib} MiB, bound {self.bound_mib} and {self.learned_mib} learned"
        if self.peak_mib is None or self.peak_mib >= LIMIT_MIB:
            return f"peak of {self.peak_mib} MiB, limit {LIMIT_MIB}"
        if not self.bit_equal:
            return "an export is read as other numbers"
        for name in ("open_clip", "transformers"):
            found = getattr(self, f"{name}_error")
            if not found <= TOLERANCE * (self.features or 0.0):
                return f"features of the export in {name} are off by {found}"
        return None


# --- checkpoints, by the code that writes the real ones


def randomize(module: nn.Module) -> nn.Module:
    """Every parameter random, biases and norms too, at a scale at which activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 0:
                # the logit scale
                continue
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + ("norm" in name or "ln_" in name) * name.endswith("weight"))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval()


def copies(parts: Sequence[Any], tasks: int) -> Iterator[str]:
    """``pretrained``, then ``t1`` … with small noise on the parameters of ``parts``, which are changed in place."""
    yield "pretrained"
    parameters = [parameter for part in parts for parameter in part.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    for k in range(1, tasks + 1):
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter, its in zip(parameters, before, strict=True):
                bound = 0.1 * float(its.norm(dtype=torch.float32)) / its.numel() ** 0.5
                noise = torch.empty(its.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(noise.add_(its))
        yield f"t{k}"


def hugging_face_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' CLIPConfig of an open_clip model, with QuickGELU as OpenAI's."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    shared = {"projection_dim": config["embed_dim"], "hidden_act": "quick_gelu"}
    return {
        "projection_dim": config["embed_dim"],
        "vision_config": {
            **shared,
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // 64,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **shared,
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
        },
    }


def write_hugging_face(
    config: Mapping[str, Any], folder: Path, tasks: int, *, shard: str = "50GB", bin: bool = False, vision: bool = False
) -> list[Path]:
    """Folders as transformers writes them: a whole CLIPModel each.

    ``shard``: the largest file. ``bin``: pytorch_model.bin, as version 4. ``vision``: the fine-tuned ones a
    CLIPVisionModel.
    """
    import transformers

    size = config["vision_cfg"]["image_size"]
    model: Any = randomize(transformers.CLIPModel(transformers.CLIPConfig(**hugging_face_config(config))))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    parts = [model.vision_model] if vision else [model.vision_model, model.visual_projection]
    paths = []
    for name in copies(parts, tasks):
        path = folder / name
        written = model
        if vision and name != "pretrained":
            with torch.device("meta"):
                written = transformers.CLIPVisionModel(model.config.vision_config)
            state = {key.removeprefix("vision_model."): value for key, value in model.vision_model.state_dict().items()}
            written.load_state_dict(state, assign=True, strict=False)
        if bin:
            # transformers 5 itself writes safetensors alone
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(path)
            torch.save(model.state_dict(), path / "pytorch_model.bin")
        else:
            written.save_pretrained(path, max_shard_size=shard)
        images.save_pretrained(path)
        paths.append(path)
    return paths


Save = Callable[[nn.Module, Path, Mapping[str, Any]], Path]


def write_open_clip(
    config: Mapping[str, Any], folder: Path, tasks: int, *, save: Save, quick_gelu: bool = False
) -> list[Path]:
    """open_clip's whole CLIP, K + 1 times, as ``save(model, path without a suffix, config)`` writes it."""
    import open_clip

    model = randomize(open_clip.CLIP(**config, quick_gelu=quick_gelu))
    return [save(model, folder / name, config) for name in copies([model.visual], tasks)]


def save_pt(model: nn.Module, path: Path, config: Mapping[str, Any], *, legacy: bool = False) -> Path:
    """A state dict by torch.save; ``legacy``: in its format before 1.6."""
    path = path.with_suffix(".pt")
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    return path


def save_safetensors(model: nn.Module, path: Path, config: Mapping[str, Any]) -> Path:
    """A state dict as open_clip's training and hub scripts write it."""
    from safetensors.torch import save_file

    path = path.with_suffix(".safetensors")
    save_file(model.state_dict(), path)
    return path


def save_folder(model: nn.Module, path: Path, config: Mapping[str, Any]) -> Path:
    """What ``local-dir:`` and the hub have of an open_clip model."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.push_to_hf_hub import save_config_for_hf

    path.mkdir(parents=True)
    visual: Any = model.visual
    visual.image_mean, visual.image_std = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    visual.preprocess_cfg = {"interpolation": "bicubic", "resize_mode": "shortest"}
    save_config_for_hf(model, path / "open_clip_config.json", dict(config))
    save_safetensors(model, path / "open_clip_model", config)
    return path


def save_torchscript(model: nn.Module, path: Path, config: Mapping[str, Any]) -> Path:
    """As OpenAI published theirs: a traced CLIP, float16 but for norms and embeddings, its sizes as tensors in it."""
    from open_clip.model import convert_weights_to_lp

    size, context = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    sizes = {"input_resolution": size, "context_length": context, "vocab_size": config["text_cfg"]["vocab_size"]}
    if "input_resolution" not in dict(model.named_buffers()):
        convert_weights_to_lp(model, torch.float16)
        mask = model.attn_mask
        # no part of OpenAI's state dict
        del model.attn_mask, model.context_length, model.vocab_size
        model.attn_mask = mask
        for name, value in sizes.items():
            model.register_buffer(name, torch.tensor(value))
    images, tokens = torch.randn(1, 3, size, size).half(), torch.ones(1, context, dtype=torch.long)
    inputs = {"forward": (images, tokens), "encode_image": (images,), "encode_text": (tokens,)}
    path = path.with_suffix(".pt")
    with torch.no_grad():
        torch.jit.save(torch.jit.trace_module(model, inputs, check_trace=False), str(path))
    return path


class ImageEncoder(nn.Module):
    """src/modeling.py of github.com/mlfoundations/task_vectors: what their checkpoints are pickles of."""

    __module__ = "src.modeling"

    def __init__(self, model: nn.Module, train_preprocess: Any, val_preprocess: Any) -> None:
        super().__init__()
        self.model, self.train_preprocess, self.val_preprocess = model, train_preprocess, val_preprocess
        self.cache_dir = None
        if hasattr(self.model, "transformer"):
            delattr(self.model, "transformer")


@contextlib.contextmanager
def task_vectors_code() -> Iterator[None]:
    """While it lasts, :class:`ImageEncoder` can be pickled as ``src.modeling``'s."""
    module: Any = types.ModuleType("src.modeling")
    module.ImageEncoder = ImageEncoder
    sys.modules |= {"src": types.ModuleType("src"), "src.modeling": module}
    try:
        yield
    finally:
        del sys.modules["src"], sys.modules["src.modeling"]


def save_task_vectors(model: nn.Module, path: Path, config: Mapping[str, Any]) -> Path:
    """A pickle of a whole ImageEncoder, without the blocks of its text tower, around today's open_clip."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = PreprocessCfg(size=config["vision_cfg"]["image_size"])
    train, evaluate = (image_transform_v2(settings, is_train=is_train) for is_train in (True, False))
    path = path.with_suffix(".pt")
    with task_vectors_code():
        torch.save(ImageEncoder(model, train, evaluate), path)
    return path


def save_converted(model: nn.Module, path: Path, config: Mapping[str, Any]) -> Path:
    """What ``pareto-merging convert`` makes of an open_clip .pt."""
    source, target = save_pt(model, path, config), path.with_suffix(".safetensors")
    convert_checkpoint(source, target, progress=False)
    source.unlink()
    return target


@dataclass(frozen=True)
class Format:
    """How checkpoints of a format are written, and whether the pretrained one has a text tower to export."""

    write: Callable[[Mapping[str, Any], Path, int], list[Path]]
    text_tower: bool = True


FORMATS: dict[str, Format] = {
    "huggingface": Format(write_hugging_face),
    "huggingface-sharded": Format(partial(write_hugging_face, shard="200MB")),
    "huggingface-bin": Format(partial(write_hugging_face, bin=True)),
    "huggingface-vision": Format(partial(write_hugging_face, vision=True)),
    "open_clip-pt": Format(partial(write_open_clip, save=save_pt)),
    "open_clip-legacy": Format(partial(write_open_clip, save=partial(save_pt, legacy=True))),
    "open_clip-safetensors": Format(partial(write_open_clip, save=save_safetensors)),
    "open_clip-folder": Format(partial(write_open_clip, save=save_folder)),
    "torchscript": Format(partial(write_open_clip, save=save_torchscript, quick_gelu=True)),
    "task-vectors": Format(partial(write_open_clip, save=save_task_vectors, quick_gelu=True), text_tower=False),
    "converted": Format(partial(write_open_clip, save=save_converted), text_tower=False),
}
# model -> the format that is also stored in another dtype than its files'
ALSO_BFLOAT16 = {"ViT-B-32": "huggingface"}
QUICK_FORMATS = ("huggingface-vision", "task-vectors")


# --- one row: the files, and what a process of its own makes of them


def model_config(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model by name, or the tiny one."""
    return TINY_CONFIG if model == TINY else encoders.model_config(model)


def write_case(row: Row, folder: Path) -> int:
    """Checkpoints, tiny heads, random images and the configuration of a run; returns the checkpoints' bytes."""
    config, names = model_config(row.model), [f"t{k}" for k in range(1, row.tasks + 1)]
    pretrained, *finetuned = FORMATS[row.format].write(config, folder, row.tasks)
    size, generator = config["vision_cfg"]["image_size"], torch.Generator().manual_seed(1)
    write_tensors(
        folder / "images.safetensors", {"images": torch.randn(IMAGES, 3, size, size, generator=generator)}, {}
    )
    heads = {name: torch.randn(CLASSES, config["embed_dim"], generator=generator) for name in names}
    write_tensors(folder / "heads.safetensors", heads, {"logit_scale": "100"})
    files = {"head": "heads.safetensors", "merging": "images.safetensors"}
    run = {
        "encoder": {"pretrained": pretrained.name},
        "tasks": {name: {"checkpoint": path.name, **files} for name, path in zip(names, finetuned, strict=True)},
        "method": {"steps": 1, "batch_size": BATCH},
        "dtype": row.dtype,
        "device": "cpu",
    }
    write_text(folder / RUN_FILE, yaml.safe_dump(run))
    found = [file for path in (pretrained, *finetuned) for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in found if file.is_file())


def resident() -> int:
    """The resident memory of this process now, in bytes, without what the C library keeps of freed memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def mib(count: float) -> float:
    return round(count / MIB, 1)


def measure(folder: Path) -> None:
    """Build, learn, export and reload what ``folder`` describes; the figures go to its row.json as they are known."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    config, run = read_config(folder / RUN_FILE), folder / "run"
    workspace = Workspace(config)
    workspace.check_files()
    tasks = workspace.merging_tasks()
    # code that is loaded at first use is no memory of the model's
    Workspace(RunConfig.model_validate(WARM_UP)).pareto_model()
    pretrained = workspace.checkpoint(workspace.encoder_config.pretrained)
    numbers = [tensor.numel() for tensor in workspace.skeleton().state_dict().values()]
    size = sum(numbers) * workspace.dtype.itemsize
    # W_k as its file has it; where task vectors are rounded, W0 as well, and what that changed in the run's dtype
    stored = max(dtype.itemsize for dtype in pretrained.dtypes.values())
    rounded = any(dtype != workspace.dtype for dtype in pretrained.dtypes.values())
    tensor = max(numbers) * (2 * stored + workspace.dtype.itemsize if rounded else stored)
    before = resident()
    model, seconds, peak = measured(workspace.pareto_model)
    learned = sum(parameter.nbytes for parameter in learned_parameters(model).values())
    bound = (len(tasks) + 1) * size + tensor
    found |= {
        "text_tower": bool(pretrained.text),
        "build_seconds": round(seconds, 2),
        "build_peak_mib": mib(peak - before),
        "build_models": round((peak - before) / size, 3),
        "tensor_mib": mib(tensor),
        "bound_mib": mib(bound),
        "learned_mib": mib(learned),
        "within": peak - before - learned <= bound + SLACK_MIB * MIB,
        "peak_mib": mib(peak),
    }
    write_json(folder / ROW_FILE, found)

    # as `pareto-merging train` goes on
    write_text(run / CONFIG_NAME, dump_config(config))
    learn = partial(learn_pareto_set, model, tasks, config.method, folder=run, progress=False)
    _, seconds, peak = measured(learn)
    save_pareto_set(model, run / SET_NAME, preset=config.method.preset)
    found |= {
        "step_seconds": round(seconds, 2),
        "step_peak_mib": mib(peak),
        "peak_mib": max(found["peak_mib"], mib(peak)),
    }
    write_json(folder / ROW_FILE, found)

    (gamma,) = parse_preferences(PREFERENCE, workspace.task_names)
    merged = merge(model, gamma)
    del model, learn
    gc.collect()
    targets: dict[exports.Format, Path] = {
        "safetensors": run / "merged.safetensors",
        "open_clip": run / "open_clip",
        "huggingface": run / "hf",
    }

    def export() -> None:
        # the run is read once, and not again for each format
        opened = open_run(run)
        with mock.patch.object(exports, "open_run", return_value=opened):
            for name, target in targets.items():
                exports.export_merged(run, PREFERENCE, target, format=name, progress=False)

    _, seconds, peak = measured(export)
    found |= {
        "export_seconds": round(seconds, 2),
        "export_peak_mib": mib(peak),
        "peak_mib": max(found["peak_mib"], mib(peak)),
    }
    write_json(folder / ROW_FILE, found)
    found |= reloaded(workspace, merged, targets)
    write_json(folder / ROW_FILE, found)


def reloaded(workspace: Workspace, merged: nn.Module, targets: Mapping[exports.Format, Path]) -> dict[str, Any]:
    """The exports as this library, open_clip and transformers read them, beside the merged module."""
    import open_clip
    import transformers

    text = workspace.checkpoint(workspace.encoder_config.pretrained).text
    visual = targets["open_clip"] / "visual.safetensors"
    sources = [targets["safetensors"], targets["huggingface"], targets["open_clip"] if text else visual]
    opened = [open_checkpoint(source) for source in sources]
    tensors = merged.state_dict()
    is_equal = all(same(checkpoint, tensors) for checkpoint in opened)
    is_equal = is_equal and all(same(checkpoint.text, text) for checkpoint in opened[1:])
    images = read_tensors(Path(str(next(iter(workspace.task_configs.values())).merging)))["images"][:1]
    merged = merged.float()
    found: dict[str, Any] = {"bit_equal": is_equal}
    with torch.no_grad():
        features = merged(images)
        found["features"] = float(features.abs().max())
        del merged, tensors
        how = {} if text else {"load_weights": False, "pretrained_image_path": str(visual)}
        clip = open_clip.create_model(f"local-dir:{targets['open_clip']}", **how).eval()
        found["open_clip_error"] = difference(clip.encode_image(images), features)
        del clip
        kind: Any = transformers.CLIPModel if text else transformers.CLIPVisionModelWithProjection
        model, info = kind.from_pretrained(targets["huggingface"], dtype=torch.float32, output_loading_info=True)
        if any(info.values()):
            raise ValueError(f"transformers: expected every tensor and no other, got {info}")
        pooled = model.eval().vision_model(pixel_values=images).pooler_output
        found["transformers_error"] = difference(model.visual_projection(pooled), features)
    return found


def same(found: CheckpointTensors, expected: Mapping[str, Tensor]) -> bool:
    """Whether the same names have the same numbers, in the same dtype."""
    return set(found) == set(expected) and all(
        its.dtype == expected[name].dtype and torch.equal(its, expected[name]) for name, its in found.items()
    )


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def run_row(row: Row, folder: Path, say: Callable[[str], None]) -> Row:
    """Write the checkpoints of a row into ``folder``, measure them, and delete everything."""
    folder.mkdir(parents=True)
    try:
        say("writing checkpoints")
        start = time.perf_counter()
        row = replace(row, files_bytes=write_case(row, folder), write_seconds=round(time.perf_counter() - start, 1))
        gc.collect()
        say("building, learning, exporting")
        offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.checkpoints", "--measure", str(folder)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **offline},
            check=False,
        )
        if (folder / ROW_FILE).exists():
            row = replace(row, **json.loads((folder / ROW_FILE).read_text()))
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            return replace(row, error=f"{lines[-1]} (exit code {done.returncode})")
        problem = row.problem(FORMATS[row.format].text_tower)
        return replace(row, status="failed" if problem else "done", error=problem)
    except Exception as error:
        return replace(row, error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- all of them


def planned(models: Sequence[str], formats: Sequence[str]) -> list[Row]:
    """The rows to measure, in order."""
    rows = []
    for model in models:
        tasks = MODELS.get(model, TINY_TASKS)
        rows += [Row(model, name, "float32", tasks) for name in formats]
        if model in ALSO_BFLOAT16 and ALSO_BFLOAT16[model] in formats:
            rows.append(Row(model, ALSO_BFLOAT16[model], "bfloat16", tasks))
    return rows


def markdown(report: Mapping[str, Any]) -> str:
    """The rows as a table for the documents."""
    lines = [
        "Random weights at full size. Peak: the rise of the process's resident memory while the Pareto model is built; "
        f"bound: K + 1 models and one tensor, to which come the learned parameters and up to {SLACK_MIB} MiB of "
        "everything else. Step: one on one CPU core, two images of each task. Most of all: the whole process at its "
        "worst. Open_clip, transformers: the largest difference of their features, of the exported model, from the "
        "merged module's.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "| --- | --- |" + " ---: |" * (len(HEAD) - 2),
        *("| " + " | ".join(cells(Row(**row))) + " |" for row in report["rows"]),
    ]
    return "\n".join(lines) + "\n"


HEAD = (
    "model",
    "format",
    "K",
    "files, GB",
    "build, s",
    "peak, models",
    "peak, MiB",
    "bound, MiB",
    "step, s",
    "most of all, GiB",
    "export, s",
    "read again",
    "open_clip",
    "transformers",
    "",
)


def cells(row: Row) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        row.model,
        row.format if row.dtype == "float32" else f"{row.format}, {row.dtype}",
        str(row.tasks),
        shown(None if row.files_bytes is None else row.files_bytes / 1e9, ".2f"),
        shown(row.build_seconds, ".1f"),
        shown(row.build_models, ".3f"),
        shown(row.build_peak_mib, ".0f"),
        shown(row.bound_mib, ".0f"),
        shown(row.step_seconds, ".1f"),
        shown(None if row.peak_mib is None else row.peak_mib / 1024, ".1f"),
        shown(row.export_seconds, ".1f"),
        {True: "same bits", False: "OTHER BITS", None: "–"}[row.bit_equal],
        shown(row.open_clip_error, ".1e"),
        shown(row.transformers_error, ".1e"),
        "done" if row.error is None else f"{row.status}: {row.error}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a row failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS), help="default: both")
    parser.add_argument(
        "--formats", nargs="+", choices=sorted(FORMATS), metavar="FORMAT", help=f"default: all ({', '.join(FORMATS)})"
    )
    parser.add_argument("--work", type=Path, help="where checkpoints are written and deleted again, 8 GB at a time")
    parser.add_argument("--quick", action="store_true", help="a tiny model in two formats: proves that it runs")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: in benchmarks/results)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.measure is not None:
        measure(chosen.measure)
        return 0
    torch.set_num_threads(1)
    _quiet()
    report = results.header(["python -m benchmarks.checkpoints", *(sys.argv[1:] if arguments is None else arguments)])
    report |= {"suite": "checkpoints", "quick": chosen.quick, "environment": results.machine()}
    kept = Path(tempfile.gettempdir()) if chosen.quick else results.RESULTS
    out = chosen.out or kept / f"checkpoints-{report['date']}.json"
    rows = planned(
        [TINY] if chosen.quick else chosen.models, chosen.formats or (QUICK_FORMATS if chosen.quick else list(FORMATS))
    )
    finished: list[Row] = []
    start = time.perf_counter()
    if chosen.work is not None:
        Path(chosen.work).mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="checkpoints-", dir=chosen.work) as work,
        progress_bar("checkpoints", len(rows)) as advance,
    ):
        for number, row in enumerate(rows, start=1):
            say = partial(_say, advance, number - 1, row)
            finished.append(run_row(row, Path(work) / "row", say))
            # what was measured is not lost to a later row
            results.write(out, report | {"rows": [asdict(each) for each in finished]})
            advance(number, f"{row.model}, {row.format}: {finished[-1].status}")
    report["environment"] = {**results.machine(), "seconds_in_all": round(time.perf_counter() - start, 1)}
    results.write(out, report | {"rows": [asdict(each) for each in finished]})
    print_table("Checkpoints", HEAD, [cells(row) for row in finished], left=(0, 1, len(HEAD) - 1))
    print(out)
    return 1 if any(row.status != "done" for row in finished) else 0


def _quiet() -> None:
    """What the writers say of old formats, and their own progress bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.jit")


def _say(advance: Advance, done: int, row: Row, what: str) -> None:
    advance(done, f"{row.model}, {row.format}: {what}")


if __name__ == "__main__":
    sys.exit(main())
