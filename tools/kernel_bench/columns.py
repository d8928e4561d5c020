"""The implementations that are compared: one adapter each, all of them here.

An adapter calls an implementation through its public training API, in that implementation's own
layout: ``native`` and ``canonical`` permute between it and the layout of
``mhc_kernels.reference``, outside of everything that is timed. Both are linear permutations, so
gradients travel through ``canonical`` as the values do.
"""

from __future__ import annotations

import functools
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mhc_kernels import reference

from .case import DTYPES, Case, Params

#: u, H_post, H_res as ``pre`` returns them, in the column's layout.
PreOutputs = tuple[Tensor, Tensor, Tensor | None]
#: x_next, u, H_post', H_res' as ``post_pre`` returns them; ``enter`` hands x on in its place.
BoundaryOutputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
#: The parameters of one sublayer, as the column takes them.
NativeParams = tuple[Tensor, ...]


class Absent(Exception):
    """A column that cannot take part, with the reason in words."""


class Column(ABC):
    """An implementation in reference.py's layout; those with another override ``native`` etc."""

    #: The boundary in one call (x, y, H_post, H_res, params), where the implementation has one.
    post_pre: Callable[..., BoundaryOutputs] | None = None

    def __init__(self, name: str, version: str, note: str = "") -> None:
        self.name, self.version, self.note = name, version, note

    @abstractmethod
    def pre(self, x: Tensor, params: NativeParams) -> PreOutputs:
        """F_pre: u, H_post, H_res."""

    @abstractmethod
    def post(self, x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None) -> Tensor:
        """F_post,res: x_next."""

    def enter(self, x: Tensor, params: NativeParams) -> BoundaryOutputs:
        """``pre`` where a ``post`` on the same x follows; then x has two uses."""
        return x, *self.pre(x, params)

    def native(self, role: str, value: Tensor) -> Tensor:
        """``value`` of role x, y (also u), H_post or H_res, into the column's layout."""
        return value

    def canonical(self, role: str, value: Tensor) -> Tensor:
        """The inverse of ``native``."""
        return value

    def native_params(self, params: Params) -> NativeParams:
        return params.phi, params.alpha, params.bias

    def canonical_params(self, params: NativeParams) -> Params:
        return Params(*params)


class EquationColumn(Column):
    """``mhc_pre``, ``mhc_post``, ``mhc_post_pre`` with the signatures of reference.py."""

    def __init__(
        self,
        name: str,
        version: str,
        functions: tuple[Callable, Callable, Callable],
        variant: str,
        note: str = "",
        enter: Callable | None = None,
    ) -> None:
        super().__init__(name, version, note)
        self._pre, self._post, self._post_pre = functions
        self._enter = enter
        self._options = {"variant": variant}
        self.post_pre = self._boundary

    def pre(self, x: Tensor, params: NativeParams) -> PreOutputs:
        return self._pre(x, *params, **self._options)

    def enter(self, x: Tensor, params: NativeParams) -> BoundaryOutputs:
        if self._enter is None:
            return super().enter(x, params)
        return self._enter(x, *params, **self._options)

    def post(self, x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None) -> Tensor:
        return self._post(x, y, H_post, H_res)

    def _boundary(
        self, x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None, params: NativeParams
    ) -> BoundaryOutputs:
        return self._post_pre(x, y, H_post, H_res, *params, **self._options)


class TransformerEngineColumn(Column):
    """Transformer Engine's Triton kernels, defaults. Streams lie innermost: x is [T, 1, C, n].

    It mixes as x @ H_res and normalises rows first, so the paper's H_res, transposed, is its own.
    """

    def __init__(self, version: str, module: Any) -> None:
        super().__init__("te", version, "deterministic projection, tf32, layout [T, C, n]")
        self._module = module

    def pre(self, x: Tensor, params: NativeParams) -> PreOutputs:
        return self._module.mhc_generate_mix_and_aggregate(x, *params)

    def post(self, x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None) -> Tensor:
        return self._module.mhc_fused_expand_combine(y, None, H_post, x, H_res, 4)

    def native(self, role: str, value: Tensor) -> Tensor:
        if role in ("x", "H_res"):
            value = value.transpose(1, 2)
        return value.unsqueeze(1).contiguous()

    def canonical(self, role: str, value: Tensor) -> Tensor:
        value = value.squeeze(1)
        return value.transpose(1, 2) if role in ("x", "H_res") else value

    def native_params(self, params: Params) -> NativeParams:
        phi = _transpose_res_rows(params.phi).unflatten(1, (4, -1)).transpose(1, 2).flatten(1)
        return phi.contiguous(), params.alpha, _transpose_res_rows(params.bias).unsqueeze(0)

    def canonical_params(self, params: NativeParams) -> Params:
        phi, alpha, bias = params
        phi = _transpose_res_rows(phi.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1))
        return Params(phi, alpha, _transpose_res_rows(bias.squeeze(0)))


