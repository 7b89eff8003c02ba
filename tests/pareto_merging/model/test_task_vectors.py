"""What building a Pareto model takes at its peak: K + 1 models in the dtype of the run and one tensor.

One tensor as it is stored, in float32; where task vectors are rounded that is W0's and one copy's, and what rounding
changed in bfloat16 beside them.

Measured in a process of its own (this file, run as a script), in resident memory as Linux counts it: that has what
PyTorch's allocator, safetensors and the C library take, and what the C library keeps of memory that was freed.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TASKS, WIDTH, LAYERS = 8, 384, 6
DTYPES = ("float32", "bfloat16")
# bytes for each number of the largest tensor beside K + 1 models
ONE_TENSOR = {"float32": 4, "bfloat16": 4 + 4 + 2}
# beside the tensors: objects and Python code, pieces of a megabyte, freed memory that the C library keeps for later,
# and the pages of the file that hold the tensor being copied, which count as resident until the file is closed
SLACK = 8 * 2**20


class LazyFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for, into memory of its own."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        with safe_open(path, framework="pt") as file:
            self.shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def vision_transformer(width: int, layers: int) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=64, patch_size=8, width=width, layers=layers, heads=width // 64, mlp_ratio=4.0, output_dim=128
    )


def resident(what: str) -> int:
    """VmRSS (now) or VmHWM (at the peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":"))


def build(folder: Path, dtype: torch.dtype, settings: dict[str, Any], width: int, layers: int) -> nn.Module:
    from pareto_merging.model.parametrize import parametrize
    from pareto_merging.model.stored import remember_stored

    with torch.device("meta"):
        pretrained = vision_transformer(width, layers)
    file = LazyFile(folder / "pretrained.safetensors")
    pretrained.load_state_dict({name: file[name].to(dtype) for name in file}, assign=True)
    remember_stored(pretrained, file)
    finetuned = {f"t{k}": LazyFile(folder / f"t{k}.safetensors") for k in range(TASKS)}
    return parametrize(pretrained, finetuned, **settings)


def measure(folder: Path, dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, int]:
    """The bytes of a Pareto model's frozen and learned tensors, and those that building it took at the peak."""
    from pareto_merging.model.learned import learned_parameters

    # code that is loaded at first use is no memory of the model's
    build(folder / "small", dtype, settings, 64, 1)
    gc.collect()
    # memory that is free but still resident would be used first and not be seen
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = build(folder, dtype, settings, WIDTH, LAYERS)
    peak = resident("VmHWM") - before
    learned = sum(p.numel() * p.element_size() for p in learned_parameters(model).values())
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {"peak": peak, "learned": learned, "stored": stored, "after": resident("VmRSS") - before}


def save(folder: Path, width: int, layers: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = {name: value.detach() for name, value in vision_transformer(width, layers).state_dict().items()}
    save_file(weights, folder / "pretrained.safetensors")
    for k in range(TASKS):
        save_file({n: v * 1.01 + 1e-3 * (k + 1) for n, v in weights.items()}, folder / f"t{k}.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("open_clip")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux, which says what a process took at its peak")
    folder = tmp_path_factory.mktemp("weights")
    save(folder, WIDTH, LAYERS)
    save(folder / "small", 64, 1)
    return folder


@pytest.fixture(scope="module")
def measured(files: Path) -> dict[str, dict[str, int]]:
    """By dtype of the run, of float32 files. One process for both: most of its time is imports."""
    command = [sys.executable, __file__, str(files), json.dumps({"copy": False})]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_building_takes_k_plus_one_models_and_one_tensor(
    files: Path, measured: dict[str, dict[str, int]], dtype: str
) -> None:
    found = measured[dtype]
    sizes = [torch.Size(shape).numel() for shape in LazyFile(files / "pretrained.safetensors").shapes.values()]
    model = sum(sizes) * getattr(torch, dtype).itemsize
    assert found["stored"] - found["learned"] == (TASKS + 1) * model
    extra = found["peak"] - found["stored"]
    assert extra <= ONE_TENSOR[dtype] * max(sizes) + SLACK, (
        f"{extra / 2**20:.1f} MiB beside the {found['stored'] / 2**20:.1f} stored"
    )
    # memory that was there before would not have been seen
    assert extra >= 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps({name: measure(folder, getattr(torch, name), settings) for name in DTYPES}))
