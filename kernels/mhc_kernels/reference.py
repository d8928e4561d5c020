"""Manifold-constrained hyper-connections in eager PyTorch: the single source of truth.

One sublayer F (attention or MLP) of a transformer with n residual streams of C channels
(mHC, arXiv 2512.24880; equation numbers are the paper's)::

    u      = H_pre x                                  what the sublayer reads
    x_next = H_res x + H_post^T F(u)                                             (3)

    v      = x / rms(x)       over all n*C values of a token                     (7)
    logits = alpha * (v phi^T) + b
    H_pre  = sigmoid(logits_pre)                                                 (8)
    H_post = 2 sigmoid(logits_post)
    H_res  = Sinkhorn(logits_res)                                                (9)

Symbols and shapes, used under these names everywhere in this project:

======= ================= ==========================================================
x       [..., n, C]       the residual streams of a token; stream i is x[..., i, :]
u, y    [..., C]          input and output of the sublayer
phi     [K, n*C]          projection, rows ordered pre (n) | post (n) | res
b       [K]               bias, same order (argument name: ``bias``)
alpha   [3]               one scalar for each of pre, post, res ([2] without a res part)
H_pre   [..., n]          read weights
H_post  [..., n]          write weights
H_res   [..., n, n]       mixing, applied as x_next[o] = sum_i H_res[o, i] x[i];
                          None stands for the identity
======= ================= ==========================================================

K depends on the variant of H_res (``VARIANTS``):

- ``mhc``: n*n rows, row-major [o, i]; doubly stochastic by Sinkhorn-Knopp, Eq. (9).
- ``identity``: no rows; H_res = I.
- ``birkhoff``: n! rows; a convex combination of the permutations of n in lexicographic order,
  exactly doubly stochastic (mHC-lite, arXiv 2601.05732). n <= 4.
- ``hc``: n*n rows; the unconstrained connection that mHC's paper compares with, Eq. (5):
  H = alpha * tanh(v phi^T) + b for all three parts (Hyper-Connections, arXiv 2409.19606).

``sinkhorn_kind="deepseek-v4"`` is DeepSeek-V4's arithmetic of the ``mhc`` variant: its Sinkhorn
(``sinkhorn_deepseek_v4``) and H_pre = sigmoid(logits_pre) + 1e-6.

Everything here runs in the dtype of its inputs, except that half-precision streams are read as
float32 (the coefficients are float32 whatever x is); float64 stays float64, which is what
``torch.autograd.gradcheck`` and the error columns of the benches use.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

VARIANTS = ("mhc", "identity", "birkhoff", "hc")
SINKHORNS = ("paper", "deepseek-v4")

#: RMSNorm epsilon of the paper's models (added to the mean square).
NORM_EPS = 1e-20
#: Sinkhorn-Knopp iterations of the paper.
ITERATIONS = 20
#: DeepSeek-V4's hc_eps: in every denominator, and added to H_pre and to the head's weights.
V4_EPS = 1e-6


def res_rows(n: int, variant: str) -> int:
    """Rows of phi that belong to H_res, for n streams."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
    if n < 1:
        raise ValueError(f"the number of streams n must be at least 1, not {n}")
    if variant == "birkhoff" and n > 4:
        raise ValueError(f"birkhoff mixes all n! permutations: n must be at most 4, not {n}")
    return {"identity": 0, "birkhoff": math.factorial(n)}.get(variant, n * n)


def phi_rows(n: int, variant: str) -> int:
    """K, the rows of phi and entries of b: pre (n), post (n), res."""
    return 2 * n + res_rows(n, variant)


def alpha_size(variant: str) -> int:
    """Entries of alpha: pre, post and, where H_res is learned, res."""
    return 2 if variant == "identity" else 3


