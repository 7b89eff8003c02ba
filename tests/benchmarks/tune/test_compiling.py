"""Kernels compiled ahead of their launch."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")


def test_kernels_are_compiled_ahead_as_they_will_be_launched() -> None:
    """In a process that does not interpret: what the meta device records has the keys that a launch has, compiles in
    a forked worker, and what spills is a fault.
    """
    program = """
import time, torch
from benchmarks.common.launches import Launch, instead_of_launches
from benchmarks.tune import cases, compiling
from pmkernels.configs import Config
from pmkernels.kernels import merge as merge_kernels
target = compiling.Target(90, 132, "sm_90")
compiler = compiling.Compiler(1)
compiler.target = target
case = cases.Case("merge", 48, 32, tasks=2)
good, bad = Config(block_n=16, block_d=32, num_warps=4), Config(block_n=64, block_d=128, num_warps=1, unroll=8)
until = time.monotonic() + 100
with compiling.active("sm_90"):
    (launch,) = compiling.launches(case, good, target)
    real = []
    record = lambda before, kernel, *a, grid, warmup, **o: real.append(Launch.of(kernel, a, o))
    with instead_of_launches(record), compiling.trial("merge", good):
        cases.run(case, cases.inputs(case, torch.device("cpu")))
    assert real == [launch], real
    for config in (good, good, bad):
        compiler.submit(config, [case])
    assert len(compiler.futures) == 2, "the same kernel twice"
    assert compiler.fault(good, case, until) is None
    assert "spill" in compiler.fault(bad, case, until), compiler.fault(bad, case, until)
    compiler.submit(Config(block_n=16, block_d=64), [case])
    assert compiler.fault(Config(block_n=16, block_d=64), case, 0.0).startswith("not reached")
assert not compiler.failed, compiler.failed
compiler.close()
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
