"""Device functions that several kernels share: tuples of per-token coefficients, H from logits.

A tile of tokens is worked on as n separate [BT, BC] tensors, one a stream, so that every load,
product and store of a stream keeps one register layout; the coefficients that mix them are tuples
of [BT] vectors. Tuples grow in ``tl.static_range`` loops and are gone after compilation.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Programmatic dependent launch: wait for the kernel before, then let the next one start.

    Every kernel waits before it reads anything, so whatever ran earlier has finished too.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def load_columns(ptr, rows, stride: tl.constexpr, first: tl.constexpr, count: tl.constexpr, mask):
    """``count`` columns of a row-major [T, stride] array as a tuple of [BT] vectors."""
    columns = ()
    for k in tl.static_range(count):
        columns = columns + (tl.load(ptr + rows * stride + (first + k), mask=mask, other=0.0),)
    return columns


@triton.jit
def zeros_tuple(count: tl.constexpr, BT: tl.constexpr, W: tl.constexpr):
    """``count`` accumulators [BT, W]."""
    out = ()
    for _ in tl.static_range(count):
        out = out + (tl.zeros([BT, W], tl.float32),)
    return out


@triton.jit
def pin(x, PIN: tl.constexpr):
    """x itself, opaque to the compiler: its arithmetic is not repeated for every use."""
    if PIN:
        if x.dtype == tl.float32:
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 1)
        else:
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 2)
    return x


@triton.jit
def dot(a, b, acc):
    """acc + a b with float32 sums: half-precision operands as they are, float32 as 3 x tf32."""
    if INTERPRETED:
        # The interpreter multiplies bfloat16's bits.
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def fold(x, BT: tl.constexpr, BC: tl.constexpr):
    """[BT, BC] -> [BT, 4]: sums inside a thread for the matrix units' output layout.

    There four neighbouring lanes share a row and hold two adjacent columns of every eight, so
    axes 1 and 3 of the view below lie inside a thread and the sum needs no exchange.
    """
    return tl.sum(tl.sum(tl.reshape(x, [BT, BC // 8, 4, 2]), axis=3), axis=1)


@triton.jit
def column_of(x, i: tl.constexpr, n: tl.constexpr):
    """Column i of [BT, n] as [BT]."""
    return tl.sum(tl.where(tl.arange(0, n)[None, :] == i, x, 0.0), axis=1)


@triton.jit
def sum_parts(ptr, offsets, parts, stride, mask):
    """Sum over the first axis of a [parts, ...] array with ``stride`` elements a part, in order."""
    total = tl.load(ptr + offsets, mask=mask, other=0.0)
    for s in range(1, parts):
        total += tl.load(ptr + s * stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def sum_few_parts(ptr, offsets, parts, stride, mask, MOST: tl.constexpr = 8):
    """``sum_parts`` of at most MOST parts, with all loads on their way at once."""
    total = tl.load(ptr + offsets, mask=mask, other=0.0)
    for s in tl.static_range(1, MOST):
        total += tl.load(ptr + s * stride + offsets, mask=mask & (s < parts), other=0.0)
    return total


@triton.jit
def arrive(counter_ptr):
    """Counts this block, after its stores; the blocks that counted before it, before its loads.

    The last of several blocks adds what all of them stored, in a fixed order: the sums do not
    depend on which one it is. Counters are cleared by a kernel earlier in the same backward.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def sinkhorn(logits, ITERATIONS: tl.constexpr):
    """Eq. (9) on [BT, n, n]."""
    m = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    for _ in range(ITERATIONS):
        m = m * (1.0 / tl.sum(m, axis=1, keep_dims=True))
        m = m * (1.0 / tl.sum(m, axis=2, keep_dims=True))
    return m


@triton.jit
def sinkhorn_grad(logits, dH, ITERATIONS: tl.constexpr):
    """Gradient of ``sinkhorn`` with respect to the logits, [BT, n, n].

    m = p / sum(p) has the adjoint dp = (dm - sum(dm m)) / sum(p). The forward is run again and only
    its sums kept, one register each; going back, a matrix before a normalisation is the one after
    it times the sum.
    """
    m = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    sums = ()
    for _ in tl.static_range(ITERATIONS):
        columns = tl.sum(m, axis=1, keep_dims=True)
        m = m * (1.0 / columns)
        rows = tl.sum(m, axis=2, keep_dims=True)
        m = m * (1.0 / rows)
        sums = sums + (columns, rows)
    for t in tl.static_range(ITERATIONS, 0, -1):
        dH = (dH - tl.sum(dH * m, axis=2, keep_dims=True)) * (1.0 / sums[2 * t - 1])
        m = m * sums[2 * t - 1]
        dH = (dH - tl.sum(dH * m, axis=1, keep_dims=True)) * (1.0 / sums[2 * t - 2])
        m = m * sums[2 * t - 2]
    return dH * m
