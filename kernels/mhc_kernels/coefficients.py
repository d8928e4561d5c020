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

from .device import load_columns, sinkhorn_grad, tanh, wait_for_inputs
from .relaunch import relaunched


@triton.jit
def split_phi(phi_ptr, split_ptr, block, size, WIDTH: tl.constexpr):
    """Block ``block`` of phi (``size`` numbers, WIDTH a block): split [2, K, nC] = high, low."""
    at = block * WIDTH + tl.arange(0, WIDTH)
    phi = tl.load(phi_ptr + at, mask=at < size, other=0.0)
    high = phi.to(split_ptr.dtype.element_ty)
    low = (phi - high.to(tl.float32)).to(split_ptr.dtype.element_ty)
    tl.store(split_ptr + at, high, mask=at < size)
    tl.store(split_ptr + size + at, low, mask=at < size)


@relaunched
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


@triton.jit
def write_logits_grad(
    block, row_block, p_ptr, inverse_rms_ptr, alpha_ptr, bias_ptr, permutations_ptr, dH_post_ptr,
    dH_res_ptr, token_ptr, w_ptr, sums_ptr, T,
    n: tl.constexpr, C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, BT: tl.constexpr, VARIANT: tl.constexpr, ITERATIONS: tl.constexpr,
    HAS_DPOST: tl.constexpr, HAS_DRES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dlogits of post and res of BT tokens, from dH_post and dH_res alone.

    Writes their columns of w (and zeros in its padding), their share of norm (token column n + 1)
    and row ``row_block`` of sums: the block's sums of dlogits and of dlogits * p.
    """
    HC: tl.constexpr = VARIANT == "hc"
    rows = (block * BT + tl.arange(0, BT)).to(tl.int64)
    mask = rows < T
    inside = mask[:, None]
    clear_row(sums_ptr, row_block, KP)
    clear_padding(w_ptr, rows, inside, K, KP, SPLIT)
    i = tl.arange(0, n)
    inverse_rms = tl.load(inverse_rms_ptr + rows, mask=mask, other=0.0)
    alpha = tl.load(alpha_ptr + 1)
    p = tl.load(p_ptr + rows[:, None] * K + n + i[None, :], mask=inside, other=0.0)
    logits, a = two_sided(p, alpha, tl.load(bias_ptr + n + i)[None, :], HC)
    d = tl.zeros([BT, n], tl.float32)
    if HAS_DPOST:
        d = tl.load(dH_post_ptr + rows[:, None] * n + i[None, :], mask=inside, other=0.0)
        if not HC:
            half = tl.sigmoid(logits)
            d = d * (2.0 * half * (1.0 - half))
    dot = store_part(
        d, p, a, alpha, inverse_rms, w_ptr, sums_ptr, row_block, rows, mask, n, n, n, KP, HC, SPLIT
    )
    if R > 0:
        alpha = tl.load(alpha_ptr + 2)
        d = tl.zeros([BT, RP], tl.float32)
        p = d
        a = d
        if HAS_DRES:
            d, p, a = res_grad(
                p_ptr, bias_ptr, permutations_ptr, dH_res_ptr, alpha, rows, mask,
                n, K, R, RP, BT, VARIANT, ITERATIONS,
            )  # fmt: skip
        dot += store_part(
            d, p, a, alpha, inverse_rms, w_ptr, sums_ptr, row_block, rows, mask,
            2 * n, R, RP, KP, HC, SPLIT,
        )  # fmt: skip
    norm = -dot * inverse_rms * inverse_rms / (n * C)
    tl.store(token_ptr + rows * (n + 4) + n + 1, norm, mask=mask)


@triton.jit
def write_pre_grad(
    read_grad, row_block, p_ptr, inverse_rms_ptr, alpha_ptr, bias_ptr, gram_ptr, token_ptr, w_ptr,
    sums_ptr, rows, mask, norm_eps,
    n: tl.constexpr, C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, HC: tl.constexpr,
    NORM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dlogits of pre for a tile of tokens, from read_grad = (du . x_i), a tuple of [BT].

    Writes the pre columns of w, row ``row_block`` of sums, and of token [T, n + 4]: H_pre, the pre
    rows' share of norm (n), and with NORM the factors of weight * du (n + 2) and of z (n + 3) in
    the gradient of z = H_pre x, which the norm follows.
    """
    inverse_rms = tl.load(inverse_rms_ptr + rows, mask=mask, other=0.0)
    alpha = tl.load(alpha_ptr)
    clear_row(sums_ptr, row_block, KP)
    p = load_columns(p_ptr, rows, K, 0, n, mask)
    H_pre = ()
    slope = ()
    for i in tl.static_range(n):
        a = tanh(p[i]) if HC else p[i]
        logit = alpha * a + tl.load(bias_ptr + i)
        H = logit if HC else tl.sigmoid(logit)
        H_pre = H_pre + (H,)
        slope = slope + ((1.0 if HC else H * (1.0 - H)),)
        tl.store(token_ptr + rows * (n + 4) + i, H, mask=mask)
    if NORM:
        read_grad = through_norm(read_grad, H_pre, gram_ptr, token_ptr, rows, mask, norm_eps, n, C)
    dot = tl.zeros_like(inverse_rms)
    for i in tl.static_range(n):
        d = tl.where(mask, read_grad[i] * slope[i], 0.0)
        a = tanh(p[i]) if HC else p[i]
        tl.store(sums_ptr + row_block * (2 * KP) + i, tl.sum(d, axis=0))
        tl.store(sums_ptr + row_block * (2 * KP) + KP + i, tl.sum(d * a, axis=0))
        dp = alpha * d * (1.0 - a * a) if HC else alpha * d
        dot += dp * p[i]
        store_w(w_ptr, dp * inverse_rms, rows, i, mask, KP, SPLIT)
    norm = -dot * inverse_rms * inverse_rms / (n * C)
    tl.store(token_ptr + rows * (n + 4) + n, norm, mask=mask)


@triton.jit
def through_norm(
    read_grad, H_pre, gram_ptr, token_ptr, rows, mask, norm_eps, n: tl.constexpr, C: tl.constexpr
):
    """dH_pre through the norm on u = weight * z / rms(z): from weight * du . x_i and x_i . x_j."""
    count: tl.constexpr = n * (n + 1) // 2
    gram = load_columns(gram_ptr, rows, count, 0, count, mask)
    square = tl.zeros_like(H_pre[0])
    along = tl.zeros_like(H_pre[0])
    z_x = ()
    for i in tl.static_range(n):
        product = tl.zeros_like(H_pre[0])
        for j in tl.static_range(n):
            if i < j:
                product += H_pre[j] * gram[i * n - i * (i - 1) // 2 + j - i]
            else:
                product += H_pre[j] * gram[j * n - j * (j - 1) // 2 + i - j]
        z_x = z_x + (product,)
        square += H_pre[i] * product
        along += H_pre[i] * read_grad[i]
    inverse = tl.rsqrt(square / C + norm_eps)
    factor = inverse * inverse * inverse / C * along
    tl.store(token_ptr + rows * (n + 4) + n + 2, inverse, mask=mask)
    tl.store(token_ptr + rows * (n + 4) + n + 3, factor, mask=mask)
    out = ()
    for i in tl.static_range(n):
        out = out + (inverse * read_grad[i] - factor * z_x[i],)
    return out


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
        d = weights * (d - tl.sum(weights * d, axis=1, keep_dims=True))
        a = p
    else:
        # Loaded flat, so that the n*n entries of a token are neighbouring lanes of one warp.
        e = tl.arange(0, E)
        p = tl.load(p_ptr + rows[:, None] * K + 2 * n + e[None, :], mask=mask[:, None], other=0.0)
        d = tl.load(dH_res_ptr + rows[:, None] * E + e[None, :], mask=mask[:, None], other=0.0)
        logits, a = two_sided(p, alpha, tl.load(bias_ptr + 2 * n + e)[None, :], VARIANT == "hc")
        if VARIANT == "mhc":
            logits, d = tl.reshape(logits, [BT, n, n]), tl.reshape(d, [BT, n, n])
            d = tl.reshape(sinkhorn_grad(logits, d, ITERATIONS), [BT, E])
    return d, p, a


@triton.jit
def store_part(
    d, p, a, alpha, inverse_rms, w_ptr, sums_ptr, row_block, rows, mask,
    first: tl.constexpr, count: tl.constexpr, width: tl.constexpr, KP: tl.constexpr,
    HC: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Columns first .. first+count of w and of the sums, from dlogits d [BT, width].

    a multiplies alpha in the logits: p, or tanh(p) for hc. Returns the sum of dp * p, [BT].
    """
    j = tl.arange(0, width)
    inside = mask[:, None] & (j < count)[None, :]
    d = tl.where(inside, d, 0.0)
    at = sums_ptr + row_block * (2 * KP) + first + j
    tl.store(at, tl.sum(d, axis=0), mask=j < count)
    tl.store(at + KP, tl.sum(d * a, axis=0), mask=j < count)
    dp = alpha * d
    if HC:
        dp = dp * (1.0 - a * a)
    store_w(w_ptr, dp * inverse_rms[:, None], rows[:, None], first + j[None, :], inside, KP, SPLIT)
    return tl.sum(dp * p, axis=1)


@triton.jit
def store_w(w_ptr, w, rows, column, inside, KP: tl.constexpr, SPLIT: tl.constexpr):
    """Entries of w [T, KP], or of [T, 2 KP] as bf16 high and low parts (SPLIT)."""
    if SPLIT:
        high = w.to(tl.bfloat16)
        tl.store(w_ptr + rows * (2 * KP) + column, high, mask=inside)
        low = (w - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(w_ptr + rows * (2 * KP) + KP + column, low, mask=inside)
    else:
        tl.store(w_ptr + rows * KP + column, w, mask=inside)


@triton.jit
def clear_row(sums_ptr, row_block, KP: tl.constexpr):
    """Zeros in a block's row of sums, before the columns that are its own."""
    tl.store(sums_ptr + row_block * (2 * KP) + tl.arange(0, 2 * KP), 0.0)
    tl.debug_barrier()


@triton.jit
def clear_padding(
    w_ptr, rows, inside, K: tl.constexpr, KP: tl.constexpr, SPLIT: tl.constexpr
):
    """Zeros in columns K .. KP of w, which the matrix products read."""
    if KP > K:
        k = tl.arange(0, KP)
        width: tl.constexpr = 2 * KP if SPLIT else KP
        zero = tl.zeros([1, KP], w_ptr.dtype.element_ty)
        at = w_ptr + rows[:, None] * width + k[None, :]
        tl.store(at, zero, mask=inside & (k >= K)[None, :])
        if SPLIT:
            tl.store(at + KP, zero, mask=inside & (k >= K)[None, :])
