"""Machine code of NVIDIA GPUs, as Triton's nvdisasm prints it: instructions, loops, and lints.

A lint says what is wrong in words that name the instructions. Each follows all paths through the code, so a wait at the
end of a loop's body meets the write at the beginning of the next round.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

WARPS_PER_WARPGROUP = 4

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s*(?:(@!?U?PT?\d*)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)")
_TARGET = re.compile(r"(?:^|[\s(])0x([0-9a-f]+)\)?$")
# what other warps read: a barrier's own words (SYNCS) are not data
_SHARED_WRITES = re.compile(r"(STS|STSM|STAS|LDGSTS|ATOMS|UTMALDG|UBLKCP\.S)(\.|$)")
_JUMPS = ("BRA", "JMP", "CALL")
# behind these nothing follows, where no predicate says otherwise
_LEAVES = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL")

State = TypeVar("State")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, the predicate it stands under (``@!P0``, or nothing), name and operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """Return the name without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def never(self) -> bool:
        """Say whether its predicate is the constant false: a filler."""
        return self.guard in ("@!PT", "@!UPT")

    @property
    def always(self) -> bool:
        """Say whether every thread that comes to it does it. A branch may have its condition behind its name too."""
        conditional = self.base in _LEAVES and (
            re.search(r"\bU?P\d", self.operands) or re.search(r"\.(DIV|CONV)\b", self.opcode)
        )
        return self.guard in ("", "@PT", "@UPT") and not conditional

    @property
    def target(self) -> int | None:
        """Return the address that a jump leads to, if that is known."""
        match = _TARGET.search(self.operands) if self.base in _JUMPS else None
        return int(match[1], 16) if match is not None else None

    def __str__(self) -> str:
        return f"{self.opcode} at {self.address:#06x}"


@dataclass(frozen=True)
class Function:
    """One function's instructions in the order of their addresses."""

    name: str
    code: tuple[Instruction, ...]


def parse(text: str) -> list[Function]:
    """Read what ``cuobjdump -sass`` or nvdisasm printed. Without a line ``Function :`` it is one without name."""
    functions: list[tuple[str, list[Instruction]]] = []
    for line in text.splitlines():
        header = _FUNCTION.match(line)
        if header is not None:
            functions.append((header[1], []))
            continue
        match = _INSTRUCTION.match(line)
        if match is not None:
            if not functions:
                functions.append(("", []))
            address, guard, opcode, operands = match.groups()
            functions[-1][1].append(Instruction(int(address, 16), guard or "", opcode, operands))
    return [Function(name, tuple(code)) for name, code in functions]


