"""The interface: mhc_pre, mhc_enter, mhc_post, mhc_post_pre, mhc_refill, on kernels where possible.

Same names, arguments and results as ``reference``; equations and symbols are explained there. The
kernels take CUDA devices from compute capability 8.0, n = 2, 4, 8, C a multiple of 16 and streams
in bfloat16, float16 or float32. Anything else runs ``reference``, which is said once.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import launch, ops, reference
from .launch import INTERPRETED

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_said: set[str] = set()


def _why_not(x: Tensor) -> str | None:
    """Why the kernels cannot take x; None if they can."""
    n, C = x.shape[-2:]
    if not (x.is_cuda or INTERPRETED):
        return f"the streams are on {x.device.type}, not on a CUDA device"
    if x.is_cuda and launch._device(x.device.index)[0] < 80:
        return "the GPU's compute capability is below 8.0"
    if x.dtype not in _DTYPES:
        return f"streams of {x.dtype} have no kernel"
    if n not in (2, 4, 8):
        return f"n = {n} streams have no kernel (2, 4 and 8 do)"
    if C % 16 or C == 0:
        return f"C = {C} is not a multiple of 16"
    return None


def supported(x: Tensor) -> bool:
    """Whether the kernels run for these streams; if not, the first time for a reason warns."""
    reason = _why_not(x)
    if reason is not None and reason not in _said:
        _said.add(reason)
        warnings.warn(f"mhc_kernels runs its eager reference: {reason}.", stacklevel=3)
    return reason is None


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _check_device(x: Tensor, *others: Tensor | None) -> None:
    """The kernels are handed addresses, which nothing looks at any more."""
    for t in others:
        if t is not None and t.device != x.device:
            raise ValueError(f"the streams are on {x.device}, an operand is on {t.device}")


def _read(outputs: tuple[Tensor, ...], variant: str, with_H_pre: bool) -> tuple[Tensor | None, ...]:
    """u, H_post, H_res and, where it is asked for, H_pre of an op's outputs from u on."""
    u, H_post, H_res, *_, H_pre = outputs
    read = u, H_post, None if variant == "identity" else H_res
    return (*read, H_pre) if with_H_pre else read


def _parameters(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, variant: str):
    """The parameters in float32, their shapes checked against the streams."""
    n, C = x.shape[-2:]
    K = reference.phi_rows(n, variant)
    for name, t, size in (
        ("phi", phi, (K, n * C)),
        ("alpha", alpha, (reference.alpha_size(variant),)),
        ("bias", bias, (K,)),
    ):
        if tuple(t.shape) != size:
            raise ValueError(
                f"{name} must be {list(size)} for {n} streams of {C} channels and variant"
                f" {variant!r}, not {list(t.shape)}"
            )
    return phi.float().contiguous(), alpha.float().contiguous(), bias.float().contiguous()


def mhc_pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    variant: str = "mhc",
    iterations: int = reference.ITERATIONS,
    eps: float = reference.NORM_EPS,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    with_H_pre: bool = False,
) -> tuple[Tensor, ...]:
    """``reference.mhc_pre``: u [..., C], H_post [..., n], H_res [..., n, n] or None.

    ``with_H_pre`` adds H_pre [..., n], without a gradient, for ``mhc_refill``; it carries
    1 / rms(H_pre x) where ``norm_weight`` is given.
    """
    parameters = _parameters(x, phi, alpha, bias, variant)
    if not supported(x):
        return reference.mhc_pre(
            x, phi, alpha, bias, variant=variant, iterations=iterations, eps=eps,
            norm_weight=norm_weight, norm_eps=norm_eps, with_H_pre=with_H_pre,
        )  # fmt: skip
    _check_device(x, *parameters, norm_weight)
    outputs = ops.run(
        ops.pre_op, ops.Pre, x.contiguous(), *parameters, norm_weight,
        variant, iterations, eps, norm_eps,
    )  # fmt: skip
    return _read(outputs, variant, with_H_pre)


def mhc_enter(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    variant: str = "mhc",
    iterations: int = reference.ITERATIONS,
    eps: float = reference.NORM_EPS,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    with_H_pre: bool = False,
) -> tuple[Tensor, ...]:
    """``mhc_pre`` at the head of a chain of sublayers: x, u, H_post, H_res.

    The x returned is the x given. Use it in the boundary that follows, and x's gradient is made
    once, by a kernel, where two uses of x would have autograd add two.
    """
    parameters = _parameters(x, phi, alpha, bias, variant)
    if not supported(x):
        return x, *reference.mhc_pre(
            x, phi, alpha, bias, variant=variant, iterations=iterations, eps=eps,
            norm_weight=norm_weight, norm_eps=norm_eps, with_H_pre=with_H_pre,
        )  # fmt: skip
    _check_device(x, *parameters, norm_weight)
    handed_on, *outputs = ops.Enter.apply(
        x.contiguous(), *parameters, norm_weight, variant, iterations, eps, norm_eps
    )
    return handed_on, *_read(outputs, variant, with_H_pre)


