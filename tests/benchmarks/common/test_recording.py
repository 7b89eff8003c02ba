"""Launches recorded for a GPU that is not there: which kernels, as on which GPU, and what is known of their tensors."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.launches import decode, encode
from benchmarks.common.recording import Launches

ROOT = Path(__file__).resolve().parents[3]


def alone(code: str) -> str:
    """Kernels are interpreted in this process, so what records runs in one of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LAYER = """
import copy, torch, threading
from pathlib import Path
import pmkernels
from torch import nn
from benchmarks.common.recording import read, recording

def layer(strategy, lead=(8,), gamma_lead=(), n=96, d=64, device="cuda"):
    def make(*shape, of=torch.float32, learned=True):
        return torch.randn(*shape, device=device).to(of).requires_grad_(learned)
    half = torch.bfloat16
    values = dict(weight=make(n, d, of=half, learned=False), task_vectors=make(8, n, d, of=half, learned=False),
                  lam=make(8), A=make(n, 16), G=make(16, 16, 8), B=make(d, 16), gamma=make(*gamma_lead, 8),
                  bias=make(n, of=half), x=make(*lead, d, of=half))
    y = pmkernels.pareto_linear(**values, strategy=strategy)
    wanted = [value for value in values.values() if value.requires_grad]
    return y, torch.autograd.grad(y.sum(), wanted)
"""


CALLS = (("fused", (8,), ()), ("streamed", (8,), ()), ("fused", (4, 2), (4, 1)), ("streamed", (4, 2), (4, 1)))


def test_the_kernels_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of one layer: the kernels that really run where they are interpreted, for each strategy."""
    from triton.runtime.interpreter import InterpretedFunction

    ran: list[str] = []
    run = InterpretedFunction.run

    def noting(kernel: Any, *arguments: Any, **options: Any) -> Any:
        ran.append(kernel.__name__)
        return run(kernel, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", noting)
    here: dict[str, Any] = {}
    exec(LAYER, here)
    expected = []
    for strategy, lead, gamma_lead in CALLS:
        ran.clear()
        here["layer"](strategy, lead, gamma_lead, device="cpu")
        expected.append(" ".join(sorted(set(ran))))
    said = alone(
        LAYER
        + f"""
for strategy, lead, gamma_lead in {CALLS!r}:
    with recording() as launches:
        y, gradients = layer(strategy, lead, gamma_lead)
    assert y.device == torch.device("meta") and y.shape == (*lead, 96), y.device
    print(*launches.names())
"""
    )
    assert said.splitlines() == expected
    assert len(set(expected)) == len(CALLS)


def test_code_on_the_absent_gpu(tmp_path: Path) -> None:
    """What code asks of a GPU: device, addresses, few values, modules that move, threads, random numbers."""
    alone(
        LAYER
        + f"""
with recording("nvidia-h200") as launches:
    assert torch.cuda.is_available() and torch.cuda.get_device_name() == "NVIDIA H200"
    from pmkernels import dispatch
    assert dispatch.gpu_file(torch.device("cuda", 0)) in ("nvidia-h200", "sm_90")
    x = torch.zeros(4, 8, device="cuda")
    assert type(x) is torch.Tensor and x.is_cuda and x.device == torch.device("cuda", 0) and not x.is_meta
    assert x.data_ptr() % 256 == 0 and x[:, 1:].data_ptr() - x.data_ptr() == 4
    own = x.untyped_storage().data_ptr()
    assert own == x[1:].untyped_storage().data_ptr() != x.clone().untyped_storage().data_ptr()
    gamma = torch.softmax(torch.tensor([1.0, 2.0], device="cuda"), dim=-1)
    assert abs(float(gamma.sum()) - 1) < 1e-6 and gamma.cumsum(0).tolist()[1] > 0.99
    module = nn.Linear(8, 4)
    held = module.weight
    module.cuda()
    assert module.weight is held and held.is_cuda and copy.deepcopy(module)(x).shape == (4, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer("auto")
    graph.replay()
    thread = threading.Thread(target=lambda: layer("auto", (257,)))
    thread.start(); thread.join()
    assert torch.randn(3, generator=torch.Generator("cuda"), device="cuda").is_cuda
    assert torch.nonzero(torch.ones(3, device="cuda")).shape == (3, 1)
    before = len(launches)
    layer("auto")
assert before == len(launches) > 0
assert not torch.cuda.is_available() and torch.empty(1, device="meta").device.type == "meta"
launches.write(Path({str(tmp_path / "launches.json")!r}))
again = read(Path({str(tmp_path / "launches.json")!r}))
assert list(again) == list(launches) and again.gpu == "nvidia-h200"
"""
    )


def test_what_decides_the_code() -> None:
    import triton.language as tl

    for value in (None, True, False, 1.5, "ieee", 3, tl.float32, tl.bfloat16, tl.float16):
        assert decode(encode(value)) == value
    with pytest.raises(ValueError, match="cpu tensor"):
        Launches().note(None, [torch.zeros(3)], {})
    with pytest.raises(TypeError, match="got list"):
        encode([1])
    for aligned in (True, False):
        again = decode({"tensor": "float16", "aligned": aligned})
        assert again.dtype == torch.float16 and (again.data_ptr() % 16 == 0) is aligned


def test_interpreted_kernels_and_unknown_gpus_are_refused() -> None:
    from benchmarks.common.recording import recording

    for gpu, expected in (("nvidia-t4", "gpu: expected one of"), ("nvidia-h200", "TRITON_INTERPRET: expected unset")):
        with pytest.raises(ValueError, match=expected), recording(gpu):
            pass


def test_a_test_is_recorded_past_what_it_asserts(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_it.py").write_text(
        "import pytest, torch, pmkernels\n"
        "def test_first():\n"
        "    with pytest.raises(ValueError):\n"
        "        pass\n"
        "    z = torch.randn(4, 1000, device='cuda', requires_grad=True)\n"
        "    assert float(pmkernels.softmax_entropy(z, strategy='fused').sum()) == 2.5\n"
        "    torch.testing.assert_close(z, z + 1)\n"
        "    torch.autograd.grad(pmkernels.softmax_entropy(z).sum(), z)\n"
        "def test_second():\n"
        "    raise RuntimeError('of its own')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    code = f"""
import pytest
code = pytest.main(["--rootdir", {str(tmp_path)!r}, "-c", {str(tmp_path / "pytest.ini")!r}, {str(folder)!r}, "-q",
    "--assert=plain", "-p", "no:cacheprovider", "-p", "benchmarks.common.recording_plugin",
    "--record-launches", {str(tmp_path / "found.json")!r}])
assert code == 1, code
from pathlib import Path
from benchmarks.common.recording import read
from benchmarks.common.recording_plugin import stopped
path = Path({str(tmp_path / "found.json")!r})
whole, others = stopped(path)
print(whole, others, *read(path).names())
"""
    said = alone(code).splitlines()[-1]
    assert said.startswith("1 {") and "RuntimeError: of its own" in said
    assert said.endswith("entropy_bwd_kernel entropy_fwd_kernel")
