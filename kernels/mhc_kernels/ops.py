"""torch custom ops and their gradients around ``launch``.

Every operation is a ``torch.library`` custom op with a fake implementation, and so is its backward:
torch.compile sees one opaque node each. Where nothing traces, plain ``autograd.Function``s run the
same functions (``run``), since the dispatch of an op in Python takes the host about as long as what
it launches. Saved for backward beyond x, y and the parameters are float32 numbers per token: the
projection p (K), 1 / rms, with a fused norm the products of streams (n(n+1)/2), and the H_post and
H_res that the caller holds anyway: 180 bytes at n = 4. x_next is the next sublayer's x, kept once.

The ops take contiguous operands (x [..., n, C], y [..., C], float32 parameters); an identity H_res
is an empty tensor on the way out and None on the way in. ``functions`` is the interface.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import launch
from .launch import plan

Names = ("variant", "iterations", "eps", "norm_eps")


def _registered(function: Callable):
    """The custom op ``mhc_kernels::<name>`` of a function that changes none of its arguments."""
    return torch.library.custom_op(f"mhc_kernels::{function.__name__}", function, mutates_args=())


def _traced(x: Tensor) -> bool:
    """Whether a compiler looks on: it says so, or the operands are tensors of its own kind."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def _ready(t: Tensor | None) -> Tensor | None:
    """Contiguous and at a 16-byte boundary, as tile descriptors need it."""
    if t is None:
        return None
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, norm_weight: Tensor | None,
    variant: str, iterations: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """u, H_post, H_res, p, 1 / rms, products of streams, H_pre (for a refill; no gradient)."""
    if x.numel() == 0:
        return launch.read_outputs(x, variant, norm_weight is not None)
    s, x = plan(x, variant), _ready(x)
    with torch.cuda.device_of(x):
        _, projected, gram = launch.project(
            s, x, None, None, None, None, _ready(phi), norm_weight is not None
        )
        return launch.read(
            s, x, projected, gram, alpha, bias, norm_weight, iterations, eps, norm_eps
        )


pre_op = _registered(pre)


@pre_op.register_fake
def _(x, phi, alpha, bias, norm_weight, variant, iterations, eps, norm_eps):
    return launch.read_outputs(x, variant, norm_weight is not None)


