"""The interface: mhc_pre, mhc_enter, mhc_post, mhc_post_pre, mhc_refill, on kernels where possible.

Same names, arguments and results as ``reference``; equations and symbols are explained there. The
kernels take CUDA devices from compute capability 8.0, n = 2, 4, 8, C a multiple of 16 and streams
in bfloat16, float16 or float32. Anything else runs ``reference``, which is said once.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import ops, reference
from .launch import INTERPRETED

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_said: set[str] = set()


def _why_not(x: Tensor) -> str | None:
    """Why the kernels cannot take x; None if they can."""
    n, C = x.shape[-2:]
    if not (x.is_cuda or INTERPRETED):
        return f"the streams are on {x.device.type}, not on a CUDA device"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
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


def _flat(t: Tensor, keep: int) -> Tensor:
    """[..., last ``keep`` dimensions] -> [T, ...], contiguous."""
    tail = t.shape[t.dim() - keep :]
    T = t.shape[: t.dim() - keep].numel()
    return t.reshape(T, *tail).contiguous()


def _wide(t: Tensor | None, keep: int) -> Tensor | None:
    return None if t is None else _flat(t.float(), keep)


def _outputs(
    lead: torch.Size,
    u: Tensor,
    H_post: Tensor,
    H_res: Tensor,
    variant: str,
    H_pre: Tensor | None = None,
):
    n, C = H_post.shape[-1], u.shape[-1]
    H_res = None if variant == "identity" else H_res.reshape(*lead, n, n)
    read = u.reshape(*lead, C), H_post.reshape(*lead, n), H_res
    return read if H_pre is None else (*read, H_pre.detach().reshape(*lead, n))


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
    u, H_post, H_res, *_, H_pre = ops.run(
        ops.pre_op, ops.Pre, _flat(x, 2), *parameters, norm_weight,
        variant, iterations, eps, norm_eps,
    )  # fmt: skip
    return _outputs(x.shape[:-2], u, H_post, H_res, variant, H_pre if with_H_pre else None)


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
    handed_on, u, H_post, H_res, H_pre = ops.Enter.apply(
        _flat(x, 2), *parameters, norm_weight, variant, iterations, eps, norm_eps
    )
    H_pre = H_pre if with_H_pre else None
    read = _outputs(x.shape[:-2], u, H_post, H_res, variant, H_pre)
    return handed_on.reshape(x.shape), *read


def _post_operands(x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None):
    n, C = x.shape[-2:]
    lead = x.shape[:-2]
    for name, t, size in (("y", y, (C,)), ("H_post", H_post, (n,)), ("H_res", H_res, (n, n))):
        if t is not None and tuple(t.shape) != (*lead, *size):
            raise ValueError(
                f"{name} must be {[*lead, *size]} for streams of shape {list(x.shape)},"
                f" not {list(t.shape)}"
            )
    return _flat(x, 2), _flat(y, 1), _wide(H_post, 1), _wide(H_res, 2)


def mhc_post(
    x: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor | None, y_bias: Tensor | None = None
) -> Tensor:
    """``reference.mhc_post``: x_next [..., n, C]."""
    if not supported(x):
        return reference.mhc_post(x, y, H_post, H_res, y_bias)
    flat_x, flat_y, flat_post, flat_res = _post_operands(x, y, H_post, H_res)
    x_next = ops.run(ops.post_op, ops.Post, flat_x, flat_y, y_bias, flat_post, flat_res)
    return x_next.reshape(x.shape)


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
    flat_x, flat_y, flat_post, flat_res = _post_operands(x, y, H_post, H_res)
    x_next, u, next_post, next_res, *_, H_pre = ops.run(
        ops.post_pre_op, ops.PostPre, flat_x, flat_y, y_bias, flat_post, flat_res,
        *parameters, norm_weight, variant, iterations, eps, norm_eps,
    )  # fmt: skip
    H_pre = H_pre if with_H_pre else None
    rest = _outputs(x.shape[:-2], u, next_post, next_res, variant, H_pre)
    return x_next.reshape(x.shape), *rest


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
        _flat(x, 2),
        [_flat(t, 1) for t in y],
        _absent_empty(x, y_bias, len(y)),
        [_wide(t, 1) for t in H_post],
        [] if len(H_res) == 0 or H_res[0] is None else [_wide(t, 2) for t in H_res],
        [_wide(t, 1) for t in H_pre],
        _absent_empty(x, norm_weight, len(H_pre)),
        *out,
    )
    return out


def _absent_empty(x: Tensor, tensors: list[Tensor | None] | None, count: int) -> list[Tensor]:
    """A custom op's list takes no None: an empty tensor stands for it."""
    return [x.new_empty(0) if t is None else t for t in tensors or [None] * count]