class TileKernelsColumn(Column):
    """DeepSeek's TileKernels 1.x: x is [1, T, n, C], its ``comb`` is H_res transposed."""

    def __init__(self, version: str, module: Any) -> None:
        super().__init__("tile", version, "tf32, Sinkhorn denominators + 1e-6")
        self._ops, self._module = module.ops, module

    def pre(self, x: Tensor, params: NativeParams) -> PreOutputs:
        phi, alpha, bias = params
        mixes = self._ops.mhc_pre_norm_fn(x, phi, None, reference.NORM_EPS, fuse_grad_acc=False)
        H_pre, H_post, comb = self._ops.mhc_pre_split_mixes(mixes, alpha, bias, 4, 2.0, 0.0)
        comb = self._ops.sinkhorn_normalize(comb, repeat=reference.ITERATIONS, eps=1e-6)
        return self._ops.mhc_pre_apply_mix(x, H_pre), H_post, comb

    def enter(self, x: Tensor, params: NativeParams) -> BoundaryOutputs:
        """The public ``mhc_pre``: its backward adds into the gradient that post's has made."""
        u, (H_post, comb) = self._module.mhc_pre(
            x,
            *params,
            norm_eps=reference.NORM_EPS,
            post_mult_value=2.0,
            pre_eps=0.0,
            sinkhorn_repeat=reference.ITERATIONS,
        )
        return x, u, H_post, comb

    def post(self, x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None) -> Tensor:
        return self._ops.mhc_post(y, x, H_post, H_res)

    def native(self, role: str, value: Tensor) -> Tensor:
        if role == "H_res":
            value = value.transpose(1, 2)
        return (value.unsqueeze(-1) if role == "H_post" else value).unsqueeze(0).contiguous()

    def canonical(self, role: str, value: Tensor) -> Tensor:
        value = value.squeeze(0)
        if role == "H_res":
            return value.transpose(1, 2)
        return value.squeeze(-1) if role == "H_post" else value

    def native_params(self, params: Params) -> NativeParams:
        return _transpose_res_rows(params.phi), params.alpha, _transpose_res_rows(params.bias)

    def canonical_params(self, params: NativeParams) -> Params:
        phi, alpha, bias = params
        return Params(_transpose_res_rows(phi), alpha, _transpose_res_rows(bias))


class LigerColumn(Column):
    """Liger-Kernel: phi is [nC, K], one tensor for each alpha; rows are normalised first."""

    def __init__(self, version: str, module: Any) -> None:
        super().__init__("liger", version, "float32 phi (tf32 dot), rows first, columns last")
        self._module = module

    def pre(self, x: Tensor, params: NativeParams) -> PreOutputs:
        phi, alpha_pre, alpha_post, alpha_res, bias = params
        H_pre, H_post, H_res = self._module.liger_mhc_coeffs(
            x, phi, bias, alpha_pre, alpha_post, alpha_res, allow_fp32=True
        )
        return self._module.liger_mhc_pre(x, H_pre), H_post, H_res

    def post(self, x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None) -> Tensor:
        return self._module.liger_mhc_post_res(x, y, H_post, H_res)

    def native_params(self, params: Params) -> NativeParams:
        return params.phi.t().contiguous(), *params.alpha.unbind(), params.bias

    def canonical_params(self, params: NativeParams) -> Params:
        phi, *alpha, bias = params
        return Params(phi.t(), torch.stack(alpha), bias)


