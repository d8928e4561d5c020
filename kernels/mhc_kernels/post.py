"""F_post,res, Eq. (3): x_next = H_res x + H_post (y + y_bias), one pass over x and y.

Its backward is ``post_pre.boundary_grad_kernel`` without a pre.
"""

import triton
import triton.language as tl

from .device import load_columns, wait_for_inputs
from .post_pre import mix
from .relaunch import relaunched


@relaunched
@triton.jit(do_not_specialize=["T"])
def post_kernel(
    x_ptr,
    y_ptr,
    x_next_ptr,
    y_bias_ptr,
    H_post_ptr,
    H_res_ptr,
    T,
    n: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    RES: tl.constexpr,
    Y_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile [BT, BC] of every stream: (2n + 1) C elements a token, the floor."""
    wait_for_inputs(PDL)
    rows = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    mask = rows < T
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    H_post = load_columns(H_post_ptr, rows, n, 0, n, mask)
    H_res = ()
    if RES:
        H_res = load_columns(H_res_ptr, rows, n * n, 0, n * n, mask)
    y = tl.load(y_ptr + rows[:, None] * C + channels[None, :], mask=mask[:, None], other=0.0)
    y = y.to(tl.float32)
    if Y_BIAS:
        y += tl.load(y_bias_ptr + channels).to(tl.float32)[None, :]
    at = rows[:, None] * (n * C) + channels[None, :]
    x = ()
    for i in tl.static_range(n):
        x = x + (tl.load(x_ptr + at + i * C, mask=mask[:, None], other=0.0).to(tl.float32),)
    for o in tl.static_range(n):
        out = mix(x, y, H_res, H_post, o, n, RES)
        tl.store(x_next_ptr + at + o * C, out.to(x_next_ptr.dtype.element_ty), mask=mask[:, None])
