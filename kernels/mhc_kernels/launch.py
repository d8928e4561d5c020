"""Launches of the kernels: outputs, descriptors, grids. No arithmetic and no autograd of its own.

Every function takes contiguous [T, ...] operands with T >= 1 and runs its kernels on the current
stream, each in a fixed order of sums: two runs agree bit for bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .coefficients import coefficients_grad_kernel, split_phi_kernel
from .post import post_kernel
from .post_pre import boundary_grad_kernel, post_project_kernel
from .pre import norm_weight_grad_kernel, phi_grad_kernel, read_grad_kernel, read_kernel
from .reference import permutations, phi_rows, res_rows
from .refill import refill_kernel

INTERPRETED = triton.knobs.runtime.interpret
#: phi entries one program splits, dphi entries one program sums.
PHI_WIDTH = 2048
#: Sublayers one refill launch covers; longer blocks take several.
REFILL_LAYERS = 8


@lru_cache(maxsize=None)
def _device(index: int | None) -> tuple[int, int]:
    """(architecture as in sm90, multiprocessors); the interpreter counts as a small Hopper."""
    if INTERPRETED or index is None:
        return 90, 4
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count


@lru_cache(maxsize=None)
def _permutation_table(n: int, device: torch.device) -> Tensor:
    return permutations(n, device, torch.float32).reshape(-1, n * n).contiguous()


class Plan:
    """What a launch needs to know about its operands: sizes, padding, architecture."""

    def __init__(self, x: Tensor, variant: str = "mhc") -> None:
        self.n, self.C = x.shape[-2:]
        self.T = x.numel() // (self.n * self.C)
        self.device, self.dtype = x.device, x.dtype
        self.arch, self.multiprocessors = _device(x.device.index)
        self.variant = variant
        self.K, self.R = phi_rows(self.n, variant), res_rows(self.n, variant)
        self.KP = max(16, triton.next_power_of_2(self.K))
        self.RP = triton.next_power_of_2(max(1, self.R))
        self.split = x.dtype != torch.float32
        self.pdl = self.arch >= 90 and not INTERPRETED

    def block(self, kernel: str) -> tuning.Block:
        return tuning.block(kernel, self.n, self.C, self.dtype.itemsize, self.arch)

    def new(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def options(self, block: tuning.Block, looped: bool = False) -> dict:
        """Launch options; ``looped``: the kernel has a loop to pipeline."""
        stages = {"STAGES": block.stages} if looped else {}
        return {**block.options(), **stages, "launch_pdl": self.pdl, "PDL": self.pdl}

    def rows(self, t: Tensor, block: tuning.Block, BC: int | None = None) -> TensorDescriptor:
        """Descriptor of a [T, width] view of ``t`` in tiles of the block's shape."""
        width = t.numel() // self.T
        return TensorDescriptor(t, [self.T, width], [width, 1], [block.BT, BC or block.BC])

    def phi(self, phi: Tensor, split: Tensor | None, BC: int, both: bool) -> TensorDescriptor:
        """phi in tiles of all (padded) rows: float32, or its high and low halves, one or both."""
        size = self.n * self.C
        if split is None:
            return TensorDescriptor(phi, [self.K, size], [size, 1], [self.KP, BC])
        shape, strides = [2, self.K, size], [self.K * size, size, 1]
        return TensorDescriptor(split, shape, strides, [1 + both, self.KP, BC])


def _grid(*size: int) -> tuple[int, ...]:
    return size


def _gram_size(n: int, norm: bool) -> int:
    return n * (n + 1) // 2 if norm else 1


