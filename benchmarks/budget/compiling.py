"""Kernels compiled without a GPU, and what they take."""

import functools
import io
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.budget.calls import Wanted
from benchmarks.common import ptx, sass
from benchmarks.common.launches import AbsentDriver

# the products of tiles these kernels are made for; in the others every product has at most 64 columns
WIDE_PRODUCTS = ("linear_fwd_kernel", "weight_grad_kernel", "preference_linear_kernel")
NARROW_PRODUCTS = ("shrink_kernel", "widen_kernel", "factor_grad_kernel", "core_grad_kernel", "preference_grad_kernel")


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has. Shared memory is in bytes, for one program and in all."""

    name: str
    capability: int
    shared_per_program: int
    shared: int
    warps: int
    programs: int
    tensor_core: str
    registers: int = 65536


ARCHITECTURES = {
    "sm_80": Architecture("sm_80", 80, 163 * 1024, 164 * 1024, 64, 32, "HMMA"),
    "sm_86": Architecture("sm_86", 86, 99 * 1024, 100 * 1024, 48, 16, "HMMA"),
    "sm_89": Architecture("sm_89", 89, 99 * 1024, 100 * 1024, 48, 24, "HMMA"),
    "sm_90": Architecture("sm_90", 90, 227 * 1024, 228 * 1024, 64, 32, "HGMMA"),
}


@dataclass
class Cost:
    """What one compiled kernel takes, and what is wrong with it."""

    kernel: str
    case: str
    dtype: str
    configuration: str
    arch: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: int = 0
    tensor_core: int = 0
    ffma: int = 0
    loads: int = 0
    warps: int = 0
    occupancy: float = 0.0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def occupancy(arch: Architecture, registers: int, shared: int, warps: int) -> float:
    """Return resident warps over the most there can be. Registers (256 at a time) and shared memory limit them."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = arch.registers // (per_warp * warps) if per_warp else arch.programs
    return min(arch.programs, arch.warps // warps, by_registers, arch.shared // (shared + 1024)) * warps / arch.warps


def tool(name: str) -> str:
    """Return the path of a tool of NVIDIA's that comes with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def measure(launches: Sequence[Wanted], arch: Architecture) -> list[Cost]:
    """Compile launches for one architecture and read their machine code. Many at once are a third cheaper."""
    compiled = [compile_launch(launch, arch) for launch in launches]
    whole = [(launch, *one) for launch, one in zip(launches, compiled, strict=True) if one[1] is not None]
    start = time.perf_counter()
    codes = sass.disassemble([kernel.asm["cubin"] for *_, kernel, _ in whole], arch.capability, tool("nvdisasm"))
    share = (time.perf_counter() - start) / max(len(whole), 1)
    for (wanted, cost, kernel, log), code in zip(whole, codes, strict=True):
        start = time.perf_counter()
        _read(cost, wanted.launch.decoded_options, kernel, log, arch, code)
        cost.seconds = round(cost.seconds + share + time.perf_counter() - start, 2)
    return [cost for cost, *_ in compiled]


def compile_launch(wanted: Wanted, arch: Architecture) -> tuple[Cost, Any, str]:
    """Compile one launch. Returns what it takes, the kernel (None where it does not compile) and what ptxas said."""
    start = time.perf_counter()
    cost = Cost(wanted.launch.name, wanted.case, wanted.dtype, wanted.configuration, arch.name)
    triton.runtime.driver.set_active(AbsentDriver(arch.capability))
    try:
        with _assembler_log() as log:
            kernel = wanted.launch.compile()
    except Exception as error:
        cost.faults.append(f"does not compile: {str(error).strip().splitlines()[0][:160]}")
        return cost, None, ""
    cost.seconds = time.perf_counter() - start
    return cost, kernel, log.getvalue()


def _registers(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(cubin)
        binary.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+)", usage)
    assert match is not None, usage
    return int(match[1])


def _read(cost: Cost, options: dict[str, Any], kernel: Any, log: str, arch: Architecture, code: sass.Function) -> None:
    """Write down what a kernel takes and what is wrong with it."""
    names = Counter(instruction.base for instruction in code.code)
    cost.registers, cost.shared = _registers(kernel.asm["cubin"]), int(kernel.metadata.shared)
    cost.spills = names["STL"] + names["LDL"]
    cost.instructions = len(code.code)
    cost.tensor_core, cost.ffma = names["HMMA"] + names["HGMMA"], names["FFMA"]
    cost.loads = names["LDG"] + names["LDGSTS"]
    cost.warps = options["num_warps"]
    cost.occupancy = round(occupancy(arch, cost.registers, cost.shared, cost.warps), 3)
    if cost.shared > arch.shared_per_program:
        cost.faults.append(f"shared memory {cost.shared} B, {arch.name} has {arch.shared_per_program} B")
    if cost.spills:
        cost.faults.append(f"{cost.spills} spill instructions (STL/LDL)")
    if cost.occupancy == 0:
        cost.faults.append("no program fits on a multiprocessor")
    if cost.dtype in ("bfloat16", "float16"):
        multiplies = options.get("FROM_ROWS", True)
        if cost.kernel in WIDE_PRODUCTS and multiplies and not names[arch.tensor_core]:
            cost.faults.append(f"no {arch.tensor_core} instruction")
        if cost.kernel in NARROW_PRODUCTS and not cost.tensor_core:
            cost.faults.append("no tensor-core instruction")
    if "wgmma.mma_async" in kernel.asm["ptx"]:
        cost.faults += _faults_of_wgmma(options, arch, kernel.asm["ptx"], code, log)


@contextmanager
def _assembler_log() -> Iterator[io.StringIO]:
    """Catch what ptxas prints while Triton runs it; Triton throws that away where nothing failed."""
    knobs, log = triton.knobs.nvidia, io.StringIO()
    before = knobs.dump_ptxas_log
    knobs.dump_ptxas_log = True
    try:
        with redirect_stdout(log):
            yield log
    finally:
        knobs.dump_ptxas_log = before


def _faults_of_wgmma(
    options: dict[str, Any], arch: Architecture, text: str, code: sass.Function, log: str
) -> list[str]:
    """Say what is wrong with a kernel's wgmma. Its PTX, machine code and ptxas's output tell."""
    if "ptxas info" not in log:
        # the kernel came from Triton's cache: the same PTX again, by Triton's own call and with its flags
        backend = triton.compiler.make_backend(GPUTarget("cuda", arch.capability, 32))
        with _assembler_log() as again:
            backend.make_cubin(text, {}, backend.parse_options(options), arch.capability)
        log = again.getvalue()
    faults, mixed = [], sass.mixed_loops(code)
    for reason in ptx.serialised(log):
        if "register resources" in reason:
            faults.append(f"ptxas serialises wgmma ({reason}): take smaller tiles or more warps")
        elif mixed:
            faults.append(f"ptxas serialises wgmma ({reason}; {mixed[0]}): give every product of it 64 rows")
        else:
            faults.append(f"ptxas serialises wgmma ({reason}): take fewer stages")
    missing = sass.missing_barriers(code, options["num_warps"])
    if missing:
        faults.append(
            f"shared memory is written after a wgmma wait without a barrier ({len(missing)}×, first {missing[0]}), "
            "another warpgroup may still read it: take 4 warps or fewer stages"
        )
    version = assembler_version(arch.capability)
    pending = ptx.pending_operands(text) if version < ptx.KEEPS_OPERANDS else []
    if pending:
        faults.append(
            f"a wgmma with a register operand stays pending ({pending[0]}), and ptxas {version[0]}.{version[1]} may "
            "reuse the register (until 13.3): take fewer stages"
        )
    return faults


@functools.cache
def assembler_version(capability: int) -> tuple[int, int]:
    """Return the version of ptxas."""
    major, minor, *_ = get_ptxas(capability).version.split(".")
    return int(major), int(minor)
