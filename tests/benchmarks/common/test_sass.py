"""Machine code written by hand: how it is read, where it leads, and what each lint says of it and does not say."""

import struct

import pytest

from benchmarks.common import sass


def function(*lines: str) -> sass.Function:
    """Code as cuobjdump prints it, 16 bytes an instruction; ``label:`` stands for the address of what follows."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(instructions)
        else:
            instructions.append(line)
    text = ["\t\tFunction : hand_written", '\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_64BIT_ADDRESS"']
    for place, instruction in enumerate(instructions):
        for label, address in labels.items():
            instruction = instruction.replace(f"<{label}>", f"{address:#x}")
        text.append(f"        /*{16 * place:04x}*/{instruction:>60} ;   /* 0x000000041d007388 */")
        text.append("                                                       /* 0x000fe20000000000 */")
    (parsed,) = sass.parse("\n".join(text))
    return parsed


WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"
WRITE = "LDGSTS.E.BYPASS.128 [R93], desc[UR16][R96.64], P6"
PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12].tnspA.tnspB, R24, gsb0"


def missing(*lines: str, warps: int = 8) -> list[str]:
    return sass.missing_barriers(function(*lines), warps)


def test_instructions_are_read() -> None:
    code = function("@!P5 BRA <end>", "@P0 STS.128 [R22+UR4], R4", PRODUCT, "@!PT LDS RZ, [RZ]", "end:", "EXIT").code
    assert [i.address for i in code] == [0, 16, 32, 48, 64]
    assert [i.guard for i in code] == ["@!P5", "@P0", "", "@!PT", ""]
    assert [i.base for i in code] == ["BRA", "STS", "HGMMA", "LDS", "EXIT"]
    assert code[1].operands == "[R22+UR4], R4"
    assert code[0].target == 64 and code[1].target is None
    assert [i.never for i in code] == [False, False, False, True, False]
    assert [i.always for i in code] == [False, False, True, False, True]
    assert str(code[1]) == "STS.128 at 0x0010"


def test_several_functions_and_code_without_a_header() -> None:
    line = "        /*0000*/                   EXIT ;      /* 0x000000000000794d */"
    assert [f.name for f in sass.parse(f"\t\tFunction : one\n{line}\n\t\tFunction : two\n{line}\n{line}")] == [
        "one",
        "two",
    ]
    (bare,) = sass.parse(line)
    assert bare.name == "" and bare.code[0].opcode == "EXIT"
    assert sass.parse("") == []


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        ("BRA <end>", [2]),
        ("@P0 BRA <end>", [2, 1]),
        ("@PT BRA <end>", [2]),
        ("@!PT BRA <end>", [1]),
        ("BRA P1, <end>", [2, 1]),
        ("BRA.U !UP0, <end>", [2, 1]),
        ("BRA.DIV UR4, <end>", [2, 1]),
        ("CALL.REL.NOINC <end>", [2, 1]),
        ("EXIT", []),
        ("@P3 EXIT", [1]),
        ("RET.REL.NODEC R4 0x0", []),
        ("BRX R4 -0x20", []),
        ("BSYNC B0", [1]),
    ],
)
def test_where_an_instruction_leads(branch: str, expected: list[int]) -> None:
    assert sass.successors(function(branch, "NOP", "end:", "EXIT"))[0] == expected


def test_loops_and_the_innermost_of_them() -> None:
    nested = function(
        "MOV R1, R2", "outer:", "NOP", "inner:", "FFMA R1, R1, R1, R1", "@P0 BRA <inner>", "@P1 BRA <outer>", "EXIT"
    )
    bodies = sass.loops(nested)
    assert [(body[0].address, body[-1].address) for body in bodies] == [(16, 64), (32, 48)]
    assert sass.innermost(bodies) == [bodies[1]]
    # a jump forward and a call of code that lies before are none
    assert sass.loops(function("there:", "NOP", "CALL.REL.NOINC <there>", "BRA <end>", "end:", "EXIT")) == []


def test_a_write_behind_a_wait_needs_a_barrier() -> None:
    assert missing(PRODUCT, WAIT, WRITE) == ["LDGSTS.E.BYPASS.128 at 0x0020 after WARPGROUP.DEPBAR.LE at 0x0010"]
    assert missing(PRODUCT, WAIT, BARRIER, WRITE) == []
    # a barrier before the wait says nothing of the products that it waits for
    assert len(missing(PRODUCT, BARRIER, WAIT, WRITE)) == 1
    assert missing(WRITE, PRODUCT, WAIT) == []


def test_one_warpgroup_needs_none() -> None:
    assert missing(PRODUCT, WAIT, WRITE, warps=4) == []
    assert missing(PRODUCT, WAIT, WRITE, warps=1) == []
    assert len(missing(PRODUCT, WAIT, WRITE, warps=16)) == 1


@pytest.mark.parametrize(
    "write", ["STS [R1], R2", "STS.128 [R1+UR4], R4", "STSM.16.M88.4 [R1], R4", "ATOMS.ADD R1, [R2], R3", WRITE,
              "UTMALDG.2D [UR8], [UR4], desc[UR6]", "UBLKCP.S.G [UR4], [UR6], UR8"],
)  # fmt: skip
def test_every_write_to_shared_memory_counts(write: str) -> None:
    assert len(missing(PRODUCT, WAIT, write)) == 1
    assert len(missing(PRODUCT, WAIT, f"@P1 {write}")) == 1
    assert missing(PRODUCT, WAIT, f"@!PT {write}") == []


@pytest.mark.parametrize(
    "other", ["LDS.128 R4, [R1]", "STG.E [R2.64], R4", "UTMASTG.2D [UR4], [UR8]", "UBLKCP.G.S [UR4], [UR6], UR8",
              "SYNCS.ARRIVE.TRANS64 RZ, [UR4], RZ", "LDSM.16.M88.4 R4, [R1]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1"],
)  # fmt: skip
def test_what_does_not_write_there_does_not(other: str) -> None:
    assert missing(PRODUCT, WAIT, other) == []
    # nor is it a barrier
    assert len(missing(PRODUCT, WAIT, other, WRITE)) == 1


@pytest.mark.parametrize(
    ("barrier", "faults"),
    [
        ("BAR.SYNC 0x0", 0),
        ("BAR.SYNC.DEFER_BLOCKING R7", 0),
        ("BAR.RED.POPC.DEFER_BLOCKING 0x0, PT", 0),
        ("@PT BAR.SYNC.DEFER_BLOCKING 0x0", 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x1, 0x100", 0),
        # of half the warps, of a number not known, under a condition, and one that does not wait
        ("BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", 1),
        ("BAR.SYNC.DEFER_BLOCKING 0x1, R4", 1),
        ("@P0 BAR.SYNC.DEFER_BLOCKING 0x0", 1),
        ("@!PT BAR.SYNC.DEFER_BLOCKING 0x0", 1),
        ("BAR.ARV 0x0, 0x100", 1),
        ("WARPSYNC.ALL", 1),
        ("MEMBAR.ALL.CTA", 1),
    ],
)
def test_what_is_a_barrier_of_all_warps(barrier: str, faults: int) -> None:
    assert len(missing(PRODUCT, WAIT, barrier, WRITE)) == faults


def test_a_wait_that_is_predicated_counts_and_a_filler_does_not() -> None:
    assert len(missing(f"@P0 {WAIT}", WRITE)) == 1
    assert missing(f"@!PT {WAIT}", WRITE) == []


def test_the_next_round_of_a_loop_is_looked_at() -> None:
    at_the_end = ("top:", WRITE, PRODUCT, WAIT, "@P0 BRA <top>", "EXIT")
    assert missing(*at_the_end) == ["LDGSTS.E.BYPASS.128 at 0x0000 after WARPGROUP.DEPBAR.LE at 0x0020"]
    assert missing("top:", BARRIER, *at_the_end[1:]) == []
    # the loop runs once: nothing comes round
    assert missing(*at_the_end[:-2], "EXIT") == []


def test_nested_loops_and_branches() -> None:
    # the wait ends the inner loop, the write begins the outer one
    outer = ("outer:", WRITE, "inner:", BARRIER, PRODUCT, WAIT, "@P0 BRA <inner>", "@P1 BRA <outer>", "EXIT")
    assert len(missing(*outer)) == 1
    assert missing(*outer[:-2], BARRIER, *outer[-2:]) == []
    # a barrier on one of two ways is none
    assert len(missing(PRODUCT, WAIT, "@P0 BRA <end>", BARRIER, "end:", WRITE, "EXIT")) == 1
    assert missing(PRODUCT, WAIT, "@P0 BRA <other>", BARRIER, "BRA <end>", "other:", BARRIER, "end:", WRITE) == []
    # and a wait on a way that never comes to the write
    assert missing("@P0 BRA <end>", PRODUCT, WAIT, "EXIT", "end:", WRITE, "EXIT") == []


def test_products_of_a_warp_beside_wgmma() -> None:
    beside = function("top:", PRODUCT, "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA <top>", "EXIT")
    assert sass.mixed_loops(beside) == ["1 HMMA beside 1 HGMMA in the loop at 0x0000"]
    apart = function(
        "one:", PRODUCT, "@P0 BRA <one>", "two:", "HMMA.1688.F32.TF32 R4, R8, R12, R4", "@P1 BRA <two>", "EXIT"
    )
    assert sass.mixed_loops(apart) == []


def test_a_file_without_code_is_not_passed_over() -> None:
    header = struct.pack("<16x24xQ10xHHH", 64, 64, 1, 0)
    cubin = header.ljust(64, b"\0") + struct.pack("<I20xQQ24x", 0, 64, 0)
    assert sass.machine_code(cubin) == b""
    with pytest.raises(ValueError, match="expected the code of 1 kernels, got"):
        sass.disassemble([cubin], 90, "nothing is run")
    assert sass.disassemble([], 90, "nothing is run") == []