def project(
    s: Plan,
    x: Tensor,
    y: Tensor | None,
    y_bias: Tensor | None,
    H_post: Tensor | None,
    H_res: Tensor | None,
    phi: Tensor,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_next (x itself without y) and the partial sums of its projection and squares."""
    b = s.block("project")
    split = None
    if s.split:
        split = s.new(2, s.K, s.n * s.C, dtype=s.dtype)
        blocks = triton.cdiv(phi.numel(), PHI_WIDTH)
        split_phi_kernel[_grid(blocks)](
            phi, split, phi.numel(), WIDTH=PHI_WIDTH, PDL=s.pdl, launch_pdl=s.pdl
        )
    tiles, chunks = triton.cdiv(s.T, b.BT), s.C // b.BC
    parts = tuning.parts(tiles, min(b.split, chunks), s.multiprocessors)
    per_part = triton.cdiv(chunks, parts)
    parts = triton.cdiv(chunks, per_part)
    projected = s.new(parts, s.T, s.KP)
    gram = s.new(parts, s.T, _gram_size(s.n, norm))
    x_next = x if y is None else torch.empty_like(x)
    x_desc = s.rows(x, b)
    post_project_kernel[_grid(tiles, parts)](
        x_desc,
        x_desc if y is None else s.rows(y, b),
        s.rows(x_next, b),
        s.phi(phi, split, b.BC, both=True),
        y_bias,
        H_post,
        H_res,
        projected,
        gram,
        s.T,
        per_part,
        n=s.n,
        C=s.C,
        KP=s.KP,
        BT=b.BT,
        BC=b.BC,
        POST=y is not None,
        RES=H_res is not None,
        Y_BIAS=y_bias is not None,
        GRAM=norm,
        SPLIT=s.split,
        **s.options(b, looped=True),
    )
    return x_next, projected, gram


def read(
    s: Plan,
    x: Tensor,
    projected: Tensor,
    gram_parts: Tensor,
    alpha: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, H_post, H_res and, for backward, p, 1 / rms and the products of streams."""
    b = s.block("read")
    norm = norm_weight is not None
    u, p, inverse_rms = s.new(s.T, s.C, dtype=s.dtype), s.new(s.T, s.K), s.new(s.T)
    H_post, H_res = s.new(s.T, s.n), s.new(s.T, s.n * s.n if s.R else 0)
    gram = s.new(s.T, _gram_size(s.n, True) if norm else 0)
    table = _permutation_table(s.n, s.device) if s.variant == "birkhoff" else None
    read_kernel[_grid(triton.cdiv(s.T, b.BT))](
        x,
        projected,
        gram_parts,
        alpha,
        bias,
        table,
        norm_weight,
        u,
        H_post,
        H_res,
        p,
        inverse_rms,
        gram,
        s.T,
        projected.shape[0],
        eps,
        norm_eps,
        n=s.n,
        C=s.C,
        K=s.K,
        KP=s.KP,
        R=s.R,
        RP=s.RP,
        BT=b.BT,
        BC=b.BC,
        VARIANT=s.variant,
        ITERATIONS=iterations,
        NORM=norm,
        **s.options(b, looped=True),
    )
    return u, H_post, H_res, p, inverse_rms, gram


def logits_grad(
    s: Plan,
    x: Tensor,
    du: Tensor,
    dH_post: Tensor | None,
    dH_res: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    p: Tensor,
    inverse_rms: Tensor,
    gram: Tensor,
    iterations: int,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """token factors, w, sums of dlogits by block, and phi split for the kernels that follow."""
    norm = norm_weight is not None
    b = s.block("read_grad")
    tiles = triton.cdiv(s.T, b.BT)
    split = s.new(2, s.K, s.n * s.C, dtype=torch.bfloat16) if s.split else None
    splitters = triton.cdiv(phi.numel(), PHI_WIDTH) if s.split else 0
    read_grad = s.new(s.T, s.n)
    read_grad_kernel[_grid(tiles + splitters)](
        x, du, norm_weight, read_grad, phi, split, s.T, tiles, phi.numel(),
        n=s.n, C=s.C, K=s.K, BT=b.BT, BC=b.BC, NORM=norm, WIDTH=PHI_WIDTH, **s.options(b, looped=True),
    )  # fmt: skip
    b = s.block("coefficients_grad")
    blocks = triton.cdiv(s.T, b.BT)
    token = s.new(s.T, s.n + 3)
    w = s.new(s.T, 2 * s.KP, dtype=torch.bfloat16) if s.split else s.new(s.T, s.KP)
    sums = s.new(blocks, 2 * s.KP)
    coefficients_grad_kernel[_grid(blocks)](
        p,
        inverse_rms,
        alpha,
        bias,
        _permutation_table(s.n, s.device) if s.variant == "birkhoff" else None,
        gram,
        read_grad,
        dH_post,
        dH_res,
        token,
        w,
        sums,
        s.T,
        n=s.n,
        C=s.C,
        K=s.K,
        KP=s.KP,
        R=s.R,
        RP=s.RP,
        BT=b.BT,
        VARIANT=s.variant,
        ITERATIONS=iterations,
        NORM=norm,
        norm_eps=norm_eps,
        HAS_DPOST=dH_post is not None,
        HAS_DRES=dH_res is not None,
        SPLIT=s.split,
        **s.options(b),
    )
    return token, w, sums, split


def phi_grad(s: Plan, x: Tensor, w: Tensor) -> Tensor:
    """dphi [parts, K, nC]: partial sums over parts of the tokens."""
    b = s.block("phi_grad")
    columns, blocks = s.n * s.C // b.BC, triton.cdiv(s.T, b.BT)
    parts = tuning.parts(columns, min(b.split, blocks), s.multiprocessors, waves=2)
    per_part = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, per_part)
    dphi = s.new(parts, s.K, s.n * s.C)
    phi_grad_kernel[_grid(columns, parts)](
        s.rows(x, b),
        s.rows(w, b, w.shape[1]),
        dphi,
        s.T,
        per_part,
        size=s.n * s.C,
        K=s.K,
        KP=s.KP,
        BT=b.BT,
        BC=b.BC,
        SPLIT=s.split,
        **s.options(b, looped=True),
    )
    return dphi


def boundary_grad(
    s: Plan,
    x: Tensor,
    y: Tensor | None,
    y_bias: Tensor | None,
    H_post: Tensor | None,
    H_res: Tensor | None,
    g: Tensor | None,
    pre: tuple[Tensor, ...] | None,
) -> dict[str, Tensor]:
    """dx, dy, dH_post, dH_res and the finished dphi, dalpha, dbias.

    pre: (du, phi, alpha, token, w, sums, split, dphi parts, norm_weight) or None without a pre.
    """
    b = s.block("boundary_grad")
    du = phi = alpha = token = w = sums = split = dphi_parts = norm_weight = None
    if pre is not None:
        du, phi, alpha, token, w, sums, split, dphi_parts, norm_weight = pre
    out = {"dx": torch.empty_like(x)}
    if y is not None:
        out |= {"dy": torch.empty_like(y), "dH_post": s.new(s.T, s.n)}
        if H_res is not None:
            out["dH_res"] = s.new(s.T, s.n * s.n)
    finishers, phi_parts = 0, 0
    if pre is not None:
        phi_parts = dphi_parts.shape[0]
        out |= {"dalpha": torch.empty_like(alpha), "dbias": s.new(s.K)}
        out["dphi"] = dphi_parts[0] if phi_parts == 1 else s.new(s.K, s.n * s.C)
        finishers = 1 + (triton.cdiv(phi.numel(), PHI_WIDTH) if phi_parts > 1 else 0)
    x_desc = s.rows(x, b)
    boundary_grad_kernel[_grid(finishers + triton.cdiv(s.T, b.BT))](
        x_desc,
        x_desc if y is None else s.rows(y, b),
        x_desc if g is None else s.rows(g, b),
        x_desc if du is None else s.rows(du, b),
        x_desc if phi is None else s.phi(phi, split, b.BC, both=False),
        s.rows(out["dx"], b),
        x_desc if y is None else s.rows(out["dy"], b),
        y_bias,
        norm_weight,
        H_post,
        H_res,
        token,
        w,
        out.get("dH_post"),
        out.get("dH_res"),
        dphi_parts,
        out.get("dphi"),
        sums,
        out.get("dalpha"),
        out.get("dbias"),
        s.T,
        finishers,
        phi_parts,
        0 if sums is None else sums.shape[0],
        n=s.n,
        C=s.C,
        K=s.K,
        KP=s.KP,
        BT=b.BT,
        BC=b.BC,
        PRE=pre is not None,
        POST=y is not None,
        RES=H_res is not None,
        HAS_G=g is not None,
        Y_BIAS=y_bias is not None,
        NORM=norm_weight is not None,
        RES_ALPHA=s.R > 0,
        SPLIT=s.split,
        WIDTH=PHI_WIDTH,
        **s.options(b, looped=True),
    )
    return out


def norm_weight_grad(s: Plan, x: Tensor, du: Tensor, token: Tensor, weight: Tensor) -> Tensor:
    out = s.new(s.C)
    norm_weight_grad_kernel[_grid(s.C // 16)](
        x, du, token, out, s.T, n=s.n, C=s.C, BT=64, BC=16, PDL=s.pdl, launch_pdl=s.pdl
    )
    return out.to(weight.dtype)


def post(
    s: Plan, x: Tensor, y: Tensor, y_bias: Tensor | None, H_post: Tensor, H_res: Tensor | None
) -> Tensor:
    """x_next alone."""
    b = s.block("post")
    x_next = torch.empty_like(x)
    post_kernel[_grid(s.C // b.BC, triton.cdiv(s.T, b.BT))](
        x, y, x_next, y_bias, H_post, H_res, s.T,
        n=s.n, C=s.C, BT=b.BT, BC=b.BC, RES=H_res is not None, Y_BIAS=y_bias is not None,
        **s.options(b),
    )  # fmt: skip
    return x_next


def refill(
    s: Plan,
    x: Tensor,
    y: list[Tensor],
    H_post: list[Tensor],
    H_res: list[Tensor] | None,
    H_pre: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """x_next and u of every sublayer, ``REFILL_LAYERS`` a launch."""
    b = s.block("refill")
    x_next, u = [torch.empty_like(x) for _ in y], [torch.empty_like(t) for t in y]
    for first in range(0, len(y), REFILL_LAYERS):
        part = slice(first, min(first + REFILL_LAYERS, len(y)))
        refill_kernel[_grid(s.C // b.BC, triton.cdiv(s.T, b.BT))](
            x, tuple(y[part]), tuple(H_post[part]), tuple(H_res[part]) if H_res else (),
            tuple(H_pre[part]), tuple(x_next[part]), tuple(u[part]), s.T,
            L=part.stop - first, n=s.n, C=s.C, BT=b.BT, BC=b.BC, RES=bool(H_res),
            **s.options(b),
        )  # fmt: skip
        x = x_next[part][-1]
    return x_next, u
