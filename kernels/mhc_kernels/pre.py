"""F_pre: u = H_pre x, and what its backward reads from memory.

The projection itself is ``post_pre.post_project_kernel`` (with POST off when there is no post to
fuse). ``read_kernel`` turns its sums into H and applies H_pre; backward, ``logits_grad_kernel``
makes dlogits, for which it reads x and du, and ``phi_grad_kernel`` dphi, the product of w and x.
"""

import triton
import triton.language as tl

from .coefficients import (
    permuted,
    softmax,
    split_phi,
    two_sided,
    write_logits_grad,
    write_pre_grad,
)
from .device import arrive, column_of, dot, sinkhorn, sum_few_parts, sum_parts, wait_for_inputs
from .relaunch import relaunched


@triton.jit
def write_coefficients(
    projected_ptr, parts, part_stride, inverse_rms, alpha_ptr, bias_ptr, permutations_ptr,
    p_ptr, H_post_ptr, H_res_ptr, rows, mask,
    n: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BT: tl.constexpr, VARIANT: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """p, H_post and H_res of a tile of tokens to memory; returns H_pre [BT, n]."""
    HC: tl.constexpr = VARIANT == "hc"
    i = tl.arange(0, n)
    inside = mask[:, None]
    at = rows[:, None] * KP + i[None, :]
    scale = inverse_rms[:, None]
    p_pre = sum_few_parts(projected_ptr, at, parts, part_stride, inside) * scale
    p_post = sum_few_parts(projected_ptr, at + n, parts, part_stride, inside) * scale
    to = p_ptr + rows[:, None] * K + i[None, :]
    tl.store(to, p_pre, mask=inside)
    tl.store(to + n, p_post, mask=inside)
    pre, _ = two_sided(p_pre, tl.load(alpha_ptr), tl.load(bias_ptr + i)[None, :], HC)
    post, _ = two_sided(p_post, tl.load(alpha_ptr + 1), tl.load(bias_ptr + n + i)[None, :], HC)
    H_post = post if HC else 2.0 * tl.sigmoid(post)
    tl.store(H_post_ptr + rows[:, None] * n + i[None, :], H_post, mask=inside)
    if VARIANT == "birkhoff":
        r = tl.arange(0, RP)
        valid = inside & (r < R)[None, :]
        at = rows[:, None] * KP + 2 * n + r[None, :]
        p = sum_few_parts(projected_ptr, at, parts, part_stride, valid) * scale
        tl.store(p_ptr + rows[:, None] * K + 2 * n + r[None, :], p, mask=valid)
        b = tl.load(bias_ptr + 2 * n + r, mask=r < R, other=0.0)
        weights = softmax(tl.load(alpha_ptr + 2) * p + b[None, :], R, RP)
        e = tl.arange(0, n * n)
        H_res = permuted(weights, permutations_ptr, R, RP, n * n)
        tl.store(H_res_ptr + rows[:, None] * (n * n) + e[None, :], H_res, mask=inside)
    elif VARIANT != "identity":
        # Loaded flat, so that the n*n entries of a token are neighbouring lanes of one warp.
        e = tl.arange(0, n * n)
        at = rows[:, None] * KP + 2 * n + e[None, :]
        p = sum_few_parts(projected_ptr, at, parts, part_stride, inside) * scale
        tl.store(p_ptr + rows[:, None] * K + 2 * n + e[None, :], p, mask=inside)
        H_res, _ = two_sided(p, tl.load(alpha_ptr + 2), tl.load(bias_ptr + 2 * n + e)[None, :], HC)
        if VARIANT == "mhc":
            H_res = tl.reshape(sinkhorn(tl.reshape(H_res, [BT, n, n]), ITERATIONS), [BT, n * n])
        tl.store(H_res_ptr + rows[:, None] * (n * n) + e[None, :], H_res, mask=inside)
    return pre if HC else tl.sigmoid(pre)


@triton.jit
def channels_inside(mask, channels, C: tl.constexpr, BC: tl.constexpr):
    """Mask of a tile; BC need not divide C."""
    inside = mask[:, None]
    if C % BC != 0:
        inside = inside & (channels < C)[None, :]
    return inside


@triton.jit
def load_weight(norm_weight_ptr, channels, C: tl.constexpr, BC: tl.constexpr):
    """The fused norm's weight [1, BC] in float32."""
    if C % BC != 0:
        weight = tl.load(norm_weight_ptr + channels, mask=channels < C, other=0.0)
    else:
        weight = tl.load(norm_weight_ptr + channels)
    return weight.to(tl.float32)[None, :]


@triton.jit
def load_gram(gram_parts_ptr, gram_ptr, rows, mask, parts, part_rows, n: tl.constexpr):
    """The streams' products x_i . x_j [BT, n * n], summed over the parts; kept for backward too."""
    count: tl.constexpr = n * (n + 1) // 2
    e = tl.arange(0, n * n)
    low = tl.minimum(e // n, e % n)
    index = low * n - low * (low - 1) // 2 + tl.maximum(e // n, e % n) - low
    at = rows[:, None] * count + index[None, :]
    inside = mask[:, None] & (e >= 0)[None, :]
    gram = sum_few_parts(gram_parts_ptr, at, parts, part_rows * count, inside)
    tl.store(gram_ptr + at, gram, mask=inside & (e // n <= e % n)[None, :])
    return gram


@triton.jit
def read_scale(gram, H_pre, norm_eps, n: tl.constexpr, C: tl.constexpr):
    """1 / rms(H_pre x) [BT], from the products of streams."""
    e = tl.arange(0, n * n)
    left = tl.zeros_like(gram)
    right = tl.zeros_like(gram)
    for i in tl.static_range(n):
        weight = column_of(H_pre, i, n)[:, None]
        left = tl.where((e // n == i)[None, :], weight, left)
        right = tl.where((e % n == i)[None, :], weight, right)
    return tl.rsqrt(tl.sum(gram * left * right, axis=1) / C + norm_eps)


@relaunched
@triton.jit(do_not_specialize=["T", "parts"])
def read_kernel(
    x_ptr, projected_ptr, gram_parts_ptr, alpha_ptr, bias_ptr, permutations_ptr, norm_weight_ptr,
    u_ptr, H_post_ptr, H_res_ptr, p_ptr, inverse_rms_ptr, gram_ptr, H_pre_ptr, T, parts, eps,
    norm_eps, n: tl.constexpr, C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, VARIANT: tl.constexpr,
    ITERATIONS: tl.constexpr, NORM: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """H of a tile of tokens from the projection's partial sums, then u over all channels."""
    wait_for_inputs(PDL)
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    mask = rows < T
    part_rows = T.to(tl.int64)
    if NORM:
        gram = load_gram(gram_parts_ptr, gram_ptr, rows, mask, parts, part_rows, n)
        e = tl.arange(0, n * n)
        square = tl.sum(tl.where((e // n == e % n)[None, :], gram, 0.0), axis=1)
    else:
        square = sum_few_parts(gram_parts_ptr, rows, parts, part_rows, mask)
    inverse_rms = tl.rsqrt(square / (n * C) + eps)
    tl.store(inverse_rms_ptr + rows, inverse_rms, mask=mask)
    H_pre = write_coefficients(
        projected_ptr, parts, part_rows * KP, inverse_rms, alpha_ptr, bias_ptr, permutations_ptr,
        p_ptr, H_post_ptr, H_res_ptr, rows, mask, n, K, KP, R, RP, BT, VARIANT, ITERATIONS,
    )  # fmt: skip
    if NORM:
        H_pre *= read_scale(gram, H_pre, norm_eps, n, C)[:, None]
    at_pre = rows[:, None] * n + tl.arange(0, n)[None, :]
    tl.store(H_pre_ptr + at_pre, H_pre, mask=mask[:, None])
    weights = ()
    for i in tl.static_range(n):
        weights = weights + (column_of(H_pre, i, n)[:, None],)
    for c0 in tl.range(0, C, BC, num_stages=STAGES):
        channels = c0 + tl.arange(0, BC)
        inside = channels_inside(mask, channels, C, BC)
        at = rows[:, None] * (n * C) + channels[None, :]
        u = tl.zeros([BT, BC], tl.float32)
        for i in tl.static_range(n):
            x = tl.load(x_ptr + at + i * C, mask=inside, other=0.0).to(tl.float32)
            u = tl.fma(weights[i], x, u)
        if NORM:
            u *= load_weight(norm_weight_ptr, channels, C, BC)
        to = u_ptr + rows[:, None] * C + channels[None, :]
        tl.store(to, u.to(u_ptr.dtype.element_ty), mask=inside)


@relaunched
@triton.jit(do_not_specialize=["T", "tiles", "counters", "phi_size"])
def logits_grad_kernel(
    x_ptr, du_ptr, norm_weight_ptr, p_ptr, inverse_rms_ptr, alpha_ptr, bias_ptr,
    permutations_ptr, gram_ptr, dH_post_ptr, dH_res_ptr, token_ptr, w_ptr, sums_ptr, counter_ptr,
    phi_ptr, split_ptr, T, tiles, counters, phi_size, norm_eps, n: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, LOGIT_BT: tl.constexpr, VARIANT: tl.constexpr, ITERATIONS: tl.constexpr,
    NORM: tl.constexpr, HAS_DPOST: tl.constexpr, HAS_DRES: tl.constexpr, SPLIT: tl.constexpr,
    WIDTH: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dlogits of every token, in three kinds of programs that run side by side.

    Of each BT // LOGIT_BT + 1 programs the first reads x and du of a tile of BT tokens, sums
    du . x_i over all channels and does pre; the others do post and res of the same tokens, through
    Sinkhorn: long chains of arithmetic and hardly any memory. What follows these clears the
    counters and splits phi for the kernels after this one.
    """
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    GROUP: tl.constexpr = BT // LOGIT_BT + 1
    tile = program // GROUP
    member = program % GROUP
    if tile >= tiles:
        block = program - tiles * GROUP
        at = block * WIDTH + tl.arange(0, WIDTH)
        tl.store(counter_ptr + at, 0, mask=at < counters)
        if SPLIT:
            split_phi(phi_ptr, split_ptr, block, phi_size, WIDTH)
    elif member > 0:
        write_logits_grad(
            tile * (GROUP - 1) + member - 1, program, p_ptr, inverse_rms_ptr, alpha_ptr, bias_ptr,
            permutations_ptr, dH_post_ptr, dH_res_ptr, token_ptr, w_ptr, sums_ptr, T,
            n, C, K, KP, R, RP, LOGIT_BT, VARIANT, ITERATIONS, HAS_DPOST, HAS_DRES, SPLIT,
        )  # fmt: skip
    else:
        rows = (tile * BT + tl.arange(0, BT)).to(tl.int64)
        mask = rows < T
        sums = read_products(x_ptr, du_ptr, norm_weight_ptr, rows, mask, n, C, BT, BC, NORM, STAGES)
        write_pre_grad(
            sums, program, p_ptr, inverse_rms_ptr, alpha_ptr, bias_ptr, gram_ptr, token_ptr, w_ptr,
            sums_ptr, rows, mask, norm_eps, n, C, K, KP, VARIANT == "hc", NORM, SPLIT,
        )  # fmt: skip


@triton.jit
def read_products(
    x_ptr, du_ptr, norm_weight_ptr, rows, mask,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """du . x_i of a tile of tokens (NORM: weight * du . x_i) as a tuple of n [BT] vectors."""
    sums = ()
    for _ in tl.static_range(n):
        sums = sums + (tl.zeros([BT, BC // 8], tl.float32),)
    for c0 in tl.range(0, C, BC, num_stages=STAGES):
        channels = c0 + tl.arange(0, BC)
        inside = channels_inside(mask, channels, C, BC)
        at = rows[:, None] * (n * C) + channels[None, :]
        to = rows[:, None] * C + channels[None, :]
        du = tl.load(du_ptr + to, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            du *= load_weight(norm_weight_ptr, channels, C, BC)
        following = ()
        for i in tl.static_range(n):
            x = tl.load(x_ptr + at + i * C, mask=inside, other=0.0).to(tl.float32)
            # Eight neighbours are one thread's: summed there, across threads only at the end.
            product = tl.sum(tl.reshape(x * du, [BT, BC // 8, 8]), axis=2)
            following = following + (sums[i] + product,)
        sums = following
    out = ()
    for i in tl.static_range(n):
        out = out + (tl.sum(sums[i], axis=1),)
    return out


@relaunched
@triton.jit(do_not_specialize=["T", "columns", "parts", "per_part", "sum_rows"])
def phi_grad_kernel(
    x_desc, w_desc, parts_ptr, dphi_ptr, counter_ptr, sums_ptr, partial_sums_ptr, dalpha_ptr,
    dbias_ptr, T, columns, parts, per_part, sum_rows, n: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    FINISHERS: tl.constexpr, RES: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dphi [K, n*C] = sum over tokens of w x, BC columns a block; and dalpha, dbias.

    w comes as bf16 high and low parts side by side (SPLIT), x is exact in bf16, the sums are
    float32: the product is as exact as float32's. Of several parts of the tokens the one that
    ends last adds all of them in order.
    """
    wait_for_inputs(PDL)
    block = tl.program_id(0)
    part = tl.program_id(1)
    if block < FINISHERS:
        if part == 0:
            finish_sums(
                block, sums_ptr, partial_sums_ptr, counter_ptr + columns, dalpha_ptr, dbias_ptr,
                sum_rows, n, K, KP, FINISHERS, RES,
            )  # fmt: skip
        return
    block -= FINISHERS
    column = block * BC
    acc = phi_products(x_desc, w_desc, column, part, per_part, T, KP, BT, BC, SPLIT, STAGES)
    k = tl.arange(0, KP)
    size: tl.constexpr = K * n * C
    at = k[None, :] * (n * C) + column + tl.arange(0, BC)[:, None]
    valid = (k < K)[None, :]
    if parts == 1:
        tl.store(dphi_ptr + at, acc, mask=valid)
    else:
        tl.store(parts_ptr + part * size + at, acc, mask=valid)
        if arrive(counter_ptr + block) == parts - 1:
            tl.store(dphi_ptr + at, sum_parts(parts_ptr, at, parts, size, valid), mask=valid)


@triton.jit
def phi_products(
    x_desc, w_desc, column, part, per_part, T, KP: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x^T w [BC, KP] over the part's blocks of BT tokens."""
    acc = tl.zeros([BC, 2 * KP if SPLIT else KP], tl.float32)
    last = min((part + 1) * per_part, tl.cdiv(T, BT))
    for block in tl.range(part * per_part, last, num_stages=STAGES):
        x = x_desc.load([block * BT, column])
        w = w_desc.load([block * BT, 0])
        if x_desc.dtype == tl.float16:
            high = x.to(tl.bfloat16)
            acc = dot(high.T, w, acc)
            low = x.to(tl.float32) - high.to(tl.float32)
            acc = dot(low.to(tl.bfloat16).T, w, acc)
        elif SPLIT:
            acc = dot(x.T, w, acc)
        else:
            acc = dot(x.to(tl.float32).T, w, acc)
    if SPLIT:
        acc = tl.sum(tl.reshape(acc, [BC, 2, KP]), axis=1)
    return acc


@triton.jit
def finish_sums(
    part, sums_ptr, partial_ptr, counter_ptr, dalpha_ptr, dbias_ptr, sum_rows,
    n: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, FINISHERS: tl.constexpr, RES: tl.constexpr,
):  # fmt: skip
    """dbias and dalpha: the ordered sum over the blocks' rows of dlogits and of dlogits * p.

    FINISHERS programs take a share of the rows each, the last to end adds the shares.
    """
    k = tl.arange(0, 2 * KP)
    share = tl.cdiv(sum_rows, FINISHERS)
    last = min((part + 1) * share, sum_rows)
    total = tl.zeros([64, 2 * KP], tl.float32)
    for first in range(part * share, last, 64):
        row = first + tl.arange(0, 64)
        at = sums_ptr + row[:, None] * (2 * KP) + k[None, :]
        total += tl.load(at, mask=(row < last)[:, None], other=0.0)
    tl.store(partial_ptr + part * (2 * KP) + k, tl.sum(total, axis=0))
    if arrive(counter_ptr) == FINISHERS - 1:
        row = tl.arange(0, FINISHERS)
        whole = tl.sum(tl.load(partial_ptr + row[:, None] * (2 * KP) + k[None, :]), axis=0)
        tl.store(dbias_ptr + k, whole, mask=k < K)
        pre = (k >= KP) & (k < KP + n)
        post = (k >= KP + n) & (k < KP + 2 * n)
        tl.store(dalpha_ptr, tl.sum(tl.where(pre, whole, 0.0), axis=0))
        tl.store(dalpha_ptr + 1, tl.sum(tl.where(post, whole, 0.0), axis=0))
        if RES:
            tl.store(dalpha_ptr + 2, tl.sum(tl.where(k >= KP + 2 * n, whole, 0.0), axis=0))


@relaunched
@triton.jit(do_not_specialize=["T"])
def norm_weight_grad_kernel(
    x_ptr,
    du_ptr,
    token_ptr,
    dweight_ptr,
    T,
    n: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gradient [C] of the fused norm's weight: sum over tokens of du * H_pre x / rms(H_pre x)."""
    wait_for_inputs(PDL)
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BT, BC], tl.float32)
    for t0 in tl.range(0, T, BT):
        rows = (t0 + tl.arange(0, BT)).to(tl.int64)
        mask = rows < T
        inside = mask[:, None]
        z = tl.zeros([BT, BC], tl.float32)
        for i in tl.static_range(n):
            H_pre = tl.load(token_ptr + rows * (n + 4) + i, mask=mask, other=0.0)
            at = rows[:, None] * (n * C) + i * C + channels[None, :]
            z += H_pre[:, None] * tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(token_ptr + rows * (n + 4) + n + 2, mask=mask, other=0.0)
        to = rows[:, None] * C + channels[None, :]
        du = tl.load(du_ptr + to, mask=inside, other=0.0).to(tl.float32)
        total += du * z * inverse[:, None]
    tl.store(dweight_ptr + channels, tl.sum(total, axis=0))
