"""From the projection to H_pre, H_post, H_res, Eq. (5) or (8)-(9), and back.

With p = (x . phi) / rms(x), the projection after the norm (saved, K numbers a token), ::

    logits = alpha p + b        H = sigmoid, 2 sigmoid, Sinkhorn | permutations | (hc) tanh

and backward, from dH, ::

    dp[k] = alpha dlogits[k]    w[k] = dp[k] / rms      norm = -(sum_k dp[k] p[k]) / (rms^2 nC)

so that the projection's share of x's gradient is sum_k w[k] phi[k] + norm x, and phi's gradient is
the sum over tokens of w[k] x.
"""

import triton
import triton.language as tl

from .device import sinkhorn_grad, sum_parts, tanh, wait_for_inputs


@triton.jit
def split_phi(phi_ptr, split_ptr, block, size, WIDTH: tl.constexpr):
    """Block number ``block`` of phi (``size`` numbers, WIDTH a block): split [2, K, nC] = high, low."""
    at = block * WIDTH + tl.arange(0, WIDTH)
    phi = tl.load(phi_ptr + at, mask=at < size, other=0.0)
    high = phi.to(split_ptr.dtype.element_ty)
    low = (phi - high.to(tl.float32)).to(split_ptr.dtype.element_ty)
    tl.store(split_ptr + at, high, mask=at < size)
    tl.store(split_ptr + size + at, low, mask=at < size)


