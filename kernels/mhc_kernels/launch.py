"""Launches of the kernels: outputs, descriptors, grids. No arithmetic and no autograd of its own.

Every function takes contiguous operands of the same T >= 1 tokens, in whatever dimensions these
come, and runs its kernels on the current stream, each in a fixed order of sums: two runs agree bit
for bit. The host's time counts (docs/kernels.md): what a shape decides is kept in its ``Plan``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .coefficients import split_phi_kernel
from .hopper import boundary_grad_hopper_kernel, post_project_hopper_kernel
from .post import post_kernel
from .post_pre import boundary_grad_kernel, post_project_kernel
from .pre import logits_grad_kernel, norm_weight_grad_kernel, phi_grad_kernel, read_kernel
from .reference import permutations, phi_rows, res_rows
from .refill import refill_kernel
from .relaunch import Tiles

INTERPRETED = triton.knobs.runtime.interpret
#: phi entries one program splits, dphi entries one program sums.
PHI_WIDTH = 2048
#: Programs that add up dalpha and dbias.
FINISHERS = 32
#: Sublayers one refill launch covers; longer blocks take several.
REFILL_LAYERS = 8


@cache
def _device(index: int | None) -> tuple[int, int]:
    """(architecture as in sm90, multiprocessors); the interpreter counts as a small Hopper."""
    if INTERPRETED or index is None:
        return 90, 4
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count


@cache
def _permutation_table(n: int, device: torch.device) -> Tensor:
    return permutations(n, device, torch.float32).reshape(-1, n * n).contiguous()


def cdiv(a: int, b: int) -> int:
    """``triton.cdiv`` for ints alone, which takes a tenth of its time."""
    return -(-a // b)


def plan(x: Tensor, variant: str = "mhc") -> Plan:
    """The plan for operands like x, made once."""
    return _plan(x.shape, x.dtype, x.device, variant, _device(x.device.index))


@lru_cache(maxsize=256)
def _plan(shape: torch.Size, dtype: torch.dtype, device: torch.device, variant: str, gpu) -> Plan:
    return Plan(shape, dtype, device, variant, gpu)


class Plan:
    """What a launch needs to know about its operands: sizes, padding, architecture.

    ``tokens`` are the dimensions before n and C, T their product.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        variant: str,
        gpu: tuple[int, int],
    ) -> None:
        self.tokens, (self.n, self.C) = shape[:-2], shape[-2:]
        self.T = self.tokens.numel()
        self.device, self.dtype = device, dtype
        self.arch, self.multiprocessors = gpu
        self.variant = variant
        self.K, self.R = phi_rows(self.n, variant), res_rows(self.n, variant)
        self.KP = max(16, triton.next_power_of_2(self.K))
        self.RP = triton.next_power_of_2(max(1, self.R))
        self.split = dtype != torch.float32
        # sm_90's compiler repeats arithmetic for every use; newer ones refuse the fence.
        self.pin = self.arch == 90 and not INTERPRETED
        self.hopper = self.pin and dtype == torch.bfloat16 and self.n <= 4
        self.pdl = self.arch >= 90 and not INTERPRETED
        self._tiles: dict[tuple, Tiles] = {}
        # Of no bytes: ``new_empty`` takes the host half the time of ``empty`` with its keywords.
        self._floats = torch.empty(0, dtype=torch.float32, device=device)

    def block(self, kernel: str) -> tuning.Block:
        return tuning.block(kernel, self.n, self.C, self.dtype.itemsize, self.arch)

    def slots(self, block: tuning.Block) -> int:
        """Blocks of a kernel that fills the registers with eight warps that run at once."""
        return self.multiprocessors * max(1, 8 // block.warps)

    def phi_columns(self) -> int:
        """Blocks of columns in ``phi_grad``."""
        return self.n * self.C // self.block("phi_grad").BC

    def boundary_tiles(self) -> int:
        """Tiles of tokens in ``boundary_grad``, at most."""
        names = "boundary_grad", "boundary_grad_hopper", "post_grad_hopper"
        return cdiv(self.T, min(self.block(name).BT for name in names))

    def new(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory, of float32 where no other type is asked for."""
        if dtype is None:
            return self._floats.new_empty(*size)
        return self._floats.new_empty(size, dtype=dtype)

    def options(self, block: tuning.Block, looped: bool = False) -> dict:
        """Launch options; ``looped``: the kernel has a loop to pipeline."""
        stages = {"STAGES": block.stages} if looped else {}
        return {**block.options(), **stages, "launch_pdl": self.pdl, "PDL": self.pdl}

    def tiles(self, t: Tensor, name: tuple, geometry: Callable[[], tuple]):
        """Descriptor of t in tiles; ``geometry`` is asked once for a name and a type of t.

        It says the tile, sizes, strides and, for Gluon, the bytes of a row in shared memory.
        """
        known = t.dtype, *name
        tiles = self._tiles.get(known)
        if tiles is None:
            tile, sizes, strides, width = geometry()
            fields = {"shape": sizes, "strides": strides, "block_shape": tile}
            kind = TensorDescriptor
            if width:
                kind, fields["layout"] = HopperDescriptor, NVMMASharedLayout(width, 16, len(tile))
            tiles = self._tiles[known] = Tiles(kind, t, **fields)
        return tiles.of(t)

    def rows(self, t: Tensor, b: tuning.Block, BC: int = 0, gluon: bool = False):
        """Descriptor of a [T, width] view of ``t`` in tiles of the block's shape."""
        width, BC = t.numel() // self.T, BC or b.BC

        def geometry():
            return [b.BT, BC], [self.T, width], [width, 1], t.dtype.itemsize * BC if gluon else 0

        return self.tiles(t, ("rows", b.BT, BC, width, gluon), geometry)

    def hopper_streams(self, t: Tensor, b: tuning.Block) -> HopperDescriptor:
        """Descriptor of [T, n, C] as n tiles, one a stream, in one copy."""
        def geometry():
            n, C = self.n, self.C
            return [n, b.BT, b.BC], [n, self.T, C], [C, n * C, 1], 2 * b.BC

        return self.tiles(t, ("hopper_streams", b.BT, b.BC), geometry)

    def hopper_phi(self, split: Tensor, b: tuning.Block, streams_first: bool) -> HopperDescriptor:
        """phi's high and low halves, all rows, of BC channels of every stream in one copy.

        The tile is [2, n, KP, BC], or [n, 2, KP, BC] with ``streams_first``.
        """
        def geometry():
            n, C, K = self.n, self.C, self.K
            half, stream = (2, K * n * C), (n, C)
            outer = (stream, half) if streams_first else (half, stream)
            sizes, strides = zip(*outer, (K, n * C), (C, 1), strict=True)
            tile = [outer[0][0], outer[1][0], self.KP, b.BC]
            return tile, list(sizes), list(strides), 2 * b.BC

        return self.tiles(split, ("hopper_phi", b.BC, streams_first), geometry)

    def phi(self, phi: Tensor, split: Tensor | None, BC: int, both: bool) -> TensorDescriptor:
        """phi in tiles of all (padded) rows: float32, or its high and low halves, one or both."""
        def geometry():
            K, KP, size = self.K, self.KP, self.n * self.C
            if split is None:
                return [KP, BC], [K, size], [size, 1], 0
            return [1 + both, KP, BC], [2, K, size], [K * size, size, 1], 0

        return self.tiles(phi if split is None else split, ("phi", BC, both), geometry)


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
    fast = s.hopper and y_bias is None
    b = s.block("project_hopper" if fast else "project")
    split = None
    if s.split:
        split = s.new(2, s.K, s.n * s.C, dtype=s.dtype)
        blocks = cdiv(phi.numel(), PHI_WIDTH)
        split_phi_kernel[_grid(blocks)](
            phi, split, phi.numel(), WIDTH=PHI_WIDTH, PDL=s.pdl, launch_pdl=s.pdl
        )
    tiles, chunks = cdiv(s.T, b.BT), s.C // b.BC
    parts = tuning.parts(tiles, chunks, b.split, s.slots(b))
    per_part = cdiv(chunks, parts)
    parts = cdiv(chunks, per_part)
    projected = s.new(parts, s.T, s.KP)
    gram = s.new(parts, s.T, _gram_size(s.n, norm))
    x_next = x if y is None else torch.empty_like(x)
    if fast:
        post_project_hopper_kernel[_grid(tiles, parts)](
            s.hopper_streams(x, b),
            s.rows(x if y is None else y, b, gluon=True),
            s.hopper_streams(x_next, b),
            s.hopper_phi(split, b, streams_first=True),
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
            WN=16 * b.warps // b.BT,
            POST=y is not None,
            RES=H_res is not None,
            GRAM=norm,
            STAGES=b.stages,
            PDL=s.pdl,
            num_warps=b.warps,
            launch_pdl=s.pdl,
        )
        return x_next, projected, gram
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
        PIN=s.pin,
        **s.options(b, looped=True),
    )
    return x_next, projected, gram


def read_outputs(x: Tensor, variant: str, norm: bool) -> tuple[Tensor, ...]:
    """Memory for what ``read`` returns, each with the leading dimensions of x."""
    *tokens, n, C = x.shape
    floats = x if x.dtype == torch.float32 else x.new_empty(0, dtype=torch.float32)
    u = x.new_empty(*tokens, C)
    H_post, H_pre = floats.new_empty(*tokens, n), floats.new_empty(*tokens, n)
    H_res = floats.new_empty(*tokens, n if res_rows(n, variant) else 0, n)
    gram = floats.new_empty(*tokens, _gram_size(n, True) if norm else 0)
    p, inverse_rms = floats.new_empty(*tokens, phi_rows(n, variant)), floats.new_empty(tokens)
    return u, H_post, H_res, p, inverse_rms, gram, H_pre


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, H_post, H_res; for backward p, 1 / rms and the products of streams; for refill H_pre."""
    b = s.block("read")
    norm = norm_weight is not None
    u, H_post, H_res, p, inverse_rms, gram, H_pre = outputs = read_outputs(x, s.variant, norm)
    table = _permutation_table(s.n, s.device) if s.variant == "birkhoff" else None
    read_kernel[_grid(cdiv(s.T, b.BT))](
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
        H_pre,
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
    return outputs


@dataclass
class LogitsGrad:
    """What the gradient of the logits leaves for the kernels after it."""

    token: Tensor  # [T, n + 4]: H_pre, the norm's two shares, two factors of a fused norm
    w: Tensor  # [T, 2 KP] bf16 high and low, or [T, KP] float32
    sums: Tensor  # [blocks, 2 KP]: sums of dlogits and dlogits * p
    split: Tensor | None  # [2, K, nC] bf16: phi, high and low
    counters: Tensor  # int32 zeros: one a block of phi_grad, one, one a tile of boundary_grad


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
) -> LogitsGrad:
    """The gradient of the logits, from du and dH."""
    b, logit_b = s.block("read_grad"), s.block("logits_grad")
    tiles = cdiv(s.T, b.BT)
    programs = tiles * (b.BT // logit_b.BT + 1)
    counters = s.new(s.phi_columns() + 1 + s.boundary_tiles(), dtype=torch.int32)
    out = LogitsGrad(
        token=s.new(s.T, s.n + 4),
        w=s.new(s.T, 2 * s.KP, dtype=torch.bfloat16) if s.split else s.new(s.T, s.KP),
        sums=s.new(programs, 2 * s.KP),
        split=s.new(2, s.K, s.n * s.C, dtype=torch.bfloat16) if s.split else None,
        counters=counters,
    )
    last = max(phi.numel() if s.split else 0, counters.numel())
    logits_grad_kernel[_grid(programs + cdiv(last, PHI_WIDTH))](
        x,
        du,
        norm_weight,
        p,
        inverse_rms,
        alpha,
        bias,
        _permutation_table(s.n, s.device) if s.variant == "birkhoff" else None,
        gram,
        dH_post,
        dH_res,
        out.token,
        out.w,
        out.sums,
        counters,
        phi,
        out.split,
        s.T,
        tiles,
        counters.numel(),
        phi.numel(),
        norm_eps,
        n=s.n,
        C=s.C,
        K=s.K,
        KP=s.KP,
        R=s.R,
        RP=s.RP,
        BT=b.BT,
        BC=b.BC,
        LOGIT_BT=logit_b.BT,
        VARIANT=s.variant,
        ITERATIONS=iterations,
        NORM=norm_weight is not None,
        HAS_DPOST=dH_post is not None,
        HAS_DRES=dH_res is not None,
        SPLIT=s.split,
        WIDTH=PHI_WIDTH,
        **s.options(b, looped=True),
    )
    return out


def phi_grad(
    s: Plan, x: Tensor, logits: LogitsGrad, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dphi [K, nC], dalpha and dbias."""
    b = s.block("phi_grad")
    columns, blocks = s.phi_columns(), cdiv(s.T, b.BT)
    parts = tuning.parts(columns, blocks, b.split, 3 * s.multiprocessors)
    per_part = cdiv(blocks, parts)
    parts = cdiv(blocks, per_part)
    dphi, dalpha, dbias = s.new(s.K, s.n * s.C), torch.empty_like(alpha), s.new(s.K)
    phi_grad_kernel[_grid(FINISHERS + columns, parts)](
        s.rows(x, b),
        s.rows(logits.w, b, logits.w.shape[1]),
        s.new(parts if parts > 1 else 0, s.K, s.n * s.C),
        dphi,
        logits.counters,
        logits.sums,
        s.new(FINISHERS, 2 * s.KP),
        dalpha,
        dbias,
        s.T,
        columns,
        parts,
        per_part,
        logits.sums.shape[0],
        n=s.n,
        C=s.C,
        K=s.K,
        KP=s.KP,
        BT=b.BT,
        BC=b.BC,
        FINISHERS=FINISHERS,
        RES=s.R > 0,
        SPLIT=s.split,
        **s.options(b, looped=True),
    )
    return dphi, dalpha, dbias


def boundary_grad(
    s: Plan,
    x: Tensor,
    y: Tensor | None,
    y_bias: Tensor | None,
    H_post: Tensor | None,
    H_res: Tensor | None,
    g: Tensor | None,
    du: Tensor | None = None,
    phi: Tensor | None = None,
    norm_weight: Tensor | None = None,
    logits: LogitsGrad | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dy, dH_post, dH_res. Without y: of a pre alone; without logits: of a post alone.

    And, where the kernel makes it by the way, the gradient of norm_weight, else None.
    """
    fast = s.hopper and y_bias is None
    hopper = "post_grad_hopper" if logits is None else "boundary_grad_hopper"
    b = s.block(hopper if fast else "boundary_grad")
    tiles, chunks = cdiv(s.T, b.BT), s.C // b.BC
    parts = tuning.parts(tiles, chunks, b.split, s.slots(b))
    per_part = cdiv(chunks, parts)
    parts = cdiv(chunks, per_part)
    dx, dy, dH_post, dH_res, partial = torch.empty_like(x), None, None, None, None
    counters = None if logits is None else logits.counters[s.phi_columns() + 1 :]
    if y is not None:
        dy, dH_post = torch.empty_like(y), torch.empty_like(H_post)
        dH_res = None if H_res is None else torch.empty_like(H_res)
        partial = s.new(s.n + (0 if H_res is None else s.n * s.n), parts, s.T)
        if counters is None:
            counters = torch.zeros(tiles, dtype=torch.int32, device=s.device)
    sums = (dH_post, dH_res, partial, counters, s.T, parts, per_part)
    if fast:
        dweight = _boundary_grad_hopper(
            s, b, tiles, x, y, g, du, H_post, H_res, norm_weight, logits, dx, dy, sums
        )
        return dx, dy, dH_post, dH_res, dweight
    x_desc = s.rows(x, b)
    boundary_grad_kernel[_grid(tiles, parts)](
        x_desc,
        x_desc if y is None else s.rows(y, b),
        x_desc if g is None else s.rows(g, b),
        x_desc if du is None else s.rows(du, b),
        x_desc if phi is None else s.phi(phi, logits.split, b.BC, both=False),
        s.rows(dx, b),
        x_desc if y is None else s.rows(dy, b),
        y_bias,
        norm_weight,
        H_post,
        H_res,
        None if logits is None else logits.token,
        None if logits is None else logits.w,
        *sums,
        n=s.n,
        C=s.C,
        K=s.K,
        KP=s.KP,
        BT=b.BT,
        BC=b.BC,
        PRE=logits is not None,
        POST=y is not None,
        RES=H_res is not None,
        HAS_G=g is not None,
        Y_BIAS=y_bias is not None,
        NORM=norm_weight is not None,
        SPLIT=s.split,
        PIN=s.pin,
        **s.options(b, looped=True),
    )
    return dx, dy, dH_post, dH_res, None


def _boundary_grad_hopper(
    s: Plan,
    b: tuning.Block,
    tiles: int,
    x: Tensor,
    y: Tensor | None,
    g: Tensor | None,
    du: Tensor | None,
    H_post: Tensor | None,
    H_res: Tensor | None,
    norm_weight: Tensor | None,
    logits: LogitsGrad | None,
    dx: Tensor,
    dy: Tensor | None,
    sums: tuple,
) -> Tensor | None:
    """``boundary_grad`` through the Gluon kernel; returns the gradient of norm_weight."""
    n, C = s.n, s.C
    norm = norm_weight is not None
    dweight = s.new(tiles * (b.BT // 16), C) if norm else None
    phi = w = None
    if logits is not None:
        phi = s.hopper_phi(logits.split, b, streams_first=False)
        w = s.rows(logits.w, b, s.KP, gluon=True)

    def row_or_x(t: Tensor | None) -> HopperDescriptor:
        return s.rows(x if t is None else t, b, gluon=True)

    boundary_grad_hopper_kernel[_grid(tiles, sums[5])](
        s.hopper_streams(x, b),
        row_or_x(y),
        s.hopper_streams(x if g is None else g, b),
        row_or_x(du),
        row_or_x(None) if phi is None else phi,
        row_or_x(None) if w is None else w,
        s.hopper_streams(dx, b),
        row_or_x(dy),
        norm_weight,
        dweight,
        H_post,
        H_res,
        None if logits is None else logits.token,
        *sums,
        n=n,
        C=C,
        K=s.K,
        KP=s.KP,
        BT=b.BT,
        BC=b.BC,
        WN=16 * b.warps // b.BT,
        PRE=logits is not None,
        POST=y is not None,
        RES=H_res is not None,
        HAS_G=g is not None,
        NORM=norm,
        STAGES=b.stages,
        PDL=s.pdl,
        num_warps=b.warps,
        launch_pdl=s.pdl,
    )
    return dweight.sum(0).to(norm_weight.dtype) if norm else None


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
    post_kernel[_grid(s.C // b.BC, cdiv(s.T, b.BT))](
        x, y, x_next, y_bias, H_post, H_res, s.T,
        n=s.n, C=s.C, BT=b.BT, BC=b.BC, RES=H_res is not None, Y_BIAS=y_bias is not None,
        **s.options(b),
    )  # fmt: skip
    return x_next


def refill(
    s: Plan,
    x: Tensor,
    y: list[Tensor],
    y_bias: list[Tensor | None],
    H_post: list[Tensor],
    H_res: list[Tensor] | None,
    H_pre: list[Tensor],
    norm_weight: list[Tensor | None],
    x_next: list[Tensor],
    u: list[Tensor],
) -> None:
    """Writes x_next and u of every sublayer, ``REFILL_LAYERS`` a launch.

    One H_pre and u more than y: the first are the read of x itself.
    """
    b, ahead = s.block("refill"), len(u) - len(y)
    for first in range(0, max(1, len(y)), REFILL_LAYERS):
        part = slice(first, min(first + REFILL_LAYERS, len(y)))
        opens = ahead if first == 0 else 0
        reads = slice(part.start + ahead - opens, part.stop + ahead)
        biases, has_bias = _given(y_bias[part], x)
        weights, has_norm = _given(norm_weight[reads], x)
        refill_kernel[_grid(s.C // b.BC, cdiv(s.T, b.BT))](
            x, tuple(y[part]), biases, tuple(H_post[part]), tuple(H_res[part]) if H_res else (),
            tuple(H_pre[reads]), weights, tuple(x_next[part]), tuple(u[reads]), s.T,
            L=part.stop - first, FIRST=opens, n=s.n, C=s.C, BT=b.BT, BC=b.BC, RES=bool(H_res),
            Y_BIAS=has_bias, NORM=has_norm, **s.options(b),
        )  # fmt: skip
        x = x_next[part][-1] if y else x


def _given(tensors: list[Tensor | None], other: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """The tensors, ``other`` where there is none, and a bit mask of those that there are."""
    mask = sum(1 << i for i, t in enumerate(tensors) if t is not None)
    return tuple(other if t is None else t for t in tensors), mask