def sinkhorn(logits: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Eq. (9): M_0 = exp(logits), M_t = T_r(T_c(M_{t-1})): columns first, rows last.

    logits [..., n, n] -> [..., n, n] of the same dtype, positive, rows summing to one exactly (to
    rounding) and columns to one up to the convergence of ``iterations`` steps. A factor of a whole
    column of M_0 cancels in the first normalisation, so each column's largest logit is subtracted:
    nothing overflows. A row whose every entry underflows stays zero instead of becoming 0 / 0.
    """
    # Matrices first: a sum over n is n long rows added up, several times as fast as short sums.
    m = logits.movedim((-2, -1), (0, 1)).contiguous()
    m = torch.exp(m - m.amax(dim=0, keepdim=True).detach())
    tiny = torch.finfo(m.dtype).tiny
    for _ in range(iterations):
        m = m / m.sum(dim=0, keepdim=True).clamp_min(tiny)
        m = m / m.sum(dim=1, keepdim=True).clamp_min(tiny)
    return m.movedim((0, 1), (-2, -1)).contiguous()


def sinkhorn_deepseek_v4(logits: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """DeepSeek-V4's Sinkhorn (arXiv 2606.19348; transformers, models/deepseek_v4), [..., n, n].

    The first row step is a softmax, and V4_EPS is added to it and to every denominator. V4 works on
    ``comb``, which it applies transposed (sum_j comb[j, k] x[j]); ``logits`` and the result are
    H_res[o, i] here, so its rows are these columns. Ends with the rows, as ``sinkhorn`` does.
    """
    m = torch.softmax(logits, dim=-2) + V4_EPS
    m = m / (m.sum(dim=-1, keepdim=True) + V4_EPS)
    for _ in range(iterations - 1):
        m = m / (m.sum(dim=-2, keepdim=True) + V4_EPS)
        m = m / (m.sum(dim=-1, keepdim=True) + V4_EPS)
    return m


def permutations(n: int, device=None, dtype=None) -> Tensor:
    """[n!, n, n]: the permutation matrices of n in lexicographic order (the first is I)."""
    eye = torch.eye(n, device=device, dtype=dtype)
    return torch.stack([eye[list(p)] for p in itertools.permutations(range(n))])


def birkhoff(logits: Tensor, n: int) -> Tensor:
    """[..., n!] -> [..., n, n]: softmax-weighted permutations, exactly doubly stochastic."""
    weights = torch.softmax(logits, dim=-1)
    return torch.tensordot(weights, permutations(n, logits.device, logits.dtype), dims=1)


def project(x: Tensor, phi: Tensor, eps: float = NORM_EPS) -> Tensor:
    """v phi^T with v = x / rms(x), Eq. (7): [..., n, C] and [K, n*C] -> [..., K].

    The division by the norm comes after the product, as in the kernels (Eq. 10-14).
    """
    flat = _wide(x).flatten(-2)
    inverse_rms = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + eps)
    return (flat @ phi.to(flat.dtype).t()) * inverse_rms


def coefficients(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    variant: str = "mhc",
    iterations: int = ITERATIONS,
    eps: float = NORM_EPS,
    sinkhorn_kind: str = "paper",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """H_pre [..., n], H_post [..., n], H_res [..., n, n] (None: identity), Eq. (5) or (7)-(9)."""
    n, dtype = x.shape[-2], _wide(x).dtype
    sizes = [n, n, res_rows(n, variant)]
    alpha, bias = alpha.to(dtype), bias.to(dtype)
    scale = torch.cat([a.expand(k) for a, k in zip(alpha, sizes, strict=False)])
    projected = project(x, phi, eps)
    if variant == "hc":
        projected = torch.tanh(projected)
    pre, post, res = (scale * projected + bias).split(sizes, dim=-1)
    if variant == "hc":
        return pre, post, res.unflatten(-1, (n, n))
    H_pre, H_post = torch.sigmoid(pre), 2 * torch.sigmoid(post)
    if variant == "identity":
        return H_pre, H_post, None
    if variant == "birkhoff":
        return H_pre, H_post, birkhoff(res, n)
    res = res.unflatten(-1, (n, n))
    if sinkhorn_kind == "deepseek-v4":
        return H_pre + V4_EPS, H_post, sinkhorn_deepseek_v4(res, iterations)
    return H_pre, H_post, sinkhorn(res, iterations)


def mhc_pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    variant: str = "mhc",
    iterations: int = ITERATIONS,
    eps: float = NORM_EPS,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    sinkhorn_kind: str = "paper",
    with_H_pre: bool = False,
) -> tuple[Tensor, ...]:
    """F_pre: coefficients and u = H_pre x.

    Returns u [..., C] in x's dtype, H_post and H_res in float32 (float64 for a float64 x). With
    ``norm_weight`` [C], u is RMSNorm(H_pre x) * norm_weight, the sublayer's own input norm.
    ``with_H_pre`` adds H_pre [..., n], detached, for ``mhc_refill``; it carries the norm's 1 / rms
    where there is one.
    """
    H_pre, H_post, H_res = coefficients(
        x,
        phi,
        alpha,
        bias,
        variant=variant,
        iterations=iterations,
        eps=eps,
        sinkhorn_kind=sinkhorn_kind,
    )
    u = _mix(H_pre, x)
    if norm_weight is not None:
        inverse = torch.rsqrt(u.square().mean(dim=-1, keepdim=True) + norm_eps)
        u, H_pre = u * inverse * norm_weight, H_pre * inverse
    read = u.to(x.dtype), H_post, H_res
    return (*read, H_pre.detach()) if with_H_pre else read


def mhc_enter(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, **pre_options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``mhc_pre`` at the head of a chain of sublayers: x handed on, u, H_post, H_res."""
    return x, *mhc_pre(x, phi, alpha, bias, **pre_options)


def mhc_post(
    x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None, y_bias: Tensor | None = None
) -> Tensor:
    """F_post,res, Eq. (3): x_next[o] = sum_i H_res[o, i] x[i] + H_post[o] (y + y_bias).

    x [..., n, C], y [..., C], y_bias [C] or None, H_post [..., n], H_res [..., n, n] or None for
    the identity. Returns [..., n, C] in x's dtype; the sums run in float32 or wider.
    """
    wide = _wide(x)
    out = y.to(wide.dtype)
    if y_bias is not None:
        out = out + y_bias.to(wide.dtype)
    mixed = wide
    if H_res is not None:
        mixed = torch.einsum("...oi,...ic->...oc", H_res.to(wide.dtype), wide)
    return (mixed + H_post.to(wide.dtype).unsqueeze(-1) * out.unsqueeze(-2)).to(x.dtype)


def mhc_post_pre(
    x: Tensor,
    y: Tensor,
    H_post: Tensor,
    H_res: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    y_bias: Tensor | None = None,
    **pre_options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The boundary between two sublayers: ``mhc_post`` of one and ``mhc_pre`` of the next.

    Returns x_next, u, H_post', H_res'. ``pre_options`` are ``mhc_pre``'s keywords.
    """
    x_next = mhc_post(x, y, H_post, H_res, y_bias)
    return x_next, *mhc_pre(x_next, phi, alpha, bias, **pre_options)


def mhc_refill(
    x: Tensor,
    y: list[Tensor],
    H_post: list[Tensor],
    H_res: list[Tensor] | list[None],
    H_pre: list[Tensor],
    *,
    y_bias: list[Tensor | None] | None = None,
    norm_weight: list[Tensor | None] | None = None,
    out: tuple[list[Tensor], list[Tensor]] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The streams after every sublayer of a block and what the next one reads, Eq. (20).

    x [..., n, C] enters the block; sublayer l ends with ``mhc_post`` (y[l], H_post[l], H_res[l],
    y_bias[l]), and the next reads with H_pre[l] [..., n]. Returns lists of x_next [..., n, C] and u
    [..., C], copied to ``out`` where given. One H_pre more than y: the first reads x itself.
    ``norm_weight``: of the norm that a read carries (``mhc_pre``), or None.
    """
    ahead, absent = len(H_pre) - len(y), [None] * len(y)
    weights = norm_weight or [None] * len(H_pre)
    streams, reads = [], [_read(*of, x) for of in zip(H_pre[:ahead], weights, strict=False)]
    for y_l, post, res, bias, pre, weight in zip(
        y, H_post, H_res or absent, y_bias or absent, H_pre[ahead:], weights[ahead:], strict=True
    ):
        x = mhc_post(x, y_l, post, res, bias)
        streams.append(x)
        reads.append(_read(pre, weight, x))
    if out is None:
        return streams, reads
    for target, value in zip((*out[0], *out[1]), (*streams, *reads), strict=True):
        target.copy_(value)
    return out


def _read(H_pre: Tensor, norm_weight: Tensor | None, x: Tensor) -> Tensor:
    """u of a refill; H_pre carries 1 / rms where there is a norm's weight."""
    u = _mix(H_pre, x)
    return (u if norm_weight is None else u * norm_weight).to(x.dtype)


def _mix(H_pre: Tensor, x: Tensor) -> Tensor:
    """H_pre x in float32 or wider."""
    wide = _wide(x)
    return torch.einsum("...n,...nc->...c", H_pre.to(wide.dtype), wide)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
