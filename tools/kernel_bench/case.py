"""What is measured: a shape, random inputs for it, and the bytes every part has to move.

The symbols are those of ``mhc_kernels.reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_kernels import reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: Sublayers of the chain: pre, seven post_pre, post, with F = identity.
SUBLAYERS = 8

#: Parts that are timed. ``chain`` and ``chain_fwd`` are per sublayer; ``chain`` is forward and
#: backward to the first x and to the parameters of every sublayer.
PARTS = (
    "chain",
    "chain_fwd",
    "pre_fwd",
    "post_fwd",
    "pre_bwd",
    "post_bwd",
    "post_pre_fwd",
    "post_pre_bwd",
)


def floor_elements(part: str, n: int) -> int:
    """Stream elements per token and channel that ``part`` must read or write, each once.

    pre reads x, writes u; its backward reads du, x and writes dx. post reads x, y, writes x_next;
    its backward reads g_next, x, y and writes dx, dy. The boundary reads x, y, writes x_next, u;
    its backward reads g_next, du, x, y and writes dx, dy (x_next is computed again on the fly). A
    sublayer of the chain counts as one boundary. Coefficients (some 200 bytes a token) and phi
    (once per kernel, 4 K n C bytes) are left out.
    """
    boundary_fwd, boundary_bwd = 2 * n + 2, 3 * n + 3
    return {
        "pre_fwd": n + 1,
        "pre_bwd": 2 * n + 1,
        "post_fwd": 2 * n + 1,
        "post_bwd": 3 * n + 2,
        "post_pre_fwd": boundary_fwd,
        "post_pre_bwd": boundary_bwd,
        "chain_fwd": boundary_fwd,
        "chain": boundary_fwd + boundary_bwd,
    }[part]


@dataclass(frozen=True)
class Case:
    """One shape: T tokens, C channels, n streams; dtype of the stream; variant of H_res."""

    T: int
    C: int
    n: int = 4
    dtype: str = "bf16"
    variant: str = "mhc"

    def __str__(self) -> str:
        return f"{self.T}x{self.C}"

    def floor_bytes(self, part: str) -> int:
        """Bytes ``part`` must move over all tokens (per sublayer for the chain)."""
        return floor_elements(part, self.n) * self.T * self.C * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Params:
    """Parameters of one sublayer, float32: phi [K, nC], alpha [3] (or [2]), bias [K]."""

    phi: Tensor
    alpha: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Inputs:
    """Operands of every part in the layout of ``mhc_kernels.reference``.

    x [T, n, C], y [T, C] in the case's dtype; H_post [T, n], H_res [T, n, n] or None, float32;
    ``params`` of SUBLAYERS sublayers; ``grads`` holds a random gradient for each output: x_next,
    u, H_post, H_res.
    """

    x: Tensor
    y: Tensor
    H_post: Tensor
    H_res: Tensor | None
    params: tuple[Params, ...]
    grads: dict[str, Tensor]

    def first(self, tokens: int) -> Inputs:
        """The same for the first ``tokens`` tokens (every operation is token by token)."""
        return Inputs(
            self.x[:tokens],
            self.y[:tokens],
            self.H_post[:tokens],
            None if self.H_res is None else self.H_res[:tokens],
            self.params,
            {name: grad[:tokens] for name, grad in self.grads.items()},
        )

    def double(self) -> Inputs:
        """The same values in float64."""
        return Inputs(
            self.x.double(),
            self.y.double(),
            self.H_post.double(),
            None if self.H_res is None else self.H_res.double(),
            tuple(Params(p.phi.double(), p.alpha.double(), p.bias.double()) for p in self.params),
            {name: grad.double() for name, grad in self.grads.items()},
        )


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random operands: logits of unit scale (not the near-constant ones of initialisation)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    dtype, T, n, C = DTYPES[case.dtype], case.T, case.n, case.C
    x, y = normal(T, n, C, dtype=dtype), normal(T, C, dtype=dtype)
    params = tuple(_params(case, normal) for _ in range(SUBLAYERS))
    first = params[0]
    with torch.no_grad():
        _, H_post, H_res = reference.mhc_pre(
            x, first.phi, first.alpha, first.bias, variant=case.variant
        )
    grads = {
        "x_next": normal(T, n, C, dtype=dtype),
        "u": normal(T, C, dtype=dtype),
        "H_post": normal(T, n),
        "H_res": normal(T, n, n),
    }
    return Inputs(x, y, H_post, H_res, params, grads)


def _params(case: Case, normal: Callable[..., Tensor]) -> Params:
    K = reference.phi_rows(case.n, case.variant)
    phi = normal(K, case.n * case.C) / (case.n * case.C) ** 0.5
    alpha = 1 + 0.1 * normal(reference.alpha_size(case.variant))
    return Params(phi, alpha, 0.5 * normal(K))
