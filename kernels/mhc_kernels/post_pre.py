"""The boundary between two sublayers: post of one and pre of the next.

Forward, two kernels:

1. ``post_project_kernel``: x_next = H_res x + H_post y, written once, and while it is in registers
   its projection on phi and its squares. A block owns a tile of tokens and a part of the
   channels; the parts' sums are added in order by the next kernel.
2. ``pre.read_kernel``: H from the sums, u = H_pre x_next.

Backward, four (``pre.read_grad_kernel``, ``coefficients.coefficients_grad_kernel``,
``pre.phi_grad_kernel`` and, last, ``boundary_grad_kernel`` here): with G the whole gradient of
x_next, ::

    G[o]  = g[o] + H_pre[o] du + sum_k w[k] phi[k, o] + norm x_next[o]
    dx[i] = sum_o H_res[o, i] G[o]          dy = sum_o H_post[o] G[o]
    dH_res[o, i] = G[o] . x[i]              dH_post[o] = G[o] . y

x_next is made again from x and y, G never leaves the registers.
"""

import triton
import triton.language as tl

from .device import arrive, dot, fold, load_columns, pin, sum_parts, wait_for_inputs, zeros_tuple
from .relaunch import relaunched


@triton.jit
def mix(x, y, H_res, H_post, o: tl.constexpr, n: tl.constexpr, RES: tl.constexpr):
    """Stream o of H_res x + H_post y; x a tuple of n tiles, H_res [n*n] and H_post [n] of [BT].

    Fused multiply-adds by name: of a b + c d the compiler may fuse either product, and a refill
    must give the forward's bits.
    """
    if RES:
        out = H_post[o][:, None] * y
        for i in tl.static_range(n):
            out = tl.fma(H_res[o * n + i][:, None], x[i], out)
    else:
        out = tl.fma(H_post[o][:, None], y, x[o])
    return out


@triton.jit
def load_tiles(desc, t0, c0, n: tl.constexpr, C: tl.constexpr):
    """Tile [BT, BC] of every stream, as a tuple, in float32."""
    tiles = ()
    for i in tl.static_range(n):
        tiles = tiles + (desc.load([t0, i * C + c0]).to(tl.float32),)
    return tiles


@triton.jit
def load_y(y_desc, y_bias_ptr, t0, c0, BC: tl.constexpr, Y_BIAS: tl.constexpr):
    y = y_desc.load([t0, c0]).to(tl.float32)
    if Y_BIAS:
        y += tl.load(y_bias_ptr + c0 + tl.arange(0, BC)).to(tl.float32)[None, :]
    return y


@triton.jit
def store_gram(gram_ptr, sums, rows, row0, n: tl.constexpr, GRAM: tl.constexpr, mask):
    """The sums of products of streams: x_i . x_j for i <= j, or only the total of squares."""
    count: tl.constexpr = n * (n + 1) // 2 if GRAM else 1
    for k in tl.static_range(count):
        tl.store(gram_ptr + (row0 + rows) * count + k, tl.sum(sums[k], axis=1), mask=mask)


