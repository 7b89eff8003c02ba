"""compute-sanitizer over the forward product, the weight gradient, the entropy and the merge: ``make gpu-sanitize``.

Needs torch, triton and pytest only.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]

KERNELS = ("linear_fwd_kernel", "weight_grad_kernel", "entropy_fwd_kernel", "entropy_bwd_kernel", "merge_weight_kernel")
# two tiles or more each way, the last one part full; D in parts; every result that a launch can have
SANITIZED = """
import torch
from pmkernels.kernels import entropy, linear, merge, weight_grad
from pmkernels.low_rank import Terms

torch.manual_seed(0)
N, D, M, K, R = 70, 150, 33, 3, 5


def make(*shape):
    return torch.randn(*shape).cuda()


weight, task_vectors, lam, A, B = make(N, D), make(K, N, D), make(K), make(N, R), make(D, R)
x, dy, bias, t = make(M, D), make(M, N), make(N), make(M, R)
terms = Terms(weight, task_vectors, lam, (A, B))
linear.linear_fwd(x, terms, bias=bias)
linear.linear_fwd(x, terms._replace(low_rank=None), start=(t, A))
linear.linear_bwd_x(dy, terms)
weight_grad.weight_grad(dy, x, task_vectors, A=A, B=B, need_bias=True)
weight_grad.weight_grad_of_merge(weight, task_vectors, A=A, B=B)
merge.merge_weight(terms, torch.empty_like(weight))
entropy.entropy_bwd(make(M), dy, *entropy.entropy_fwd(dy))
torch.cuda.synchronize()
print("finished")
"""


@pytest.fixture(scope="module")
def compiled() -> None:
    """Triton's cache holds every kernel: under the sanitizer nothing is compiled."""
    done = subprocess.run([sys.executable, "-c", SANITIZED], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0 and "finished" in done.stdout, (done.stdout + done.stderr)[-3000:]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    only = [word for name in KERNELS for word in ("--kernel-name", f"kernel_substring={name}")]
    try:
        done = subprocess.run(
            [sanitizer, "--tool", tool, "--error-exitcode", "9", *only, sys.executable, "-c", SANITIZED],
            capture_output=True,
            text=True,
            env=_environment(),
            timeout=240,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took more than four minutes")
    if "finished" not in done.stdout and done.returncode != 9:
        pytest.skip(f"{tool} does not run here: {(done.stdout + done.stderr)[-300:]}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def _environment() -> dict[str, str]:
    """Every tensor in an allocation of its own: what is read beyond its end is no other tensor's memory."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
