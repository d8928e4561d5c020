"""One tester for the kernels: a chain pre, post_pre, post against reference.py in float64.

Run as a program it tests the kernels on the CPU through Triton's interpreter (TRITON_INTERPRET=1)
and prints one JSON line a case.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A shape of the chain; ``norm`` and ``y_bias`` switch the optional operands on.

    ``low`` is added to the logits of H_res's first column.
    """

    n: int
    C: int
    T: int
    variant: str = "mhc"
    dtype: str = "bfloat16"
    norm: bool = False
    y_bias: bool = False
    low: float = 0.0


#: Small awkward shapes: T not a multiple of a tile, C with few factors of two, every variant.
INTERPRETER_CASES = (
    Case(4, 16, 5, dtype="float32"),
    Case(4, 32, 7),
    Case(4, 48, 37, "identity"),
    Case(4, 32, 3, "birkhoff", "float16"),
    Case(4, 32, 7, "hc"),
    Case(2, 32, 7),
    Case(2, 32, 1, "birkhoff", "float32"),
    Case(8, 16, 3),
    Case(4, 32, 9, norm=True, y_bias=True),
    Case(4, 32, 9, dtype="float32", norm=True, y_bias=True),
    Case(4, 240, 3, norm=True),  # the last block of channels reaches beyond C
    Case(4, 32, 5, dtype="float32", low=-110.0),  # exp(-110) is 0 in float32
)


def make_inputs(case: Case, device: str) -> dict[str, Tensor]:
    """Random operands of the chain in float64, rounded to the dtypes they will have."""
    from mhc_kernels import reference

    generator = torch.Generator().manual_seed(case.C + case.T)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=generator, dtype=torch.float64)

    K, A = reference.phi_rows(case.n, case.variant), reference.alpha_size(case.variant)
    half = getattr(torch, case.dtype)
    inputs = {"x": normal(case.T, case.n, case.C).to(half)}
    for name in ("y0", "y1"):
        inputs[name] = normal(case.T, case.C).to(half)
    for name in ("0", "1"):
        scale = 2 / (case.n * case.C) ** 0.5
        inputs["phi" + name] = normal(K, case.n * case.C, scale=scale).float()
        inputs["alpha" + name] = normal(A, scale=0.3).add(1).float()
        inputs["bias" + name] = normal(K).float()
        inputs["bias" + name][2 * case.n :: case.n] += case.low
    if case.norm:
        inputs["norm_weight"] = normal(case.C, scale=0.1).add(1).float()
    if case.y_bias:
        inputs["y_bias"] = normal(case.C).to(half)
    return {name: t.to(device) for name, t in inputs.items()}


def chain(module, t: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """enter, post_pre, post of ``module`` (mhc_kernels or its reference) on the operands."""
    options = {"variant": variant, "norm_weight": t.get("norm_weight")}
    x, u0, H_post, H_res = module.mhc_enter(t["x"], t["phi0"], t["alpha0"], t["bias0"], **options)
    x1, u1, H_post1, H_res1 = module.mhc_post_pre(
        x, t["y0"], H_post, H_res, t["phi1"], t["alpha1"], t["bias1"],
        y_bias=t.get("y_bias"), **options,
    )  # fmt: skip
    x2 = module.mhc_post(x1, t["y1"], H_post1, H_res1, t.get("y_bias"))
    out = {"u0": u0, "H_post": H_post, "x1": x1, "u1": u1, "H_post1": H_post1, "x2": x2}
    if H_res is not None:
        out |= {"H_res": H_res, "H_res1": H_res1}
    return out


def values_and_gradients(module, inputs: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """Outputs of the chain, and the gradients (d...) of a random functional of u0, u1 and x2."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    out = chain(module, leaves, variant)
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for name in ("u0", "u1", "x2"):
        weight = torch.randn(out[name].shape, generator=generator, dtype=torch.float64)
        loss = loss + (out[name].double() * weight.to(out[name].device)).sum()
    loss.backward()
    return out | {"d" + name: t.grad for name, t in leaves.items()}


def error(value: Tensor, exact: Tensor) -> float:
    """Relative Frobenius distance."""
    exact = exact.detach().double()
    distance = (value.detach().double() - exact).norm() / exact.norm().clamp_min(1e-30)
    return distance.item()


def run(case: Case, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Errors against float64 of the kernels ("kernels") and of eager torch in the same dtypes."""
    import mhc_kernels
    from mhc_kernels import reference

    inputs = make_inputs(case, device)
    wide = {name: t.double() for name, t in inputs.items()}
    exact = values_and_gradients(reference, wide, case.variant)
    result = {}
    for label, module in (("kernels", mhc_kernels), ("eager", reference)):
        got = values_and_gradients(module, inputs, case.variant)
        result[label] = {name: error(got[name], exact[name]) for name in exact}
    return result


def refilled(case: Case, device: str = "cpu", sublayers: int = 3) -> dict[str, bool]:
    """Whether a refill gives the bits of the forward: every x after the first, and every u.

    The last sublayer has no bias, the others the case's; every read has the case's norm. Memory
    that is there already, with other values in it.
    """
    import mhc_kernels

    t = make_inputs(case, device)
    x, norm = t["x"], t.get("norm_weight")
    options = {"variant": case.variant, "with_H_pre": True, "norm_weight": norm}
    weights = [(t[f"phi{i % 2}"], t[f"alpha{i % 2}"], t[f"bias{i % 2}"]) for i in range(sublayers)]
    streams, reads, kept = [], [], {name: [] for name in ("y", "y_bias", "H_post", "H_res")}
    u, H_post, H_res, H_pre = mhc_kernels.mhc_pre(x, *weights[0], **options)
    reads.append(u)
    pre = [H_pre]
    for i in range(1, sublayers):
        bias = t.get("y_bias") if i < sublayers - 1 else None
        operands = {"y": t[f"y{i % 2}"], "y_bias": bias, "H_post": H_post, "H_res": H_res}
        for name, value in operands.items():
            kept[name].append(value)
        following = streams[-1] if streams else x
        x_next, u, H_post, H_res, H_pre = mhc_kernels.mhc_post_pre(
            following, operands["y"], H_post, H_res, *weights[i], y_bias=bias, **options
        )
        streams.append(x_next)
        reads.append(u)
        pre.append(H_pre)
    out = [torch.ones_like(s) for s in streams], [torch.ones_like(r) for r in reads]
    mhc_kernels.mhc_refill(
        x, kept["y"], kept["H_post"], kept["H_res"], pre, y_bias=kept["y_bias"],
        norm_weight=[norm] * sublayers, out=out,
    )  # fmt: skip
    same = {f"x{i + 1}": torch.equal(a, b) for i, (a, b) in enumerate(zip(out[0], streams))}
    return same | {f"u{i}": torch.equal(a, b) for i, (a, b) in enumerate(zip(out[1], reads))}


def main() -> None:
    from triton_interpreter import install

    install()
    torch.set_num_threads(1)
    for case in INTERPRETER_CASES:
        line = {"case": asdict(case), "errors": run(case), "refilled": refilled(case)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
