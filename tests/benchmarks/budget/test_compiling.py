"""The offline compiler: what it sees and refuses. In processes of their own: kernels are interpreted in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(program: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


BROKEN = """
import dataclasses, json, sys
from benchmarks.budget import calls, compiling
from benchmarks.budget.compiling import ARCHITECTURES
from pmkernels import configs, dispatch
text = json.loads(dispatch.in_force().files["default"])
for line in text["entries"]:
    if line["op"] == "linear" and line.get("aligned") is False and line["dtype"] == "16-bit":
        # 64 by 64 scattered elements in 128 threads: hundreds of words spill
        line["config"] = {"block_m": 64, "block_n": 64, "block_d": 64, "num_warps": 4, "num_stages": 3}
text["entries"].append({"op": "no_such_kernel", "dtype": "any", "config": {"block_m": 16}})
with dispatch.using(configs.Configs({"default": json.dumps(text)})):
    launches, unused = calls.record("default")
assert len(unused) == 1 and "no_such_kernel" in unused[0], unused
scattered = next(l for l in launches if l.launch.name == "linear_fwd_kernel" and "unaligned" in l.case)
(cost,) = compiling.measure([scattered], ARCHITECTURES["sm_86"])
assert any("spill instructions" in fault for fault in cost.faults), cost
whole = next(l for l in launches if l.launch.name == "linear_fwd_kernel" and "unaligned" not in l.case)
small = dataclasses.replace(ARCHITECTURES["sm_90"], shared_per_program=1000, tensor_core="QGMMA")
(cost,) = compiling.measure([whole], small)
assert any("shared memory" in fault for fault in cost.faults), cost
assert any("no QGMMA instruction" in fault for fault in cost.faults), cost
options = {**whole.launch.options, "BLOCK_N": {"value": 48}}
wrong = dataclasses.replace(whole, launch=dataclasses.replace(whole.launch, options=options))
(cost,) = compiling.measure([wrong], ARCHITECTURES["sm_90"])
assert any("does not compile" in fault for fault in cost.faults), cost
sys.exit(7)
"""
WGMMA = """
import dataclasses, subprocess, sys, tempfile
sys.path.insert(0, "tests")
import torch, triton
from support import faulty_kernels
from benchmarks.budget import compiling
from benchmarks.budget.calls import Wanted
from benchmarks.budget.compiling import ARCHITECTURES
from benchmarks.common import sass
from benchmarks.common.launches import Launch
launches = []
half, single = torch.empty(128, 1024, dtype=torch.bfloat16), torch.empty(128, 128)

def faults(kernel, outputs, version=None, **options):
    options = {"num_warps": 4, "num_stages": 3, "STAGES": 3, "BLOCK": 64, **options}
    arguments = (half, half, single if "loops" in kernel else half, *[single] * outputs, 1024)
    launch = Wanted(Launch.of(getattr(faulty_kernels, kernel), arguments, options), "a test", "bfloat16")
    launches.append(launch)
    if version is not None:
        compiling.assembler_version = lambda capability: version
    return compiling.measure([launch], ARCHITECTURES["sm_90"])[0].faults

for attempt in ("compiled", "from Triton's cache"):
    (serialised,) = faults("mixed_kernel", 2, (12, 9))
    assert serialised.startswith("ptxas serialises wgmma (C7515: non wgmma instructions defining"), serialised
    assert "HMMA beside 4 HGMMA in the loop at 0x" in serialised, serialised
    assert faults("product_kernel", 1, SCALED=False) == []
    assert faults("product_kernel", 1, SCALED=True, STAGES=1) == []
    *_, pending = faults("product_kernel", 1, SCALED=True)
    assert pending.startswith("a wgmma with a register operand stays pending (wgmma in line "), pending
    assert "ptxas 12.9 may reuse the register (until 13.3)" in pending, pending
    assert not any("stays pending" in fault for fault in faults("product_kernel", 1, (13, 3), SCALED=True))
    assert faults("two_loops_kernel", 2, (12, 9)) == []
    found = faults("two_loops_kernel", 2, BLOCK=128, num_warps=8)
    # Triton 3.9 puts the barrier there
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        (unguarded,) = found
        assert unguarded.startswith("shared memory is written after a wgmma wait without a barrier ("), unguarded
        assert "LDGSTS" in unguarded and "WARPGROUP.DEPBAR" in unguarded and "take 4 warps" in unguarded, unguarded
    else:
        assert found == [], found

# many at once give what each gives by itself, as another disassembler of NVIDIA's prints it
arch, some = ARCHITECTURES["sm_90"], [launches[0], launches[1], launches[5], launches[0]]
cubins = [compiling.compile_launch(launch, arch)[1].asm["cubin"] for launch in some]
together = sass.disassemble(cubins, 90, compiling.tool("nvdisasm"))
for cubin, code in zip(cubins, together, strict=True):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [compiling.tool("cuobjdump"), "-sass", file.name]
        (alone,) = sass.parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    as_read = [[(i.address, i.guard, i.opcode, i.target) for i in one.code] for one in (code, alone)]
    assert as_read[0] == as_read[1]
    assert len(sass.loops(code)) == len(sass.loops(alone)) > 0
    assert {i.operands for i in code.code if i.base == "BRA"} == {i.operands for i in alone.code if i.base == "BRA"}
first, _, _, again = compiling.measure(some, arch)
assert dataclasses.replace(first, seconds=0) == dataclasses.replace(again, seconds=0) and first.instructions > 100
sys.exit(7)
"""


@pytest.mark.slow
def test_wgmma_that_is_serialised_unguarded_or_left_pending_is_a_fault() -> None:
    done = run(WGMMA)
    assert done.returncode == 7, done.stdout + done.stderr


@pytest.mark.slow
def test_what_spills_overflows_or_is_never_launched_is_a_fault() -> None:
    done = run(BROKEN)
    assert done.returncode == 7, done.stdout + done.stderr


def test_occupancy_follows_registers_warps_and_shared_memory() -> None:
    done = run(
        "from benchmarks.budget.compiling import ARCHITECTURES as a; "
        "from benchmarks.budget.compiling import occupancy as o; "
        "print(o(a['sm_90'], 128, 0, 8), o(a['sm_90'], 32, 0, 4), o(a['sm_90'], 255, 0, 8), "
        "o(a['sm_86'], 64, 60000, 8), o(a['sm_86'], 64, 200000, 8), o(a['sm_90'], 40, 0, 4))"
    )
    assert [float(x) for x in done.stdout.split()] == [0.25, 1.0, 0.125, 8 / 48, 0.0, 0.75]