def post_pre(
    x: Tensor, y: Tensor, y_bias: Tensor | None, H_post: Tensor, H_res: Tensor | None,
    phi: Tensor, alpha: Tensor, bias: Tensor, norm_weight: Tensor | None,
    variant: str, iterations: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x_next, then what ``pre_op`` returns for it."""
    if x.numel() == 0:
        return (torch.empty_like(x), *launch.read_outputs(x, variant, norm_weight is not None))
    s, x, y = plan(x, variant), _ready(x), _ready(y)
    with torch.cuda.device_of(x):
        x_next, projected, gram = launch.project(
            s, x, y, y_bias, H_post, H_res, _ready(phi), norm_weight is not None
        )
        return (x_next, *launch.read(
            s, x_next, projected, gram, alpha, bias, norm_weight, iterations, eps, norm_eps
        ))  # fmt: skip


post_pre_op = _registered(post_pre)


@post_pre_op.register_fake
def _(
    x, y, y_bias, H_post, H_res, phi, alpha, bias, norm_weight, variant, iterations, eps, norm_eps
):  # fmt: skip
    return (torch.empty_like(x), *launch.read_outputs(x, variant, norm_weight is not None))


def post(
    x: Tensor, y: Tensor, y_bias: Tensor | None, H_post: Tensor, H_res: Tensor | None
) -> Tensor:
    """x_next."""
    if x.numel() == 0:
        return torch.empty_like(x)
    s, x, y = plan(x), _ready(x), _ready(y)
    with torch.cuda.device_of(x):
        return launch.post(s, x, y, y_bias, H_post, H_res)


post_op = _registered(post)


@post_op.register_fake
def _(x, y, y_bias, H_post, H_res):
    return torch.empty_like(x)


def boundary_backward(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, H_post: Tensor | None,
    H_res: Tensor | None, x_next: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    norm_weight: Tensor | None, p: Tensor, inverse_rms: Tensor, gram: Tensor,
    g: Tensor | None, du: Tensor, dH_post: Tensor | None, dH_res: Tensor | None,
    variant: str, iterations: int, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, y, H_post, H_res, phi, alpha, bias, norm_weight; empty where there is none.

    y None: of ``pre`` alone, whose x_next is x; g: the gradient of x_next from elsewhere.
    """
    s = plan(x, variant)
    x, y, x_next, g, du = _ready(x), _ready(y), _ready(x_next), _ready(g), _ready(du)
    phi = _ready(phi)
    with torch.cuda.device_of(x):
        logits = launch.logits_grad(
            s, x_next, du, dH_post, dH_res, phi, alpha, bias, norm_weight, p, inverse_rms, gram,
            iterations, norm_eps,
        )  # fmt: skip
        parameters = launch.phi_grad(s, x_next, logits, alpha)
        *streams, dnorm = launch.boundary_grad(
            s, x, y, y_bias, H_post, H_res, g, du, phi, norm_weight, logits
        )
        if norm_weight is not None and dnorm is None:
            dnorm = launch.norm_weight_grad(s, x_next, du, logits.token, norm_weight)
    return tuple(x.new_empty(0) if t is None else t for t in (*streams, *parameters, dnorm))


boundary_backward_op = _registered(boundary_backward)


@boundary_backward_op.register_fake
def _(
    x, y, y_bias, H_post, H_res, x_next, phi, alpha, bias, norm_weight, p, inverse_rms, gram,
    g, du, dH_post, dH_res, variant, iterations, norm_eps,
):  # fmt: skip
    def like(t):
        return x.new_empty(0) if t is None else torch.empty_like(t)

    return (
        torch.empty_like(x), like(y), like(H_post), like(H_res),
        torch.empty_like(phi), torch.empty_like(alpha), torch.empty_like(bias), like(norm_weight),
    )  # fmt: skip


def post_backward(
    x: Tensor, y: Tensor, y_bias: Tensor | None, H_post: Tensor, H_res: Tensor | None, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, H_post, H_res (empty for the identity)."""
    s = plan(x)
    x, y, g = _ready(x), _ready(y), _ready(g)
    with torch.cuda.device_of(x):
        dx, dy, dH_post, dH_res, _ = launch.boundary_grad(s, x, y, y_bias, H_post, H_res, g)
    return dx, dy, dH_post, x.new_empty(0) if dH_res is None else dH_res


post_backward_op = _registered(post_backward)


@post_backward_op.register_fake
def _(x, y, y_bias, H_post, H_res, g):
    dH_res = x.new_empty(0) if H_res is None else torch.empty_like(H_res)
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(H_post), dH_res


@torch.library.custom_op("mhc_kernels::refill", mutates_args=("x_next", "u"))
def refill_op(
    x: Tensor, y: list[Tensor], y_bias: list[Tensor], H_post: list[Tensor], H_res: list[Tensor],
    H_pre: list[Tensor], norm_weight: list[Tensor], x_next: list[Tensor], u: list[Tensor],
) -> None:  # fmt: skip
    """Writes x_next and u. H_res empty: the identity; an empty y_bias or norm_weight: none."""
    if x.numel() == 0:
        return
    s, x, y = plan(x), _ready(x), [_ready(t) for t in y]
    biases, weights = ([t if t.numel() else None for t in ts] for ts in (y_bias, norm_weight))
    with torch.cuda.device_of(x):
        launch.refill(s, x, y, biases, H_post, H_res or None, H_pre, weights, x_next, u)


@refill_op.register_fake
def _(x, y, y_bias, H_post, H_res, H_pre, norm_weight, x_next, u):
    return None


def _bias_grad(dy: Tensor, y_bias: Tensor | None) -> Tensor | None:
    if y_bias is None:
        return None
    return dy.flatten(0, -2).sum(0, dtype=torch.float32).to(y_bias.dtype)


def _pre_context(ctx, inputs, output) -> None:
    x, phi, alpha, bias, norm_weight, variant, iterations, eps, norm_eps = inputs
    ctx.set_materialize_grads(False)
    ctx.options = variant, iterations, norm_eps
    ctx.save_for_backward(x, phi, alpha, bias, norm_weight, *output[3:6])


def _pre_backward(ctx, du, dH_post, dH_res, *unused):
    return _pre_gradients(ctx, None, du, dH_post, dH_res)


def _pre_gradients(ctx, g, du, dH_post, dH_res):
    x, phi, alpha, bias, norm_weight, p, inverse_rms, gram = ctx.saved_tensors
    if x.numel() == 0:
        return (*(_zeros(t) for t in (x, phi, alpha, bias, norm_weight)), *4 * (None,))
    du = torch.zeros_like(x[..., 0, :]) if du is None else du
    backward = boundary_backward_op if _traced(x) else boundary_backward
    dx, _, _, _, dphi, dalpha, dbias, dnorm = backward(
        x, None, None, None, None, x, phi, alpha, bias, norm_weight, p, inverse_rms, gram,
        g, du, _wide(dH_post), _wide(dH_res), *ctx.options,
    )  # fmt: skip
    dnorm = None if norm_weight is None else dnorm
    return dx, dphi, dalpha, dbias, dnorm, None, None, None, None


def _post_pre_context(ctx, inputs, output) -> None:
    streams, parameters, options = inputs[:5], inputs[5:9], inputs[9:]
    variant, iterations, _, norm_eps = options
    ctx.set_materialize_grads(False)
    ctx.options = variant, iterations, norm_eps
    x_next = output[0]
    ctx.save_for_backward(*streams, x_next, *parameters, *output[4:7])


def _post_pre_backward(ctx, g, du, dH_post, dH_res, *unused):
    x, y, y_bias, H_post, H_res, x_next, phi, alpha, bias, norm_weight, *_ = ctx.saved_tensors
    if x.numel() == 0:
        first = (_zeros(t) for t in (x, y, y_bias, H_post, H_res, phi, alpha, bias, norm_weight))
        return (*first, *4 * (None,))
    du = torch.zeros_like(y, dtype=x.dtype) if du is None else du
    backward = boundary_backward_op if _traced(x) else boundary_backward
    dx, dy, d_post, d_res, dphi, dalpha, dbias, dnorm = backward(
        *ctx.saved_tensors, g, du, _wide(dH_post), _wide(dH_res), *ctx.options
    )
    d_res = None if H_res is None else d_res
    dnorm = None if norm_weight is None else dnorm
    gradients = dx, dy, _bias_grad(dy, y_bias), d_post, d_res, dphi, dalpha, dbias, dnorm
    return (*gradients, None, None, None, None)


def _post_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _post_backward(ctx, g):
    x, y, y_bias, H_post, H_res = ctx.saved_tensors
    if x.numel() == 0:
        return tuple(_zeros(t) for t in ctx.saved_tensors)
    backward = post_backward_op if _traced(x) else post_backward
    dx, dy, d_post, d_res = backward(x, y, y_bias, H_post, H_res, g)
    d_res = None if H_res is None else d_res
    return dx, dy, _bias_grad(dy, y_bias), d_post, d_res


def _zeros(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.zeros_like(t)


def _wide(t: Tensor | None) -> Tensor | None:
    """A coefficient's gradient, contiguous; None for an absent or empty one."""
    return t.float().contiguous() if t is not None and t.numel() else None


pre_op.register_autograd(_pre_backward, setup_context=_pre_context)
post_pre_op.register_autograd(_post_pre_backward, setup_context=_post_pre_context)
post_op.register_autograd(_post_backward, setup_context=_post_context)


def run(op: Callable, function: type[torch.autograd.Function], x: Tensor, *inputs):
    """``op`` of the operands where a compiler traces, else ``function``, which does the same.

    Without the outputs that only a backward reads: p, 1 / rms and the products of streams.
    """
    return op(x, *inputs) if _traced(x) else function.apply(x, *inputs)


class Pre(torch.autograd.Function):
    """``pre_op`` without the dispatch of an op and the outputs that only its backward reads."""

    @staticmethod
    def forward(ctx, *inputs):
        output = pre(*inputs)
        _pre_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[6])
        return *output[:3], output[6]

    backward = staticmethod(_pre_backward)


class PostPre(torch.autograd.Function):
    """``post_pre_op``, as ``Pre`` is ``pre_op``."""

    @staticmethod
    def forward(ctx, *inputs):
        output = post_pre(*inputs)
        _post_pre_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[7])
        return *output[:4], output[7]

    backward = staticmethod(_post_pre_backward)


class Post(torch.autograd.Function):
    """``post_op`` without the dispatch of an op."""

    @staticmethod
    def forward(ctx, *inputs):
        _post_context(ctx, inputs, None)
        return post(*inputs)

    backward = staticmethod(_post_backward)


class Enter(torch.autograd.Function):
    """``pre_op`` that hands x on: whoever reads x next sends its gradient back through here.

    x feeds both this pre and the next boundary. As two uses autograd would add two gradients of x;
    handed on, the other one is an operand of the kernel that makes this one.
    """

    @staticmethod
    def forward(ctx, x, phi, alpha, bias, norm_weight, variant, iterations, eps, norm_eps):
        inputs = (x, phi, alpha, bias, norm_weight, variant, iterations, eps, norm_eps)
        output = (pre_op if _traced(x) else pre)(*inputs)
        _pre_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[6])
        return (x.view_as(x), *output[:3], output[6])

    @staticmethod
    def backward(ctx, g, du, dH_post, dH_res, _):
        return _pre_gradients(ctx, g, du, dH_post, dH_res)
