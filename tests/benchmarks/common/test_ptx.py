"""PTX written by hand, and what ptxas prints: the lints of wgmma that are read from them."""

from benchmarks.common import ptx

IN_REGISTERS = (
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r686,%r687}, {%r1,%r2,%r3,%r4}, %rd196, %p20, 1, 1, 0;"
)
IN_MEMORY = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r686,%r687}, %rd195, %rd196, %p20, 1, 1, 0, 1;"
COMMIT = "wgmma.commit_group.sync.aligned;"
HEAD = (".version 8.6", ".target sm_90a", ".visible .entry kernel(", "\t.param .u64 kernel_param_0", ")", "{",
        "\t.reg .b32 \t%r<719>;")  # fmt: skip


def wait(pending: int) -> str:
    return f"// wait for regs: %r686\n\twgmma.wait_group.sync.aligned {pending};"


def pending(*lines: str) -> list[str]:
    return ptx.pending_operands("\n".join((*HEAD, *lines, "ret;", "}")))


def test_statements_are_read() -> None:
    statements, labels = ptx.parse(
        "\n".join((*HEAD, "$L__BB0_3:   // header", "@!%p21 bra $L__BB0_3;", "{ .reg .pred p; setp.ne.b32 p, %r1, 0;",
                   "@p mov.b32 %r1, 0; }", "call.uni (retval0),", "f,", "(", "param0", ");", ".loc 1 2 3", "ret; }"))
    )  # fmt: skip
    assert [s.text for s in statements] == [
        "bra $L__BB0_3",
        ".reg .pred p",
        "setp.ne.b32 p, %r1, 0",
        "mov.b32 %r1, 0",
        "call.uni (retval0), f, ( param0 )",
        "ret",
    ]
    assert [s.guard for s in statements] == ["@!%p21", "", "", "@p", "", ""]
    assert labels == {"$L__BB0_3": 0}
    assert statements[0].line == 9


def test_a_product_waited_for_at_once_is_complete() -> None:
    assert pending(IN_REGISTERS, IN_REGISTERS, COMMIT, wait(0), "mov.b32 %r1, 0;") == []


def test_a_register_operand_behind_a_wait_with_some_pending() -> None:
    assert pending(IN_REGISTERS, COMMIT, wait(1)) == ["wgmma in line 8 pending behind wait_group 1 in line 11"]
    # the same product from shared memory may stay
    assert pending(IN_MEMORY, COMMIT, wait(1)) == []
    # two groups came after it: a wait for all but those two is one for it
    assert pending(IN_REGISTERS, COMMIT, IN_MEMORY, COMMIT, IN_MEMORY, COMMIT, wait(2)) == []
    assert len(pending(IN_MEMORY, COMMIT, IN_REGISTERS, COMMIT, IN_MEMORY, COMMIT, wait(2))) == 1


def test_registers_that_change_before_the_wait() -> None:
    changed = pending(IN_REGISTERS, COMMIT, "mov.b32 \t%r2, %r9;", wait(0))
    assert changed == ["wgmma in line 8 pending behind a change of its registers in line 10"]
    assert pending(IN_REGISTERS, COMMIT, "mov.b32 %r9, %r2;", "st.global.b32 [%rd1], %r2;", wait(0)) == []
    # under a predicate, in one of many results, and before the group is closed
    assert len(pending(IN_REGISTERS, COMMIT, "@%p1 mov.b32 %r2, %r9;", wait(0))) == 1
    assert len(pending(IN_REGISTERS, COMMIT, "ld.shared.v4.b32 {%r7, %r8, %r3, %r9}, [%r10];", wait(0))) == 1
    assert len(pending(IN_REGISTERS, "add.s32 %r4, %r4, 1;", COMMIT, wait(0))) == 1


def test_the_next_round_of_a_loop() -> None:
    loop = ("$L1:", "ld.shared.b32 %r1, [%r9];", IN_REGISTERS, COMMIT, "@%p1 bra $L1;", wait(0))
    assert pending(*loop) == ["wgmma in line 10 pending behind a change of its registers in line 9"]
    assert pending(*loop[:4], wait(0), *loop[4:]) == []
    # two products a round with one left pending, as a pipelined loop has them
    round_ = (IN_REGISTERS, COMMIT, wait(1), IN_REGISTERS, COMMIT, wait(1))
    assert len(pending("$L1:", *round_, "@%p1 bra $L1;", wait(0))) == 2
    # a loop that nothing leaves through a wait ends the search all the same
    assert len(pending("$L1:", IN_REGISTERS, COMMIT, IN_MEMORY, COMMIT, "bra.uni $L1;")) == 0


def test_nested_loops_and_ways_apart() -> None:
    inner = ("$L2:", IN_MEMORY, COMMIT, wait(1), "@%p1 bra $L2;")
    assert len(pending("$L1:", IN_REGISTERS, COMMIT, *inner, "mov.b32 %r1, %r2;", "@%p2 bra $L1;")) == 0
    assert len(pending("$L1:", IN_REGISTERS, COMMIT, "mov.b32 %r1, %r2;", *inner, "@%p2 bra $L1;")) == 1
    # the wait stands on one of two ways only
    assert len(pending(IN_REGISTERS, COMMIT, "@%p1 bra $L3;", wait(0), "$L3:", "mov.b32 %r1, 0;")) == 1
    assert pending(IN_REGISTERS, COMMIT, wait(0), "@%p1 bra $L3;", "ret;", "$L3:", "mov.b32 %r1, 0;") == []


def test_code_without_wgmma() -> None:
    assert pending("mov.b32 %r1, 0;") == []
    assert ptx.pending_operands("") == []


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function 'k'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to wgmma pipeline \
crossing function boundary at a function call in the function 'k' in line 12
ptxas info    : Compiling entry function 'k' for 'sm_90a'
"""


def test_what_ptxas_says_of_serialised_products() -> None:
    assert ptx.serialised(LOG + LOG) == [
        "C7515: non wgmma instructions defining accumulator registers of a wgmma "
        "between start and end of the pipeline stage",
        "C7510: wgmma pipeline crossing function boundary at a function call",
    ]
    insufficient = (
        "(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient "
    )
    assert ptx.serialised(f"ptxas info : {insufficient}register resources for the function 'k'") == [
        "C7512: insufficient register resources"
    ]
    assert ptx.serialised("ptxas info    : Used 194 registers, used 1 barriers") == []
