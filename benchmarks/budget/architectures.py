"""What a multiprocessor of an architecture has."""

from dataclasses import dataclass


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