@relaunched
@triton.jit(do_not_specialize=["T", "per_part"])
def post_project_kernel(
    x_desc, y_desc, x_next_desc, phi_desc, y_bias_ptr, H_post_ptr, H_res_ptr, projected_ptr,
    gram_ptr, T, per_part, n: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, POST: tl.constexpr, RES: tl.constexpr, Y_BIAS: tl.constexpr,
    GRAM: tl.constexpr, SPLIT: tl.constexpr, PIN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x_next of a tile (POST; else x is x_next), phi's products and the streams' squares.

    projected [parts, T, KP] and gram [parts, T, 1 or n(n+1)/2] get this block's share of the
    channels: blocks of BC channels from per_part * program_id(1). SPLIT: phi as bf16 (or fp16) high
    and low halves side by side, exact for a stream of that type to 2^-17; else float32 operands.
    """
    wait_for_inputs(PDL)
    t0 = tl.program_id(0) * BT
    part = tl.program_id(1)
    rows = (t0 + tl.arange(0, BT)).to(tl.int64)
    mask = rows < T
    width: tl.constexpr = 2 * KP if SPLIT else KP
    H_post = ()
    H_res = ()
    if POST:
        H_post = load_columns(H_post_ptr, rows, n, 0, n, mask)
        if RES:
            H_res = load_columns(H_res_ptr, rows, n * n, 0, n * n, mask)
    acc = tl.zeros([BT, width], tl.float32)
    sums = zeros_tuple(n * (n + 1) // 2 if GRAM else 1, BT, 4)
    for chunk in tl.range(
        part * per_part, min((part + 1) * per_part, C // BC), num_stages=STAGES
    ):
        c0 = chunk * BC
        streams = ()
        if POST:
            x = load_tiles(x_desc, t0, c0, n, C)
            y = load_y(y_desc, y_bias_ptr, t0, c0, BC, Y_BIAS)
            for o in tl.static_range(n):
                out = pin(mix(x, y, H_res, H_post, o, n, RES).to(x_next_desc.dtype), PIN)
                x_next_desc.store([t0, o * C + c0], out)
                streams = streams + (out,)
        else:
            for o in tl.static_range(n):
                streams = streams + (x_desc.load([t0, o * C + c0]),)
        for o in tl.static_range(n):
            if SPLIT:
                phi = tl.reshape(phi_desc.load([0, 0, o * C + c0]), [width, BC])
                acc = dot(streams[o], phi.T, acc)
            else:
                phi = phi_desc.load([0, o * C + c0])
                acc = dot(streams[o].to(tl.float32), phi.T, acc)
        sums = add_products(sums, streams, n, BT, BC, GRAM)
    if SPLIT:
        projected = tl.sum(tl.reshape(acc, [BT, 2, KP]), axis=1)
    else:
        projected = acc
    offsets = (part * T + rows)[:, None] * KP + tl.arange(0, KP)[None, :]
    tl.store(projected_ptr + offsets, projected, mask=mask[:, None])
    store_gram(gram_ptr, sums, rows, part.to(tl.int64) * T, n, GRAM, mask)


@triton.jit
def add_products(
    sums, streams, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, GRAM: tl.constexpr
):
    """Adds this block of channels to the sums of ``store_gram``."""
    out = ()
    if GRAM:
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                if j >= i:
                    product = streams[i].to(tl.float32) * streams[j].to(tl.float32)
                    out = out + (sums[i * n - i * (i - 1) // 2 + j - i] + fold(product, BT, BC),)
    else:
        square = tl.zeros([BT, BC], tl.float32)
        for i in tl.static_range(n):
            wide = streams[i].to(tl.float32)
            square += wide * wide
        out = (sums[0] + fold(square, BT, BC),)
    return out


@triton.jit
def phi_gradient(
    w_hi, w_lo, phi_desc, column, acc, KP: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr
):
    """acc + w phi for BC columns. SPLIT: both as bf16 high and low parts, without low times low."""
    if SPLIT:
        hi = tl.reshape(phi_desc.load([0, 0, column]), [KP, BC])
        lo = tl.reshape(phi_desc.load([1, 0, column]), [KP, BC])
        acc = dot(w_hi, hi, acc)
        acc = dot(w_lo, hi, acc)
        acc = dot(w_hi, lo, acc)
    else:
        acc = dot(w_hi, phi_desc.load([0, column]), acc)
    return acc


@triton.jit
def load_w(w_ptr, rows, mask, KP: tl.constexpr, SPLIT: tl.constexpr):
    """w [BT, KP]: the projection's gradient times 1 / rms, as (high, low) when SPLIT."""
    width: tl.constexpr = 2 * KP if SPLIT else KP
    offsets = rows[:, None] * width + tl.arange(0, KP)[None, :]
    hi = tl.load(w_ptr + offsets, mask=mask[:, None], other=0.0)
    lo = hi
    if SPLIT:
        lo = tl.load(w_ptr + offsets + KP, mask=mask[:, None], other=0.0)
    return hi, lo


@triton.jit
def total_gradient(
    o: tl.constexpr,
    g,
    x,
    y,
    du,
    H_post,
    H_res,
    H_pre,
    norm,
    acc,
    n: tl.constexpr,
    POST: tl.constexpr,
    RES: tl.constexpr,
):
    """G[o] = acc + g + H_pre[o] du + norm x_next[o]; acc is w phi."""
    if POST:
        x_next = mix(x, y, H_res, H_post, o, n, RES)
    else:
        x_next = x[o]
    return acc + g + H_pre[o][:, None] * du + norm[:, None] * x_next


@relaunched
@triton.jit(do_not_specialize=["T", "parts", "per_part"])
def boundary_grad_kernel(
    x_desc, y_desc, g_desc, du_desc, phi_desc, dx_desc, dy_desc, y_bias_ptr, norm_weight_ptr,
    H_post_ptr, H_res_ptr, token_ptr, w_ptr, dH_post_ptr, dH_res_ptr, parts_ptr, counter_ptr, T,
    parts, per_part, n: tl.constexpr, C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, RES: tl.constexpr,
    HAS_G: tl.constexpr, Y_BIAS: tl.constexpr, NORM: tl.constexpr, SPLIT: tl.constexpr,
    PIN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The module docstring's last four lines for a tile of tokens and a part of the channels.

    PRE: there is a next pre (du, w, token); POST: there is a post (y, H). Without POST x is
    x_next and dx = G. Of several parts the one that ends last adds the sums over channels.
    """
    wait_for_inputs(PDL)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    t0 = tile * BT
    rows = (t0 + tl.arange(0, BT)).to(tl.int64)
    mask = rows < T
    H_post = ()
    H_res = ()
    token = ()
    if POST:
        H_post = load_columns(H_post_ptr, rows, n, 0, n, mask)
        if RES:
            H_res = load_columns(H_res_ptr, rows, n * n, 0, n * n, mask)
    if PRE:
        token = load_columns(token_ptr, rows, n + 4, 0, n + 4 if NORM else n + 2, mask)
        norm = token[n] + token[n + 1]
        w_hi, w_lo = load_w(w_ptr, rows, mask, KP, SPLIT)
    d_res = zeros_tuple(n * n if POST and RES else 0, BT, 4)
    d_post = zeros_tuple(n if POST else 0, BT, 4)
    for c0 in tl.range(
        part * per_part * BC, min((part + 1) * per_part * BC, C), BC, num_stages=STAGES
    ):
        x = load_tiles(x_desc, t0, c0, n, C)
        y = x[0]
        du = x[0]
        z = x[0]
        if POST:
            y = load_y(y_desc, y_bias_ptr, t0, c0, BC, Y_BIAS)
        if PRE:
            du = du_desc.load([t0, c0]).to(tl.float32)
            if NORM:
                weight = tl.load(norm_weight_ptr + c0 + tl.arange(0, BC)).to(tl.float32)
                z = tl.zeros([BT, BC], tl.float32)
                for o in tl.static_range(n):
                    if POST:
                        z += token[o][:, None] * mix(x, y, H_res, H_post, o, n, RES)
                    else:
                        z += token[o][:, None] * x[o]
                du = token[n + 2][:, None] * (du * weight[None, :]) - token[n + 3][:, None] * z
        G = ()
        for o in tl.static_range(n):
            total = tl.zeros([BT, BC], tl.float32)
            if PRE:
                total = phi_gradient(w_hi, w_lo, phi_desc, o * C + c0, total, KP, BC, SPLIT)
                g = tl.zeros([BT, BC], tl.float32)
                if HAS_G:
                    g = g_desc.load([t0, o * C + c0]).to(tl.float32)
                total = total_gradient(
                    o, g, x, y, du, H_post, H_res, token, norm, total, n, POST, RES
                )
            else:
                total = g_desc.load([t0, o * C + c0]).to(tl.float32)
            G = G + (pin(total, PIN),)
        for i in tl.static_range(n):
            dx = G[i]
            if POST and RES:
                dx = H_res[i][:, None] * G[0]
                for o in tl.static_range(1, n):
                    dx += H_res[o * n + i][:, None] * G[o]
            dx_desc.store([t0, i * C + c0], dx.to(dx_desc.dtype))
        if POST:
            dy = H_post[0][:, None] * G[0]
            for o in tl.static_range(1, n):
                dy += H_post[o][:, None] * G[o]
            dy_desc.store([t0, c0], dy.to(dy_desc.dtype))
            d_post, d_res = add_coefficient_grads(d_post, d_res, G, x, y, n, BT, BC, RES)
    if POST:
        store_coefficient_grads(
            d_post, d_res, dH_post_ptr, dH_res_ptr, parts_ptr, counter_ptr + tile, rows, mask, T,
            part, parts, n, RES,
        )  # fmt: skip


@triton.jit
def store_coefficient_grads(
    d_post, d_res, dH_post_ptr, dH_res_ptr, parts_ptr, counter_ptr, rows, mask, T, part, parts,
    n: tl.constexpr, RES: tl.constexpr,
):  # fmt: skip
    """The sums over channels to dH_post and dH_res, through [E, parts, T] if there are parts."""
    E: tl.constexpr = n + n * n if RES else n
    for e in tl.static_range(E):
        total = tl.sum(d_post[e] if e < n else d_res[e - n], axis=1)
        if parts > 1:
            tl.store(parts_ptr + (e * parts + part) * T.to(tl.int64) + rows, total, mask=mask)
        elif e < n:
            tl.store(dH_post_ptr + rows * n + e, total, mask=mask)
        else:
            tl.store(dH_res_ptr + rows * (n * n) + (e - n), total, mask=mask)
    if parts > 1:
        if arrive(counter_ptr) == parts - 1:
            for e in tl.static_range(E):
                total = sum_parts(parts_ptr + e * parts * T.to(tl.int64), rows, parts, T, mask)
                if e < n:
                    tl.store(dH_post_ptr + rows * n + e, total, mask=mask)
                else:
                    tl.store(dH_res_ptr + rows * (n * n) + (e - n), total, mask=mask)


@triton.jit
def add_coefficient_grads(
    d_post, d_res, G, x, y, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, RES: tl.constexpr
):
    """Adds G[o] . y and G[o] . x[i] of this block of channels."""
    post = ()
    res = ()
    for o in tl.static_range(n):
        post = post + (d_post[o] + fold(G[o] * y, BT, BC),)
        if RES:
            for i in tl.static_range(n):
                res = res + (d_res[o * n + i] + fold(G[o] * x[i], BT, BC),)
    return post, res
