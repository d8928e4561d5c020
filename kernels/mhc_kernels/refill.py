"""Recompute of a block of sublayers: x_l and u_l of every one from the block's first x and the y.

Nothing is projected again: H_pre, H_post and H_res of each sublayer (24 numbers a token at n = 4)
are kept from the forward, so there is no sum over channels, a tile of x stays in registers from
the first sublayer to the last, and a sublayer costs one y read and x, u written: (n + 2) C
elements a token. The arithmetic and its order are the forward's (``post_pre.mix``,
``pre.read_kernel``): x_l and u_l come out the same to the bit.
"""

import triton
import triton.language as tl

from .device import load_columns, wait_for_inputs
from .post_pre import mix
from .relaunch import relaunched


@relaunched
@triton.jit(do_not_specialize=["T"])
def refill_kernel(
    x_ptr,
    y_ptrs,
    y_bias_ptrs,
    H_post_ptrs,
    H_res_ptrs,
    H_pre_ptrs,
    norm_weight_ptrs,
    x_next_ptrs,
    u_ptrs,
    T,
    L: tl.constexpr,
    FIRST: tl.constexpr,
    n: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    RES: tl.constexpr,
    Y_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """L boundaries for one tile [BT, BC] of every stream; the ``_ptrs`` are tuples of tensors.

    FIRST is 1 where H_pre_ptrs and u_ptrs have an entry more: the read of x itself comes first.
    Bit l of Y_BIAS says that sublayer l's y has a bias (y_bias_ptrs[l], else unused), bit l of NORM
    that read l is normed: its H_pre carries 1 / rms, norm_weight_ptrs[l] the weight.
    """
    wait_for_inputs(PDL)
    rows = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    mask = rows < T
    inside = mask[:, None]
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    at = rows[:, None] * (n * C) + channels[None, :]
    at_u = rows[:, None] * C + channels[None, :]
    x = ()
    for i in tl.static_range(n):
        x = x + (tl.load(x_ptr + at + i * C, mask=inside, other=0.0).to(tl.float32),)
    if FIRST:
        write_read(
            x, H_pre_ptrs[0], norm_weight_ptrs[0], u_ptrs[0], rows, channels, at_u, mask, n, BT, BC,
            NORM & 1,
        )  # fmt: skip
    for layer in tl.static_range(L):
        y = tl.load(y_ptrs[layer] + at_u, mask=inside, other=0.0).to(tl.float32)
        if (Y_BIAS >> layer) & 1:
            y += tl.load(y_bias_ptrs[layer] + channels).to(tl.float32)[None, :]
        H_post = load_columns(H_post_ptrs[layer], rows, n, 0, n, mask)
        H_res = ()
        if RES:
            H_res = load_columns(H_res_ptrs[layer], rows, n * n, 0, n * n, mask)
        following = ()
        for o in tl.static_range(n):
            # Rounded as the forward stored it.
            out = mix(x, y, H_res, H_post, o, n, RES).to(x_next_ptrs[layer].dtype.element_ty)
            tl.store(x_next_ptrs[layer] + at + o * C, out, mask=inside)
            following = following + (out.to(tl.float32),)
        x = following
        write_read(
            x, H_pre_ptrs[layer + FIRST], norm_weight_ptrs[layer + FIRST], u_ptrs[layer + FIRST],
            rows, channels, at_u, mask, n, BT, BC, (NORM >> (layer + FIRST)) & 1,
        )  # fmt: skip


@triton.jit
def write_read(
    x, H_pre_ptr, norm_weight_ptr, u_ptr, rows, channels, at_u, mask,
    n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """u = H_pre x of a tile (NORM: times the norm's weight), to memory."""
    H_pre = load_columns(H_pre_ptr, rows, n, 0, n, mask)
    u = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(n):
        u = tl.fma(H_pre[i][:, None], x[i], u)
    if NORM:
        u *= tl.load(norm_weight_ptr + channels).to(tl.float32)[None, :]
    tl.store(u_ptr + at_u, u.to(u_ptr.dtype.element_ty), mask=mask[:, None])
