#!/usr/bin/env python3
"""Experiment: the read writes norm(u) as FP8, as Transformer Engine's blockwise recipe would.

    python tools/try_fp8_u.py                          # one Hopper GPU, Transformer Engine 2.20
    python tools/try_fp8_u.py --shapes 16384x2560 --rounds 12
    TRITON_INTERPRET=1 python tools/try_fp8_u.py --check     # the bytes, without a GPU

Today ``pre.read_kernel`` writes norm(u) in bf16 and every FP8 linear behind it quantises it: e4m3,
one power-of-two scale for 128 channels of a token (rows, for the forward's product), and a
transposed copy with one scale for 128 tokens of a channel (columns, for the weight's gradient).
Here the read does that itself, with the same bytes and scales:

- ``rows``: ``read_kernel`` and the rows, with or without u in bf16. It has 8 tokens a tile, so no
  columns: a linear must make them from bf16 later, and Transformer Engine takes no tensor without
  columns as the input of a linear that trains.
- ``both``: a kernel for the coefficients alone, then one for tiles of 128 tokens by 128 channels
  that writes rows and columns, with or without u in bf16.

Bytes that must move, per token and channel at n = 4 (x in bf16 is 8):

| | u in bf16 | FP8 | together |
|---|---:|---:|---:|
| read alone | 2 | | 10 |
| read, quantised by one linear (reads 2, writes 1 + 1) | 2 | 4 | 14 |
| read, quantised by two linears (latent attention: queries, keys and values) | 2 | 8 | 18 |
| rows, and u | 2 | 1 | 11 |
| rows alone | | 1 | 9 |
| both, and u | 2 | 2 | 12 |
| both alone | | 2 | 10 |

Prediction, made before any run, ms on an H200 (4.26 TB/s; on an H100, 2.95 TB/s, 1.44 times that):

| | 16384 x 2560 | 4096 x 7168 |
|---|---:|---:|
| read | 0.112 | 0.080 |
| read + one quantisation | 0.167 | 0.118 |
| read + two quantisations | 0.222 | 0.156 |
| rows and u | 0.122 | 0.087 |
| both and u | 0.142 | 0.101 |
| both | 0.122 | 0.087 |

So rows alone win nothing: 11 bytes and 3 later for the columns are the 14 of today. ``both``
without u saves 0.045 ms behind one linear and 0.10 ms in front of the two of latent attention. Who
can do without u in bf16 is few: a router and a dispatch to experts read u, ``GroupedLinear`` takes
no FP8 input, and the dense layers of Megatron's Transformer Engine spec norm u themselves. That
leaves latent attention: four sublayers of the 27B slice of docs/performance.md, 0.4 ms of its
249.6, 0.16 % of the step. With u as well (12 against 18) 0.08 ms.

Every time is the median of replays of a CUDA graph, each with a cold L2, in turns
(``kernel_bench/timing.py``). What fails is said and the rest is measured. The table comes last.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

for folder in ("kernels", "tools"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

from mhc_kernels import launch  # noqa: E402
from mhc_kernels.device import column_of, wait_for_inputs  # noqa: E402
from mhc_kernels.pre import (  # noqa: E402
    load_gram,
    load_weight,
    read_scale,
    write_coefficients,
)

#: Channels of a token, or tokens of a channel, that share a scale.
BLOCK = 128
#: Of Sinkhorn (the interpreter is slow, and H_res is not what is tested in it), norms' epsilons.
ITERATIONS, EPS, NORM_EPS = 1 if launch.INTERPRETED else 20, 1e-20, 1e-6
#: Warps and stages of the tile kernel.
TILES = ((8, 3), (8, 2), (16, 2), (16, 0))


# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def power_of_two_scales(amax):
    """2^floor(log2(448 / amax)) and its inverse, from the bits: no division that rounds.

    Transformer Engine's: 1 where amax is 0 or not finite, at most 2^127.
    """
    bits = amax.to(tl.int32, bitcast=True)
    above = (bits & 0x7FFFFF) > 0x600000  # the mantissa is beyond 448's, 1.75
    exponent = tl.minimum(262 - (bits >> 23) - above.to(tl.int32), 254)
    exponent = tl.where((bits == 0) | (bits >= 0x7F800000), 127, exponent)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = tl.where(exponent == 254, 0x00400000, (254 - exponent) << 23)
    return scale, inverse.to(tl.float32, bitcast=True)


@triton.jit
def write_rows(
    u, rows_ptr, scale_ptr, rows, channels, block, mask, scale_stride, C: tl.constexpr
):  # fmt: skip
    """u [BT, 128] as e4m3 with one scale a token, in row ``block`` of [C / 128, scale_stride]."""
    scale, inverse = power_of_two_scales(tl.max(tl.abs(u), axis=1))
    values = (u * scale[:, None]).to(tl.float8e4nv)
    tl.store(rows_ptr + rows[:, None] * C + channels[None, :], values, mask=mask[:, None])
    tl.store(scale_ptr + block * scale_stride + rows, inverse, mask=mask)


@triton.jit(do_not_specialize=["T", "parts", "scale_stride"])
def read_fp8_kernel(
    x_ptr, projected_ptr, gram_parts_ptr, alpha_ptr, bias_ptr, norm_weight_ptr, u_ptr, rows_ptr,
    scale_ptr, H_post_ptr, H_res_ptr, p_ptr, inverse_rms_ptr, gram_ptr, H_pre_ptr, T, parts,
    scale_stride, eps, norm_eps, n: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
    VARIANT: tl.constexpr, ITERATIONS: tl.constexpr, BF16: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``pre.read_kernel`` with a norm; BF16 writes norm(u), ROWS its rows, neither: H alone."""
    wait_for_inputs(PDL)
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    mask = rows < T
    part_rows = T.to(tl.int64)
    gram = load_gram(gram_parts_ptr, gram_ptr, rows, mask, parts, part_rows, n)
    e = tl.arange(0, n * n)
    square = tl.sum(tl.where((e // n == e % n)[None, :], gram, 0.0), axis=1)
    inverse_rms = tl.rsqrt(square / (n * C) + eps)
    tl.store(inverse_rms_ptr + rows, inverse_rms, mask=mask)
    H_pre = write_coefficients(
        projected_ptr, parts, part_rows * KP, inverse_rms, alpha_ptr, bias_ptr, None,
        p_ptr, H_post_ptr, H_res_ptr, rows, mask, n, K, KP, R, RP, BT, VARIANT, ITERATIONS,
    )  # fmt: skip
    H_pre *= read_scale(gram, H_pre, norm_eps, n, C)[:, None]
    tl.store(H_pre_ptr + rows[:, None] * n + tl.arange(0, n)[None, :], H_pre, mask=mask[:, None])
    if BF16 or ROWS:
        weights = ()
        for i in tl.static_range(n):
            weights = weights + (column_of(H_pre, i, n)[:, None],)
        for block in tl.range(0, C // BLOCK, num_stages=STAGES):
            channels = block * BLOCK + tl.arange(0, BLOCK)
            at = rows[:, None] * (n * C) + channels[None, :]
            u = tl.zeros([BT, BLOCK], tl.float32)
            for i in tl.static_range(n):
                x = tl.load(x_ptr + at + i * C, mask=mask[:, None], other=0.0).to(tl.float32)
                u = tl.fma(weights[i], x, u)
            rounded = (u * load_weight(norm_weight_ptr, channels, C, BLOCK)).to(tl.bfloat16)
            if BF16:
                to = u_ptr + rows[:, None] * C + channels[None, :]
                tl.store(to, rounded, mask=mask[:, None])
            if ROWS:
                u = rounded.to(tl.float32)
                write_rows(u, rows_ptr, scale_ptr, rows, channels, block, mask, scale_stride, C)


@triton.jit(do_not_specialize=["groups", "scale_stride"])
def tile_fp8_kernel(
    x_ptr, H_pre_ptr, norm_weight_ptr, u_ptr, rows_ptr, scale_ptr, columns_ptr, column_scale_ptr,
    groups, scale_stride, n: tl.constexpr, C: tl.constexpr, BF16: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """norm(u) of 128 tokens by 128 channels: rows [T, C], columns [C, T], BF16: u [T, C].

    H_pre [T, n] carries 1 / rms. column_scale [T / 128, C]. T is ``groups`` times ALIGN tokens, at
    most 16: so many bytes of a column are stored at a time. STAGES: the streams pass through shared
    memory, that many at a time; 0: through registers, all at once.
    """
    wait_for_inputs(PDL)
    T = groups * ALIGN
    rows = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = rows < T
    block = tl.program_id(0)
    channels = block * BLOCK + tl.arange(0, BLOCK)
    at = rows[:, None] * (n * C) + channels[None, :]
    u = tl.zeros([BLOCK, BLOCK], tl.float32)
    if STAGES == 0:
        for i in tl.static_range(n):
            u = add_stream(u, i, x_ptr, at, H_pre_ptr, rows, mask, n, C)
    else:
        for i in tl.range(0, n, num_stages=STAGES):
            u = add_stream(u, i, x_ptr, at, H_pre_ptr, rows, mask, n, C)
    rounded = (u * load_weight(norm_weight_ptr, channels, C, BLOCK)).to(tl.bfloat16)
    if BF16:
        tl.store(u_ptr + rows[:, None] * C + channels[None, :], rounded, mask=mask[:, None])
    u = rounded.to(tl.float32)
    write_rows(u, rows_ptr, scale_ptr, rows, channels, block, mask, scale_stride, C)
    scale, inverse = power_of_two_scales(tl.max(tl.abs(u), axis=0))
    tl.store(column_scale_ptr + tl.program_id(1) * C + channels, inverse)
    columns = tl.trans((u * scale[None, :]).to(tl.float8e4nv))
    to = columns_ptr + channels.to(tl.int64)[:, None] * T + rows[None, :]
    tl.store(to, columns, mask=mask[None, :])


@triton.jit
def add_stream(u, i, x_ptr, at, H_pre_ptr, rows, mask, n: tl.constexpr, C: tl.constexpr):
    """u + H_pre[i] x[i]."""
    x = tl.load(x_ptr + at + i * C, mask=mask[:, None], other=0.0).to(tl.float32)
    return tl.fma(tl.load(H_pre_ptr + rows * n + i, mask=mask, other=0.0)[:, None], x, u)


@triton.jit
def scales_kernel(amax_ptr, scale_ptr, inverse_ptr, SIZE: tl.constexpr):
    """``power_of_two_scales`` of SIZE numbers, to test it."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    scale, inverse = power_of_two_scales(tl.load(amax_ptr + at))
    tl.store(scale_ptr + at, scale)
    tl.store(inverse_ptr + at, inverse)


# --------------------------------------------------------------------------------------- launches


@dataclass
class Operands:
    """What a read takes: x [T, n, C], the projection's and the products' parts, parameters."""

    plan: launch.Plan
    x: Tensor
    projected: Tensor
    gram: Tensor
    alpha: Tensor
    bias: Tensor
    norm_weight: Tensor


@dataclass
class Quantised:
    """norm(u) of T tokens: u [T, C] bf16, e4m3 rows [T, C] and columns [C, T], their scales.

    scale [C / 128, T] and column_scale [T / 128, C] are float32 factors to multiply with, their
    last dimension padded to a multiple of 4, as Transformer Engine's matrix products take them.
    """

    H_pre: Tensor
    u: Tensor | None = None
    rows: Tensor | None = None
    scale: Tensor | None = None
    columns: Tensor | None = None
    column_scale: Tensor | None = None


def _allocate(o: Operands, u: bool, rows: bool, columns: bool) -> Quantised:
    s, e4m3 = o.plan, torch.float8_e4m3fn
    out = Quantised(s.new(s.T, s.n))
    if u:
        out.u = s.new(s.T, s.C, dtype=torch.bfloat16)
    if rows:
        out.rows = s.new(s.T, s.C, dtype=e4m3)
        out.scale = s.new(s.C // 128, triton.cdiv(s.T, 4) * 4)
    if columns:
        out.columns = s.new(s.C, s.T, dtype=e4m3)
        out.column_scale = s.new(triton.cdiv(s.T, 128), s.C)
    return out


def read_rows(o: Operands, u: bool, rows: bool = True) -> Quantised:
    """The read with rows in FP8; with neither u nor rows the coefficients alone."""
    s, out = o.plan, _allocate(o, u, rows, False)
    b = s.block("read")
    # One scale wide: narrower than the package's tiles, so more of them at a time.
    b = replace(b, stages=b.stages * max(1, b.BC // BLOCK))
    read_fp8_kernel[(triton.cdiv(s.T, b.BT),)](
        o.x, o.projected, o.gram, o.alpha, o.bias, o.norm_weight, out.u, out.rows, out.scale,
        s.new(s.T, s.n), s.new(s.T, s.n, s.n), s.new(s.T, s.K), s.new(s.T),
        s.new(s.T, launch._gram_size(s.n, True)), out.H_pre, s.T, o.projected.shape[0],
        out.scale.shape[1] if rows else 0, EPS, NORM_EPS,
        n=s.n, C=s.C, K=s.K, KP=s.KP, R=s.R, RP=s.RP, BT=b.BT, VARIANT=s.variant,
        ITERATIONS=ITERATIONS, BF16=u, ROWS=rows, BLOCK=BLOCK, **s.options(b, looped=True),
    )  # fmt: skip
    return out


def read_both(o: Operands, u: bool, tile: tuple[int, int] = TILES[0]) -> Quantised:
    """Coefficients, then rows and columns in FP8."""
    s, out = o.plan, _allocate(o, u, True, True)
    out.H_pre = read_rows(o, u=False, rows=False).H_pre
    warps, stages = tile
    align = math.gcd(s.T, 16)
    tile_fp8_kernel[(s.C // 128, triton.cdiv(s.T, 128))](
        o.x, out.H_pre, o.norm_weight, out.u, out.rows, out.scale, out.columns, out.column_scale,
        s.T // align, out.scale.shape[1], n=s.n, C=s.C, BF16=u, BLOCK=BLOCK, ALIGN=align,
        STAGES=stages, PDL=s.pdl, launch_pdl=s.pdl, num_warps=warps,
    )  # fmt: skip
    return out


def read_bf16(o: Operands) -> Tensor:
    """The package's read: norm(u) [T, C] in bf16."""
    return launch.read(
        o.plan, o.x, o.projected, o.gram, o.alpha, o.bias, o.norm_weight, ITERATIONS, EPS, NORM_EPS
    )[0]


# -------------------------------------------------------------------------------------- reference


def scales(amax: Tensor) -> Tensor:
    """What Transformer Engine multiplies a block with: 448 / amax cut to a power of two."""
    quotient = torch.full_like(amax, 448).div_(amax)  # 448 / amax would be 448 * (1 / amax)
    quotient[quotient.isinf()] = torch.finfo(torch.bfloat16).max
    power = (quotient.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, power)


def quantise(u: Tensor) -> tuple[Tensor, Tensor]:
    """u [T, C] in e4m3, and the factors [ceil(C / 128), T] that give it back.

    As Transformer Engine 2.20 does (Float8BlockScaling, power-of-two scales).
    """
    padded = torch.nn.functional.pad(u.float(), (0, -u.shape[-1] % 128))
    blocks = padded.unflatten(-1, (-1, 128))
    scale = scales(blocks.abs().amax(-1))
    values = (blocks * scale[..., None]).flatten(-2).to(torch.float8_e4m3fn)
    return values[:, : u.shape[-1]], (1 / scale.double()).float().mT.contiguous()


def operands(T: int, C: int, device: str) -> Operands:
    """Random operands; some channels far larger and smaller than others, one block zero."""
    generator = torch.Generator(device).manual_seed(T + C)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=generator, device=device)

    n = 4
    x = normal(T, n, C)
    x *= torch.exp2(3 * torch.randn(C // 64, generator=generator, device=device)).repeat_interleave(
        64
    )
    x[T // 2, :, :128] = 0
    x = x.bfloat16()
    s = launch.plan(x)
    norm_weight = 1 + normal(C, scale=0.1)
    phi = normal(s.K, n * C, scale=0.02)
    alpha, bias = normal(3), normal(s.K)
    if launch.INTERPRETED:
        flat = x.float().flatten(1)
        projected = torch.nn.functional.pad(flat @ phi.T, (0, s.KP - s.K))[None]
        pairs = torch.triu_indices(n, n)
        gram = (x.float() @ x.float().mT)[:, pairs[0], pairs[1]][None].contiguous()
    else:
        _, projected, gram = launch.project(s, x, None, None, None, None, phi, True)
    return Operands(s, x, projected.contiguous(), gram, alpha, bias, norm_weight)


def check_scales(device: str) -> list[str]:
    """``power_of_two_scales`` of every bfloat16 that is no NaN; what is wrong."""
    amax = torch.arange(0x7F81, device=device).to(torch.int16).view(torch.bfloat16).float()
    amax = torch.nn.functional.pad(amax, (0, 2**15 - len(amax)))
    scale, inverse = torch.empty_like(amax), torch.empty_like(amax)
    scales_kernel[(8,)](amax, scale, inverse, SIZE=2**12)
    wanted = scales(amax)
    right = torch.equal(scale, wanted)
    right &= torch.equal(inverse, (1 / wanted.double()).float())
    return [] if right else ["the scales of some bfloat16"]


def check(T: int, C: int, device: str) -> list[str]:
    """The names of results that are not, bit for bit, the quantisation of the kernel's own u."""
    o = operands(T, C, device)
    wrong = []

    def compare(name: str, got: Tensor, wanted: Tensor) -> None:
        got, wanted = (
            t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (got, wanted)
        )
        if not torch.equal(got, wanted):
            wrong.append(f"{T}x{C} {name} ({int((got != wanted).sum())} of {got.numel()})")

    rows, both = read_rows(o, u=True), read_both(o, u=True)
    compare("u of both", both.u, rows.u)
    compare("u of the package", read_bf16(o), rows.u)
    values, scale = quantise(rows.u)
    columns, column_scale = quantise(rows.u.mT)
    for name, part in (
        ("rows and u", rows),
        ("rows", read_rows(o, u=False)),
        ("both and u", both),
        ("both", read_both(o, u=False)),
    ):
        compare(f"{name}: rows", part.rows, values)
        compare(f"{name}: scales of rows", part.scale[:, :T], scale)
        if part.columns is not None:
            compare(f"{name}: columns", part.columns, columns)
            compare(f"{name}: scales of columns", part.column_scale, column_scale)
    return wrong


# ------------------------------------------------------------------------------------ measurement


class TransformerEngine:
    """Its blockwise quantiser, and the two linears that read latent attention's input."""

    def __init__(self, C: int) -> None:
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8BlockScaling

        self.te, self.recipe = te, Float8BlockScaling()
        # 27B of configs/: full-rank queries; C = 7168: DeepSeek-V3's ranks.
        queries = 6144 if C < 4096 else 1536
        options = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
        self.linears = [te.Linear(C, width, **options) for width in (queries, 576)]

    def quantiser(self, rows: bool, columns: bool):
        """A quantiser as the recipe makes it for an input."""
        from transformer_engine.pytorch.constants import DType
        from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

        return Float8BlockQuantizer(
            DType.kFloat8E4M3,
            rowwise=rows,
            columnwise=columns,
            force_pow_2_scales=True,
            block_scaling_dim=1,
        )

    def tensor(self, q: Quantised):
        """Our bytes as the tensor that its linears take."""
        from transformer_engine.pytorch.constants import DType
        from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (
            Float8BlockwiseQTensor,
        )

        return Float8BlockwiseQTensor(
            shape=q.rows.shape,
            dtype=torch.bfloat16,
            rowwise_data=q.rows.view(torch.uint8),
            rowwise_scale_inv=q.scale,
            columnwise_data=q.columns.view(torch.uint8),
            columnwise_scale_inv=q.column_scale,
            fp8_dtype=DType.kFloat8E4M3,
            quantizer=self.quantiser(True, True),
            is_2D_scaled=False,
            requires_grad=True,
        )

    def train(self, u: Tensor, grads: list[Tensor], linears: int, first: bool = False):
        """Outputs, du and the weights' gradients of the first ``linears`` linears fed with u."""
        used = self.linears[:linears]
        with self.te.autocast(enabled=True, recipe=self.recipe):
            outputs = [linear(u, is_first_microbatch=first) for linear in used]
        wanted = (u, *(linear.weight for linear in used))
        return outputs, torch.autograd.grad(outputs, wanted, grads[:linears])

    def grads(self, T: int) -> list[Tensor]:
        sizes = ((T, linear.out_features) for linear in self.linears)
        return [torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in sizes]


def kernel_bodies(o: Operands, engine: TransformerEngine | None) -> dict[str, Callable]:
    """Every chain of kernels, by name, as a function without arguments."""
    bodies: dict[str, Callable] = {"read": lambda: read_bf16(o)}
    if engine is not None:
        both, rows, columns = (
            engine.quantiser(*usage) for usage in ((True, True), (True, False), (False, True))
        )
        u = read_bf16(o)
        bodies |= {
            "TE: rows and columns": lambda: both(u),
            "TE: rows": lambda: rows(u),
            "TE: columns": lambda: columns(u),
            "read + TE rows and columns": lambda: both(read_bf16(o)),
            "read + TE rows": lambda: rows(read_bf16(o)),
            "read + TE rows and columns, twice": lambda: twice(both, read_bf16(o)),
        }
    bodies["rows and u"] = lambda: read_rows(o, u=True)
    if engine is not None:
        bodies["rows and u + TE columns"] = lambda: columns(read_rows(o, u=True).u)
    bodies["rows"] = lambda: read_rows(o, u=False)
    bodies["coefficients"] = lambda: read_rows(o, u=False, rows=False)
    for tile in TILES:
        bodies[both_name(tile, u=True)] = partial(read_both, o, True, tile)
        bodies[both_name(tile)] = partial(read_both, o, False, tile)
    return bodies


def twice(quantiser: Callable, u: Tensor) -> tuple:
    return quantiser(u), quantiser(u)


def linear_bodies(o: Operands, engine: TransformerEngine, tile: tuple) -> dict[str, Callable]:
    """Read, linears forward and backward, by name; the weights are quantised before."""
    grads = engine.grads(o.plan.T)
    engine.train(read_bf16(o).requires_grad_(), grads, 2, first=True)

    def bf16(linears: int):
        return engine.train(read_bf16(o).requires_grad_(), grads, linears)

    def shared(linears: int):
        u = engine.quantiser(True, True)(read_bf16(o)).requires_grad_()
        return engine.train(u, grads, linears)

    def fp8(linears: int):
        return engine.train(engine.tensor(read_both(o, False, tile)), grads, linears)

    return {
        "read, one linear": partial(bf16, 1),
        "both, one linear": partial(fp8, 1),
        "read, two linears": partial(bf16, 2),
        "read, TE once, two linears": partial(shared, 2),
        "both, two linears": partial(fp8, 2),
    }


def same_as_engine(o: Operands, engine: TransformerEngine) -> list[str]:
    """Lines that say whether our bytes are Transformer Engine's."""
    lines = []
    wanted = engine.quantiser(True, True)(read_bf16(o))
    names = {
        "rows": "_rowwise_data",
        "scale": "_rowwise_scale_inv",
        "columns": "_columnwise_data",
        "column_scale": "_columnwise_scale_inv",
    }
    candidates = {f"both {tile}": read_both(o, False, tile) for tile in TILES}
    for kind, got in {"rows and u": read_rows(o, u=True), **candidates}.items():
        differ = []
        for name, attribute in names.items():
            mine, theirs = getattr(got, name), getattr(wanted, attribute)
            if mine is None:
                continue
            mine = mine.view(torch.uint8) if mine.dtype == torch.float8_e4m3fn else mine
            if mine.shape != theirs.shape:
                differ.append(f"{name} {tuple(mine.shape)} for {tuple(theirs.shape)}")
            elif not torch.equal(mine, theirs):
                differ.append(f"{name} {int((mine != theirs).sum())} of {mine.numel()}")
        lines.append(f"{kind}: {'differs: ' + '; '.join(differ) if differ else 'TE, bit for bit'}")
    return lines


def round_as_hardware_does() -> None:
    """The interpreter cuts numbers off where a GPU rounds them to the nearest, ties to even."""
    import triton.runtime.interpreter as interpreter

    convert = interpreter._convert_float
    targets = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}

    def rounding(data, source, target, mode):
        if source != tl.float32 or target not in targets:
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(data).to(targets[target])
        return rounded.view({1: torch.uint8, 2: torch.uint16}[rounded.itemsize]).numpy()

    interpreter._convert_float = rounding


def attempt(what: str, function: Callable):
    """The function's result; None, and the reason printed, where it fails."""
    try:
        return function()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:300]
        print(f"FAILED {what}: {type(error).__name__}: {reason} ({frame.name}:{frame.lineno})")
        return None


def measure(T: int, C: int, rounds: int) -> list[str]:
    """The table's lines of one shape."""
    from kernel_bench.tasks import Task
    from kernel_bench.timing import EMPTY, GraphClock, Times, copy_bandwidth

    device = torch.device("cuda")
    o = operands(T, C, "cuda")
    compile_in_parallel(o)
    print(f"{T}x{C}: compiled after {time.monotonic() - START:.0f} s", flush=True)
    wrong = attempt("check", lambda: check(T, C, "cuda"))
    if wrong is not None:
        print("  against the reference: " + ("; ".join(wrong) or "bit for bit"), flush=True)
    engine = attempt("Transformer Engine", lambda: TransformerEngine(C))
    if engine is not None:
        for line in attempt("comparison of bytes", lambda: same_as_engine(o, engine)) or ():
            print("  " + line)
    clock = GraphClock(device)
    bodies = kernel_bodies(o, engine)

    def timed(chains: dict[str, Callable]) -> dict:
        for name, body in chains.items():
            task = Task(name, lambda: None, lambda _, body=body: body())
            attempt(name, partial(clock.add, name, task))
        samples = clock.run(rounds)
        for name in chains:  # measured: later rounds are for what is added later
            clock._graphs.pop(name, None)
        return samples

    samples = timed(bodies)
    best = min(
        TILES,
        key=lambda tile: min(
            (Times.of(samples[name]).median for name in samples if name == both_name(tile)),
            default=float("inf"),
        ),
    )
    if engine is not None:
        linears = attempt("linears", lambda: linear_bodies(o, engine, best)) or {}
        attempt("gradients", lambda: compare_gradients(linears))
        for name, body in linears.items():
            attempt(name, lambda name=name, body=body: print_host_time(name, body))
        samples |= timed(linears)
    bandwidth = copy_bandwidth(samples, clock.copy_bytes) / 1e9
    empty = Times.of(samples[EMPTY]).median
    lines = [
        f"{T} x {C}, copy {bandwidth:.2f} TB/s, an empty graph {empty:.4f} ms",
        "| chain | ms | p10 - p90 | against read + TE |",
        "|---|---:|---:|---:|",
    ]
    base = samples.get("read + TE rows and columns")
    for name in (*bodies, *LINEARS):
        if name in samples:
            t = Times.of(samples[name])
            against = "read, one linear" if "one linear" in name else "read, two linears"
            reference = samples.get(against) if "linear" in name else base
            difference = t.median - Times.of(reference).median if reference else float("nan")
            lines.append(
                f"| {name} | {t.median:.4f} | {t.p10:.4f} - {t.p90:.4f} | {difference:+.4f} |"
            )
    return lines


LINEARS = (
    "read, one linear",
    "both, one linear",
    "read, two linears",
    "read, TE once, two linears",
    "both, two linears",
)


def both_name(tile: tuple[int, int], u: bool = False) -> str:
    return f"both{' and u' if u else ''} ({tile[0]} warps, {tile[1]} stages)"


def compare_gradients(linears: dict[str, Callable]) -> None:
    """Prints whether the linears give the same from our bytes as from bf16."""
    outputs, gradients = linears["read, two linears"]()
    for name in ("read, TE once, two linears", "both, two linears"):
        other = attempt(name, linears[name])
        if other is not None:
            pairs = zip((*outputs, *gradients), (*other[0], *other[1]), strict=True)
            same = [torch.equal(a, b) for a, b in pairs]
            print(f"  {name}: y, y, du, dW, dW as from bf16, bit for bit: {same}")


def print_host_time(name: str, body: Callable, repeats: int = 10) -> None:
    """Microseconds that Python and the launches take, the GPU running behind."""
    body()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        body()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    print(f"  {name}: {1e6 * host / repeats:.0f} us of the host, forward and backward", flush=True)


#: u and rows of ``read_rows``: every form of its kernel.
USES = ((True, True), (False, True), (False, False))


def compile_in_parallel(o: Operands) -> None:
    """First launches, several at a time: most of the time is the compiler's, outside of Python."""
    reads = [partial(read_bf16, o), *(partial(read_rows, o, *use) for use in USES)]
    tiles = [partial(read_both, o, u, tile) for tile in TILES for u in (True, False)]
    with ThreadPoolExecutor(8) as pool:
        for launches in (reads, tiles):  # the coefficients are compiled before the tiles need them
            list(pool.map(lambda run: attempt("a first launch", run), launches))
    torch.cuda.synchronize()


START = time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="16384x2560,4096x7168", help="TxC, comma-separated")
    parser.add_argument("--rounds", type=int, default=20, help="replays of each chain")
    parser.add_argument("--limit", type=int, default=40, help="seconds; starts no shape after it")
    parser.add_argument("--check", action="store_true", help="the bytes alone, on small shapes")
    options = parser.parse_args()
    if options.check:
        device = "cpu" if launch.INTERPRETED else "cuda"
        if launch.INTERPRETED:
            round_as_hardware_does()
        wrong = check_scales(device) + check(132, 256, device) + check(20, 640, device)
        print("\n".join(wrong) or "bit for bit")
        return 1 if wrong else 0
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    tables = []
    for shape in options.shapes.split(","):
        T, C = map(int, shape.split("x"))
        if time.monotonic() - START > options.limit:
            print(f"{shape} left out: {options.limit} s have passed")
            continue
        tables.append(attempt(shape, lambda T=T, C=C: measure(T, C, options.rounds)))
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"\n{torch.cuda.get_device_name()}, {versions}")
    for lines in tables:
        print("\n".join(lines or ["nothing measured"]) + "\n")
    print(f"{time.monotonic() - START:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