@triton.jit
def split_phi_kernel(phi_ptr, split_ptr, size, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """phi as high and low halves, ahead of the projection."""
    wait_for_inputs(PDL)
    split_phi(phi_ptr, split_ptr, tl.program_id(0), size, WIDTH)


@triton.jit
def permuted(H_or_weights, permutations_ptr, R: tl.constexpr, RP: tl.constexpr, E: tl.constexpr):
    """[BT, RP] weights times the [R, E] permutation matrices (E = n*n): [BT, E]."""
    r = tl.arange(0, RP)
    table = tl.load(
        permutations_ptr + r[:, None] * E + tl.arange(0, E)[None, :],
        mask=(r < R)[:, None],
        other=0.0,
    )
    return tl.sum(H_or_weights[:, :, None] * table[None, :, :], axis=1)


@triton.jit
def permuted_grad(dH, permutations_ptr, R: tl.constexpr, RP: tl.constexpr, E: tl.constexpr):
    """[BT, E] -> [BT, RP]: the adjoint of ``permuted``."""
    r = tl.arange(0, RP)
    table = tl.load(
        permutations_ptr + r[:, None] * E + tl.arange(0, E)[None, :],
        mask=(r < R)[:, None],
        other=0.0,
    )
    return tl.sum(dH[:, None, :] * table[None, :, :], axis=2)


@triton.jit
def softmax(logits, R: tl.constexpr, RP: tl.constexpr):
    """Over the first R of [BT, RP]; zero beyond."""
    logits = tl.where(tl.arange(0, RP)[None, :] < R, logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    return e / tl.sum(e, axis=1, keep_dims=True)


@triton.jit
def two_sided(p, alpha, b, HC: tl.constexpr):
    """alpha p + b, with tanh(p) for hc; returns the logits and what multiplies alpha."""
    a = tanh(p) if HC else p
    return alpha * a + b, a


@triton.jit(do_not_specialize=["T", "sum_blocks"])
def coefficients_grad_kernel(
    p_ptr,
    inverse_rms_ptr,
    alpha_ptr,
    bias_ptr,
    permutations_ptr,
    gram_ptr,
    read_grad_ptr,
    dH_post_ptr,
    dH_res_ptr,
    token_ptr,
    w_ptr,
    sums_ptr,
    T,
    n: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BT: tl.constexpr,
    VARIANT: tl.constexpr,
    ITERATIONS: tl.constexpr,
    NORM: tl.constexpr,
    norm_eps,
    HAS_DPOST: tl.constexpr,
    HAS_DRES: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """dlogits of BT tokens from read_grad (du . x_i), dH_post and dH_res.

    Writes token [T, n + 3] = H_pre, norm, and with NORM the factors of weight * du and of z in
    z's gradient (z = H_pre x before the norm); w [T, 2 KP] bf16 high and low (SPLIT) or [T, KP];
    sums [blocks, 2 KP]: this block's sums of dlogits and of dlogits * p.
    """
    wait_for_inputs(PDL)
    HC: tl.constexpr = VARIANT == "hc"
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    mask = rows < T
    i = tl.arange(0, n)
    at = rows[:, None] * K + i[None, :]
    at_n = rows[:, None] * n + i[None, :]
    inside = mask[:, None]
    inverse_rms = tl.load(inverse_rms_ptr + rows, mask=mask, other=0.0)

    p_pre = tl.load(p_ptr + at, mask=inside, other=0.0)
    p_post = tl.load(p_ptr + at + n, mask=inside, other=0.0)
    alpha_pre = tl.load(alpha_ptr)
    alpha_post = tl.load(alpha_ptr + 1)
    logits_pre, a_pre = two_sided(p_pre, alpha_pre, tl.load(bias_ptr + i)[None, :], HC)
    logits_post, a_post = two_sided(p_post, alpha_post, tl.load(bias_ptr + n + i)[None, :], HC)

    H_pre = logits_pre if HC else tl.sigmoid(logits_pre)
    dH_pre = tl.load(read_grad_ptr + at_n, mask=inside, other=0.0)
    if NORM:
        z_x, square = gram_products(gram_ptr, H_pre, rows, inside, 1, 0, n)
        inverse = tl.rsqrt(square / C + norm_eps)
        factor = inverse * inverse * inverse / C * tl.sum(H_pre * dH_pre, axis=1)
        dH_pre = inverse[:, None] * dH_pre - factor[:, None] * z_x
        tl.store(token_ptr + rows * (n + 3) + n + 1, inverse, mask=mask)
        tl.store(token_ptr + rows * (n + 3) + n + 2, factor, mask=mask)
    tl.store(token_ptr + rows[:, None] * (n + 3) + i[None, :], H_pre, mask=inside)

    d_pre = dH_pre if HC else dH_pre * H_pre * (1.0 - H_pre)
    d_post = tl.zeros([BT, n], tl.float32)
    if HAS_DPOST:
        d_post = tl.load(dH_post_ptr + at_n, mask=inside, other=0.0)
        if not HC:
            half = tl.sigmoid(logits_post)
            d_post = d_post * (2.0 * half * (1.0 - half))
    dot = store_part(d_pre, p_pre, a_pre, alpha_pre, inverse_rms, w_ptr, sums_ptr, rows, mask, 0, n, n, KP, HC, SPLIT)
    dot += store_part(d_post, p_post, a_post, alpha_post, inverse_rms, w_ptr, sums_ptr, rows, mask, n, n, n, KP, HC, SPLIT)
    if R > 0:
        alpha_res = tl.load(alpha_ptr + 2)
        if HAS_DRES:
            d_res, p_res, a_res = res_grad(
                p_ptr, bias_ptr, permutations_ptr, dH_res_ptr, alpha_res, rows, mask,
                n, K, R, RP, BT, VARIANT, ITERATIONS,
            )  # fmt: skip
        else:
            d_res = tl.zeros([BT, RP], tl.float32)
            p_res = tl.zeros([BT, RP], tl.float32)
            a_res = p_res
        dot += store_part(d_res, p_res, a_res, alpha_res, inverse_rms, w_ptr, sums_ptr, rows, mask, 2 * n, R, RP, KP, HC, SPLIT)
    norm = -dot * inverse_rms * inverse_rms / (n * C)
    tl.store(token_ptr + rows * (n + 3) + n, norm, mask=mask)
    if KP > K:
        clear_padding(w_ptr, sums_ptr, rows, inside, K, KP, SPLIT)


@triton.jit
def gram_products(gram_ptr, H_pre, rows, inside, parts, stride, n: tl.constexpr):
    """z . x_i [BT, n] and z . z [BT] for z = H_pre x, from the forward's products x_i . x_j."""
    i = tl.arange(0, n)
    low = tl.minimum(i[:, None], i[None, :])
    index = low * n - low * (low - 1) // 2 + tl.maximum(i[:, None], i[None, :]) - low
    at = rows[:, None, None] * (n * (n + 1) // 2) + index[None, :, :]
    gram = sum_parts(gram_ptr, at, parts, stride, (inside & (i >= 0)[None, :])[:, :, None])
    z_x = tl.sum(gram * H_pre[:, :, None], axis=1)
    return z_x, tl.sum(z_x * H_pre, axis=1)


@triton.jit
def res_grad(
    p_ptr, bias_ptr, permutations_ptr, dH_res_ptr, alpha, rows, mask,
    n: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
    VARIANT: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """Gradient of H_res's logits, p, and what multiplies alpha in the logits, all [BT, RP]."""
    E: tl.constexpr = n * n
    if VARIANT == "birkhoff":
        r = tl.arange(0, RP)
        inside = mask[:, None] & (r < R)[None, :]
        p = tl.load(p_ptr + rows[:, None] * K + 2 * n + r[None, :], mask=inside, other=0.0)
        b = tl.load(bias_ptr + 2 * n + r, mask=r < R, other=0.0)
        weights = softmax(alpha * p + b[None, :], R, RP)
        at = rows[:, None] * E + tl.arange(0, E)[None, :]
        dH = tl.load(dH_res_ptr + at, mask=mask[:, None], other=0.0)
        d = permuted_grad(dH, permutations_ptr, R, RP, E)
        return weights * (d - tl.sum(weights * d, axis=1, keep_dims=True)), p, p
    # Loaded flat, so that the n*n entries of a token are neighbouring lanes of one warp.
    e = tl.arange(0, E)
    p = tl.load(p_ptr + rows[:, None] * K + 2 * n + e[None, :], mask=mask[:, None], other=0.0)
    dH = tl.load(dH_res_ptr + rows[:, None] * E + e[None, :], mask=mask[:, None], other=0.0)
    logits, a = two_sided(p, alpha, tl.load(bias_ptr + 2 * n + e)[None, :], VARIANT == "hc")
    if VARIANT == "mhc":
        dH = sinkhorn_grad(
            tl.reshape(logits, [BT, n, n]), tl.reshape(dH, [BT, n, n]), ITERATIONS
        )
        dH = tl.reshape(dH, [BT, E])
    return dH, p, a


@triton.jit
def store_part(
    d, p, a, alpha, inverse_rms, w_ptr, sums_ptr, rows, mask,
    first: tl.constexpr, count: tl.constexpr, width: tl.constexpr, KP: tl.constexpr,
    HC: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Columns first .. first+count of w and of the sums, from dlogits d [BT, width].

    a multiplies alpha in the logits: p, or tanh(p) for hc. Returns the sum of dp * p, [BT].
    """
    j = tl.arange(0, width)
    inside = mask[:, None] & (j < count)[None, :]
    d = tl.where(inside, d, 0.0)
    at = sums_ptr + tl.program_id(0) * (2 * KP) + first + j
    tl.store(at, tl.sum(d, axis=0), mask=j < count)
    tl.store(at + KP, tl.sum(d * a, axis=0), mask=j < count)
    dp = alpha * d
    if HC:
        dp = dp * (1.0 - a * a)
    w = dp * inverse_rms[:, None]
    if SPLIT:
        hi = w.to(tl.bfloat16)
        to = w_ptr + rows[:, None] * (2 * KP) + first + j[None, :]
        tl.store(to, hi, mask=inside)
        tl.store(to + KP, (w - hi.to(tl.float32)).to(tl.bfloat16), mask=inside)
    else:
        tl.store(w_ptr + rows[:, None] * KP + first + j[None, :], w, mask=inside)
    return tl.sum(dp * p, axis=1)


@triton.jit
def clear_padding(
    w_ptr, sums_ptr, rows, inside, K: tl.constexpr, KP: tl.constexpr, SPLIT: tl.constexpr
):
    """Zeros in columns K .. KP, which the matrix products read."""
    k = tl.arange(0, KP)
    width: tl.constexpr = 2 * KP if SPLIT else KP
    padding = inside & (k >= K)[None, :]
    zero = tl.zeros([1, KP], w_ptr.dtype.element_ty)
    at = w_ptr + rows[:, None] * width + k[None, :]
    tl.store(at, zero, mask=padding)
    if SPLIT:
        tl.store(at + KP, zero, mask=padding)
    at = sums_ptr + tl.program_id(0) * (2 * KP) + k
    tl.store(at, 0.0, mask=k >= K)
    tl.store(at + KP, 0.0, mask=k >= K)
