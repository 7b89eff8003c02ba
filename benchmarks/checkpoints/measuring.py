"""One row: the files, and what a process of its own makes of them."""

import contextlib
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn

from benchmarks import results
from benchmarks.checkpoints.rows import MIB, SLACK_MIB, TINY, Row
from benchmarks.checkpoints.writers import FORMATS, NO_TEXT_TOWER
from benchmarks.common.session import one_line
from pareto_merging import learn_pareto_set, learned_parameters, merge, open_checkpoint, save_pareto_set
from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.safetensors import read_tensors, write_tensors
from pareto_merging.preferences import parse_preferences
from pareto_merging.run import export as exports
from pareto_merging.run.config import RunConfig, dump_config, read_config
from pareto_merging.run.folder import CONFIG_NAME, SET_NAME, open_run
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.environment import measured
from pareto_merging.system.files import write_json, write_text

PREFERENCE = "t1=0.7"
CLASSES, IMAGES, BATCH = 10, 4, 2
WARM_UP = {"suite": "digits", "tasks": ["upright", "mirrored"], "device": "cpu"}
TINY_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
}
RUN_FILE, ROW_FILE = "run.yaml", "row.json"


def model_config(model: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model by name, or the tiny one."""
    return TINY_CONFIG if model == TINY else encoders.model_config(model)


def write_case(row: Row, folder: Path) -> int:
    """Write checkpoints, tiny heads, random images and a run's configuration. Returns the checkpoints' bytes."""
    config, names = model_config(row.model), [f"t{k}" for k in range(1, row.tasks + 1)]
    pretrained, *finetuned = FORMATS[row.format](config, folder, row.tasks)
    size, generator = config["vision_cfg"]["image_size"], torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, size, size, generator=generator)
    write_tensors(folder / "images.safetensors", {"images": images}, {})
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
    paths = [file for path in (pretrained, *finetuned) for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in paths if file.is_file())


def resident() -> int:
    """Return this process's resident memory in bytes, without the C library's freed memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def mib(count: float) -> float:
    return round(count / MIB, 1)


class Measurement:
    """What a run folder describes, built, learned, exported and reloaded. Figures are written as they are known."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.figures = folder, folder / "run", dict[str, Any]()
        self.workspace = Workspace(read_config(folder / RUN_FILE))
        self.workspace.check_files()
        # code that is loaded at first use is no memory of the model's
        Workspace(RunConfig.model_validate(WARM_UP)).pareto_model()

    def note(self, seconds: str, taken: float, peak: int, **figures: Any) -> None:
        """Write figures down, and the most memory so far."""
        most = max(self.figures.get("peak_mib", 0.0), mib(peak))
        self.figures |= {seconds: round(taken, 2), **figures, "peak_mib": most}
        write_json(self.folder / ROW_FILE, self.figures)

    def build(self) -> nn.Module:
        """Build the Pareto model, and compare its memory with K + 1 models and one tensor."""
        workspace = self.workspace
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
        bound = (len(workspace.task_names) + 1) * size + tensor
        rise = peak - before
        within = rise - learned <= bound + SLACK_MIB * MIB
        figures = {"build_peak_mib": mib(rise), "build_models": round(rise / size, 3), "tensor_mib": mib(tensor)}
        figures |= {"bound_mib": mib(bound), "learned_mib": mib(learned)}
        self.note("build_seconds", seconds, peak, text_tower=bool(pretrained.text), within=within, **figures)
        return model

    def learn(self, model: nn.Module, tasks: Any) -> None:
        """Take one step, as ``pareto-merging train`` does, and write the set."""
        config = self.workspace.config
        write_text(self.run / CONFIG_NAME, dump_config(config))
        learn = partial(learn_pareto_set, model, tasks, config.method, folder=self.run, progress=False)
        _, seconds, peak = measured(learn)
        save_pareto_set(model, self.run / SET_NAME, preset=config.method.preset)
        self.note("step_seconds", seconds, peak, step_peak_mib=mib(peak))

    def export(self) -> dict[exports.Format, Path]:
        """Export a merged model in every format; return the files."""
        targets: dict[exports.Format, Path] = {"safetensors": self.run / "merged.safetensors"}
        targets |= {"open_clip": self.run / "open_clip", "huggingface": self.run / "hf"}

        def every() -> None:
            # the run is read once, and not again for each format
            opened = open_run(self.run)
            with mock.patch.object(exports, "open_run", return_value=opened):
                for name, target in targets.items():
                    exports.export_merged(self.run, PREFERENCE, target, format=name, progress=False)

        _, seconds, peak = measured(every)
        self.note("export_seconds", seconds, peak, export_peak_mib=mib(peak))
        return targets


def measure(folder: Path) -> None:
    """Build, learn, export and reload what ``folder`` describes. The figures go to its row.json as they are known."""
    torch.set_num_threads(1)
    one = Measurement(folder)
    tasks = one.workspace.merging_tasks()
    model = one.build()
    one.learn(model, tasks)
    (gamma,) = parse_preferences(PREFERENCE, one.workspace.task_names)
    merged = merge(model, gamma)
    del model
    gc.collect()
    targets = one.export()
    one.figures |= reloaded(one.workspace, merged, targets)
    write_json(folder / ROW_FILE, one.figures)


def reloaded(workspace: Workspace, merged: nn.Module, targets: Mapping[exports.Format, Path]) -> dict[str, Any]:
    """Compare the exports, as this library, open_clip and transformers read them, with the merged module."""
    import open_clip
    import transformers

    text = workspace.checkpoint(workspace.encoder_config.pretrained).text
    visual = targets["open_clip"] / "visual.safetensors"
    sources = [targets["safetensors"], targets["huggingface"], targets["open_clip"] if text else visual]
    opened, tensors = [open_checkpoint(source) for source in sources], merged.state_dict()
    is_equal = all(same(checkpoint, tensors) for checkpoint in opened)
    is_equal = is_equal and all(same(checkpoint.text, text) for checkpoint in opened[1:])
    images = read_tensors(Path(str(next(iter(workspace.task_configs.values())).merging)))["images"][:1]
    merged = merged.float()
    report: dict[str, Any] = {"bit_equal": is_equal}
    with torch.no_grad():
        features = merged(images)
        report["features"] = float(features.abs().max())
        del merged, tensors
        how = {} if text else {"load_weights": False, "pretrained_image_path": str(visual)}
        clip = open_clip.create_model(f"local-dir:{targets['open_clip']}", **how).eval()
        report["open_clip_error"] = difference(clip.encode_image(images), features)
        del clip
        kind: Any = transformers.CLIPModel if text else transformers.CLIPVisionModelWithProjection
        model, info = kind.from_pretrained(targets["huggingface"], dtype=torch.float32, output_loading_info=True)
        if any(info.values()):
            raise ValueError(f"transformers: expected every tensor and no other, got {info}")
        pooled = model.eval().vision_model(pixel_values=images).pooler_output
        report["transformers_error"] = difference(model.visual_projection(pooled), features)
    return report


def same(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Say whether the same names have the same numbers, in the same dtype."""
    return set(tensors) == set(expected) and all(
        its.dtype == expected[name].dtype and torch.equal(its, expected[name]) for name, its in tensors.items()
    )


def difference(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).abs().max())


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
        command = [sys.executable, "-m", "benchmarks.checkpoints", "--measure", str(folder)]
        place: dict[str, Any] = {"cwd": results.RESULTS.parents[1], "env": {**os.environ, **offline}}
        done = subprocess.run(command, capture_output=True, text=True, check=False, **place)
        if (folder / ROW_FILE).exists():
            row = replace(row, **json.loads((folder / ROW_FILE).read_text()))
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            return replace(row, error=f"{lines[-1]} (exit code {done.returncode})")
        problem = row.problem(row.format not in NO_TEXT_TOWER)
        return replace(row, status="failed" if problem else "done", error=problem)
    except Exception as error:
        return replace(row, error=one_line(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