def _transpose_res_rows(rows: Tensor, n: int = 4) -> Tensor:
    """Rows pre | post | res of phi or b with the res part, row-major [n, n], transposed."""
    head, res = rows[: 2 * n], rows[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat([head, res])


def _ours(case: Case, device: torch.device) -> Column:
    import mhc_kernels

    names = ("mhc_pre", "mhc_post", "mhc_post_pre")
    exported = all(hasattr(mhc_kernels, name) for name in names)
    stream = torch.empty(1, case.n, case.C, dtype=DTYPES[case.dtype], device=device)
    fused = exported and mhc_kernels.supported(stream)
    note = "" if fused else "no kernels for this device or case: these are the eager equations"
    functions = tuple(getattr(mhc_kernels if fused else reference, name) for name in names)
    enter = mhc_kernels.mhc_enter if fused else None
    return EquationColumn("ours", _version("mhc-megatron"), functions, case.variant, note, enter)


def _eager(case: Case, device: torch.device) -> Column:
    functions = (reference.mhc_pre, reference.mhc_post, reference.mhc_post_pre)
    return EquationColumn("reference", f"torch {torch.__version__}", functions, case.variant)


def _compiled(case: Case, device: torch.device) -> Column:
    import torch._dynamo
    import torch._functorch.config

    # The backward is captured alone and replayed, so its graph is run more than once.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()
    compile = functools.partial(torch.compile, dynamic=False)
    functions = (
        compile(reference.mhc_pre),
        compile(reference.mhc_post),
        compile(reference.mhc_post_pre),
    )
    return EquationColumn("compile", f"torch {torch.__version__}", functions, case.variant)


def _transformer_engine(case: Case, device: torch.device) -> Column:
    _only(case, n=(4,), dtypes=("bf16", "fp32"))
    from transformer_engine.pytorch.triton import mhc

    return TransformerEngineColumn(_version("transformer-engine", "transformer_engine"), mhc)


def _tile_kernels(case: Case, device: torch.device) -> Column:
    _only(case, n=(4,), dtypes=("bf16",))
    if case.C % 128:
        raise Absent(f"takes multiples of 128 channels, not C = {case.C}")
    import tile_kernels

    version = _version("tile-kernels")
    if not hasattr(tile_kernels.modeling, "mhc"):
        raise Absent(
            f"tile-kernels {version} ships no mHC autograd functions (its GEMM moved to DeepGEMM); "
            "tile-kernels 1.0 does"
        )
    from tile_kernels.modeling import mhc

    return TileKernelsColumn(version, mhc)


def _liger(case: Case, device: torch.device) -> Column:
    _only(case, n=(2, 4, 8), dtypes=("bf16", "fp16", "fp32"))
    from liger_kernel.transformers import functional

    return LigerColumn(_version("liger-kernel"), functional)


_MAKERS: dict[str, Callable[[Case, torch.device], Column]] = {
    "ours": _ours,
    "reference": _eager,
    "compile": _compiled,
    "te": _transformer_engine,
    "tile": _tile_kernels,
    "liger": _liger,
}
COLUMNS = tuple(_MAKERS)
#: Columns that run without a GPU.
CPU_COLUMNS = ("ours", "reference")


def load(name: str, case: Case, device: torch.device) -> Column:
    """The column ``name`` for ``case``; Absent with the reason where it cannot take part."""
    if device.type == "cpu" and name not in CPU_COLUMNS:
        raise Absent("needs a CUDA GPU")
    try:
        return _MAKERS[name](case, device)
    except Absent:
        raise
    except ModuleNotFoundError as error:
        raise Absent(f"not installed: {error}") from error
    except Exception as error:  # a library that breaks on import is reported, not hidden
        raise Absent(f"import failed: {type(error).__name__}: {_first_line(error)}") from error


def _only(case: Case, n: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if case.variant != "mhc":
        raise Absent(f"has the Sinkhorn variant only, not {case.variant}")
    if case.n not in n:
        raise Absent(f"takes n in {n}, not {case.n}")
    if case.dtype not in dtypes:
        raise Absent(f"takes {', '.join(dtypes)} streams, not {case.dtype}")


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not packaged"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
