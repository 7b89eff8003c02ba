"""Kernels with what the budget refuses on Hopper, and one without; compiled in a process of its own."""

import triton
import triton.language as tl


@triton.jit
def mixed_kernel(x_ptr, w_ptr, narrow_ptr, y_ptr, s_ptr, D, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """A product of 64 rows beside one of 16 in a loop."""
    i = tl.arange(0, BLOCK)
    r = tl.arange(0, 16)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    s = tl.zeros((16, BLOCK), dtype=tl.float32)
    for d0 in tl.range(0, D, BLOCK, num_stages=STAGES):
        d = d0 + i
        x = tl.load(x_ptr + i[None, :] * D + d[:, None])
        acc = tl.dot(tl.load(w_ptr + i[:, None] * D + d[None, :]), x, acc=acc)
        s = tl.dot(tl.load(narrow_ptr + r[:, None] * D + d[None, :]), x, acc=s)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], acc)
    tl.store(s_ptr + r[:, None] * BLOCK + i[None, :], s)


@triton.jit
def product_kernel(x_ptr, w_ptr, scale_ptr, y_ptr, D, SCALED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """A product whose left operand is made in registers, or comes as it is."""
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for d0 in tl.range(0, D, BLOCK, num_stages=STAGES):
        d = d0 + i
        x = tl.load(x_ptr + i[:, None] * D + d[None, :])
        if SCALED:
            x = x * tl.load(scale_ptr + d)[None, :]
        acc = tl.dot(x, tl.load(w_ptr + i[None, :] * D + d[:, None]), acc=acc)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], acc)


@triton.jit
def two_loops_kernel(x_ptr, w_ptr, core_ptr, y_ptr, t_ptr, D, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Two loops of products: with two warpgroups, one writes the second's stages while the other reads the first's."""
    i = tl.arange(0, BLOCK)
    r = tl.arange(0, 16)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    s = tl.zeros((BLOCK, 16), dtype=tl.float32)
    for d0 in tl.range(0, D, 64, num_stages=STAGES):
        d = d0 + tl.arange(0, 64)
        x = tl.load(x_ptr + i[:, None] * D + d[None, :])
        acc = tl.dot(x, tl.load(w_ptr + i[None, :] * D + d[:, None]), acc=acc)
        s = tl.dot(x, tl.load(w_ptr + r[None, :] * D + d[:, None]), acc=s)
    t = tl.zeros((BLOCK, 16), dtype=tl.float32)
    for k in tl.range(0, 8, num_stages=STAGES):
        core = tl.load(core_ptr + k * 256 + r[:, None] + r[None, :] * 16).to(tl.float32)
        t = tl.dot(s, core, acc=t, input_precision="tf32x3")
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], acc)
    tl.store(t_ptr + i[:, None] * 16 + r[None, :], t)
