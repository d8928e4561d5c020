"""Recompute of a block of sublayers: x_l and u_l of every one from the block's first x and the y.

Nothing is projected again: H_pre, H_post and H_res of each sublayer (24 numbers a token at n = 4)
are kept from the forward, so there is no sum over channels, a tile of x stays in registers from
the first sublayer to the last, and a sublayer costs one y read and x, u written: (n + 2) C
elements a token.
"""

import triton
import triton.language as tl

from .device import load_columns, wait_for_inputs
from .post_pre import mix


@triton.jit(do_not_specialize=["T"])
def refill_kernel(
    x_ptr,
    y_ptrs,
    H_post_ptrs,
    H_res_ptrs,
    H_pre_ptrs,
    x_next_ptrs,
    u_ptrs,
    T,
    L: tl.constexpr,
    n: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    RES: tl.constexpr,
    PDL: tl.constexpr,
):
    """L sublayers for one tile [BT, BC] of every stream; the ``_ptrs`` are tuples of L tensors."""
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
    for layer in tl.static_range(L):
        y = tl.load(y_ptrs[layer] + at_u, mask=inside, other=0.0).to(tl.float32)
        H_post = load_columns(H_post_ptrs[layer], rows, n, 0, n, mask)
        H_pre = load_columns(H_pre_ptrs[layer], rows, n, 0, n, mask)
        H_res = ()
        if RES:
            H_res = load_columns(H_res_ptrs[layer], rows, n * n, 0, n * n, mask)
        u = tl.zeros([BT, BC], tl.float32)
        following = ()
        for o in tl.static_range(n):
            # Rounded as the forward stored it: the refilled x_l is the same to the bit.
            out = mix(x, y, H_res, H_post, o, n, RES).to(x_next_ptrs[layer].dtype.element_ty)
            tl.store(x_next_ptrs[layer] + at + o * C, out, mask=inside)
            following = following + (out.to(tl.float32),)
            u += H_pre[o][:, None] * following[o]
        tl.store(u_ptrs[layer] + at_u, u.to(u_ptrs[layer].dtype.element_ty), mask=inside)
        x = following