def machine_code(cubin: bytes) -> bytes:
    """Return the instructions of a cubin's functions. It is an ELF file with a section ``.text.NAME`` for each."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<3H", cubin, 0x3A)
    # of a section's header: its name's place among the names; its own place and length in the file
    sections = [struct.unpack_from("<I20xQQ", cubin, headers + number * size) for number in range(count)]
    names = sections[of_names][1]
    return b"".join(
        cubin[start : start + length] for name, start, length in sections if cubin[names + name :].startswith(b".text.")
    )


def disassemble(cubins: Sequence[bytes], capability: int, nvdisasm: str) -> list[Function]:
    """Return the code of cubins for one architecture. One call does all, as each begins with 0.3 s of its own tables.

    Addresses begin at 0 in each; the addresses that jumps name are moved as well, others (``BSSY``, ``RET``) are not.
    """
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(b"".join(codes))
        command = [nvdisasm, "--binary", f"SM{capability}", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout if any(codes) else ""
    parsed = [instruction for function in parse(text) for instruction in function.code]
    functions, place, start = [], 0, 0
    for code in codes:
        end, first = start + len(code), place
        while place < len(parsed) and parsed[place].address < end:
            place += 1
        functions.append(Function("", tuple(_moved(instruction, start) for instruction in parsed[first:place])))
        start = end
    if place < len(parsed) or not all(function.code for function in functions):
        raise ValueError(
            f"nvdisasm: expected the code of {len(cubins)} kernels, got {place} of {len(parsed)} instructions"
        )
    return functions


def _moved(instruction: Instruction, start: int) -> Instruction:
    operands, target = instruction.operands, instruction.target
    if target is not None:
        operands = f"{operands.rpartition('0x')[0]}{target - start:#x}" + (")" if operands.endswith(")") else "")
    return replace(instruction, address=instruction.address - start, operands=operands)


def successors(function: Function) -> list[list[int]]:
    """Return, for each instruction, the places in ``function.code`` that may be executed next."""
    places = {instruction.address: place for place, instruction in enumerate(function.code)}
    targets: list[list[int]] = []
    for place, instruction in enumerate(function.code):
        following: list[int] = []
        if not instruction.never and instruction.target in places:
            following.append(places[instruction.target])
        if place + 1 < len(function.code) and not (instruction.base in _LEAVES and instruction.always):
            following.append(place + 1)
        targets.append(following)
    return targets


def loops(function: Function) -> list[tuple[Instruction, ...]]:
    """Return the bodies of the loops, outer loops first. One lies between a branch back and its target."""
    code = function.code
    spans = {
        (target, place)
        for place, following in enumerate(successors(function))
        for target in following
        if target <= place and code[place].base != "CALL"
    }
    return [code[first : last + 1] for first, last in sorted(spans, key=lambda span: (span[0], -span[1]))]


def innermost(bodies: Sequence[tuple[Instruction, ...]]) -> list[tuple[Instruction, ...]]:
    """Return the loops that have no other loop within them."""
    spans = [(body[0].address, body[-1].address) for body in bodies]
    return [
        body
        for body, (first, last) in zip(bodies, spans, strict=True)
        if not any(other != (first, last) and first <= other[0] and other[1] <= last for other in spans)
    ]


def reach(
    following: Sequence[Sequence[int]], step: Callable[[int, frozenset[State]], frozenset[State]]
) -> list[frozenset[State]]:
    """Return what may be true before each place. ``step`` gives what is true after it, paths that meet are joined."""
    before: list[frozenset[State]] = [frozenset() for _ in following]
    todo = list(range(len(following)))[::-1]
    while todo:
        place = todo.pop()
        after = step(place, before[place])
        for target in following[place]:
            if not after <= before[target]:
                before[target] |= after
                todo.append(target)
    return before


def mixed_loops(function: Function) -> list[str]:
    """Name the loops with HMMA products beside wgmma (HGMMA). Such a loop makes ptxas serialise the latter."""
    names = []
    for body in innermost(loops(function)):
        bases = [instruction.base for instruction in body]
        if "HGMMA" in bases and "HMMA" in bases:
            count = f"{bases.count('HMMA')} HMMA beside {bases.count('HGMMA')} HGMMA"
            names.append(f"{count} in the loop at {body[0].address:#06x}")
    return names


def _is_barrier(instruction: Instruction, threads: int) -> bool:
    """Say whether every thread of the program waits there for all the others."""
    if instruction.base != "BAR" or not re.search(r"\.(SYNC|RED)\b", instruction.opcode) or not instruction.always:
        return False
    # without a number of threads it is for all of them; a reduction names a predicate there
    _, _, count = (operand.strip() for operand in instruction.operands.partition(","))
    if not count or re.match(r"!?U?P", count):
        return True
    return count.startswith("0x") and int(count.partition(",")[0], 16) >= threads


def missing_barriers(function: Function, warps: int) -> list[str]:
    """Name the writes to shared memory that may race with reads of wgmma. They follow a wait with no barrier of all
    warps between.

    A wait ends when the wgmma of its own warpgroup have read their operands. Another warpgroup of the program may still
    be reading the tile that the write replaces (Triton issue 11047, mended after 3.6 by pull request 11056). With one
    warpgroup that cannot be: a wgmma is one operation of four warps in step, which read B together, so a wait of any of
    them says it for all. The pull request draws the line there too (more than 4 warps), and so does CUTLASS, where one
    thread of a warpgroup gives a tile back right after its own wait. Which tile is written cannot be seen here: a write
    elsewhere is named as well, and a barrier before it costs little beside a wgmma.
    """
    if warps <= WARPS_PER_WARPGROUP:
        return []
    code = function.code

    def step(place: int, waits: frozenset[int]) -> frozenset[int]:
        instruction = code[place]
        if instruction.opcode.startswith("WARPGROUP.DEPBAR") and not instruction.never:
            return waits | {place}
        return frozenset() if _is_barrier(instruction, 32 * warps) else waits

    faults = []
    for place, waits in enumerate(reach(successors(function), step)):
        instruction = code[place]
        if waits and not instruction.never and _SHARED_WRITES.match(instruction.opcode):
            faults.append(f"{instruction} after {code[min(waits)]}")
    return faults