def _post_operands(x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None):
    n, C = x.shape[-2:]
    lead = x.shape[:-2]
    for name, t, size in (("y", y, (C,)), ("H_post", H_post, (n,)), ("H_res", H_res, (n, n))):
        if t is not None and tuple(t.shape) != (*lead, *size):
            raise ValueError(
                f"{name} must be {[*lead, *size]} for streams of shape {list(x.shape)},"
                f" not {list(t.shape)}"
            )
    return x.contiguous(), y.contiguous(), _wide(H_post), _wide(H_res)


def mhc_post(
    x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None, y_bias: Tensor | None = None
) -> Tensor:
    """``reference.mhc_post``: x_next [..., n, C]."""
    if not supported(x):
        return reference.mhc_post(x, y, H_post, H_res, y_bias)
    x, y, H_post, H_res = _post_operands(x, y, H_post, H_res)
    _check_device(x, y, y_bias, H_post, H_res)
    return ops.run(ops.post_op, ops.Post, x, y, y_bias, H_post, H_res)


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
    variant: str = "mhc",
    iterations: int = reference.ITERATIONS,
    eps: float = reference.NORM_EPS,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    with_H_pre: bool = False,
) -> tuple[Tensor, ...]:
    """``reference.mhc_post_pre``: x_next, u, H_post', H_res', with x's gradient made once."""
    parameters = _parameters(x, phi, alpha, bias, variant)
    if not supported(x):
        return reference.mhc_post_pre(
            x, y, H_post, H_res, phi, alpha, bias, y_bias=y_bias, variant=variant,
            iterations=iterations, eps=eps, norm_weight=norm_weight, norm_eps=norm_eps,
            with_H_pre=with_H_pre,
        )  # fmt: skip
    x, y, H_post, H_res = _post_operands(x, y, H_post, H_res)
    _check_device(x, y, y_bias, H_post, H_res, *parameters, norm_weight)
    x_next, *outputs = ops.run(
        ops.post_pre_op, ops.PostPre, x, y, y_bias, H_post, H_res,
        *parameters, norm_weight, variant, iterations, eps, norm_eps,
    )  # fmt: skip
    return x_next, *_read(outputs, variant, with_H_pre)


@torch.no_grad()
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
    """Streams and reads of a block of sublayers, from its first x and the sublayers' y.

    x [..., n, C] enters the block. Sublayer l ends with ``mhc_post`` (y[l] [..., C] + y_bias[l],
    H_post[l], H_res[l]), the next one reads with H_pre[l] [..., n], the read weights of the streams
    after it. Returns x_next[l] [..., n, C] and u[l] = H_pre[l] x_next[l] [..., C], the forward's
    to the bit. One H_pre more than y: the first reads x itself, and its u is the first. Where the
    forward fused a norm into the read, norm_weight has its weight [C] (H_pre carries 1 / rms).

    ``out``: contiguous tensors that the two lists are written to and made of; u's may be of another
    dtype. No gradient: it refills what a forward dropped.
    """
    if not supported(x):
        return reference.mhc_refill(
            x, y, H_post, H_res, H_pre, y_bias=y_bias, norm_weight=norm_weight, out=out
        )
    if out is None:
        reads = [x.new_empty(*x.shape[:-2], x.shape[-1]) for _ in H_pre]
        out = [torch.empty_like(x) for _ in y], reads
    ops.refill_op(
        x.contiguous(),
        [t.contiguous() for t in y],
        _absent_empty(x, y_bias, len(y)),
        [_wide(t) for t in H_post],
        [] if len(H_res) == 0 or H_res[0] is None else [_wide(t) for t in H_res],
        [_wide(t) for t in H_pre],
        _absent_empty(x, norm_weight, len(H_pre)),
        *out,
    )
    return out


def _absent_empty(x: Tensor, tensors: list[Tensor | None] | None, count: int) -> list[Tensor]:
    """A custom op's list takes no None: an empty tensor stands for it."""
    return [x.new_empty(0) if t is None else t for t in tensors or [None] * count]
