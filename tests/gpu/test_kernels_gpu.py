"""The kernels on a GPU: the full matrix against float64, determinism, compile, CUDA graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_cases import Case, make_inputs, run, values_and_gradients  # noqa: E402

import mhc_kernels  # noqa: E402
from mhc_kernels import reference  # noqa: E402

LIMITS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 5e-6}

CASES = [
    Case(4, 1280, 300),
    Case(4, 2560, 64),
    Case(4, 48, 70, "identity"),
    Case(4, 128, 37, "birkhoff", "float16"),
    Case(4, 64, 130, "hc"),
    Case(4, 96, 129, norm=True, y_bias=True),
    Case(4, 2560, 203, norm=True),
    Case(4, 1280, 61, "identity", norm=True),
    Case(2, 128, 45, norm=True),
    Case(4, 64, 7, dtype="float32", norm=True, y_bias=True),
    Case(2, 64, 77),
    Case(2, 128, 1, "birkhoff", "float32"),
    Case(8, 64, 33),
    Case(4, 64, 9, dtype="float32", low=-110.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    result = run(case, "cuda")
    for name, error in result["kernels"].items():
        # Where cancellation makes eager torch in the same dtypes err more, so may the kernels.
        assert error < max(LIMITS[case.dtype], 2 * result["eager"][name]), (name, error)


def test_two_runs_agree_bit_for_bit():
    inputs = make_inputs(Case(4, 1280, 1000), "cuda")
    first = values_and_gradients(mhc_kernels, inputs, "mhc")
    second = values_and_gradients(mhc_kernels, inputs, "mhc")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_tokens():
    inputs = make_inputs(Case(4, 64, 0), "cuda")
    result = values_and_gradients(mhc_kernels, inputs, "mhc")
    assert result["x2"].shape == (0, 4, 64)
    assert result["dphi0"].shape == (24, 256) and not result["dphi0"].any()


def test_strides():
    inputs = make_inputs(Case(4, 64, 32), "cuda")
    whole = torch.randn(32, 4, 65, device="cuda", dtype=torch.bfloat16)
    parameters = inputs["phi0"], inputs["alpha0"], inputs["bias0"]
    for x in (whole[..., 1:], whole[..., :64].transpose(0, 1).contiguous().transpose(0, 1)):
        for got, want in zip(
            mhc_kernels.mhc_pre(x, *parameters),
            mhc_kernels.mhc_pre(x.clone(), *parameters),
            strict=True,
        ):
            assert torch.equal(got, want)


def test_saved_memory():
    """Beyond x, y and parameters, a sublayer keeps less than 256 bytes a token."""
    T, C = 512, 256
    inputs = make_inputs(Case(4, C, T), "cuda")
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    _, u, H_post, H_res = mhc_kernels.mhc_enter(
        leaves["x"], leaves["phi0"], leaves["alpha0"], leaves["bias0"]
    )
    own = {t.data_ptr() for t in leaves.values()}
    kept: dict[int, int] = {}

    def keep(t):
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x_next, *_ = mhc_kernels.mhc_post_pre(
            leaves["x"], leaves["y0"], H_post, H_res, leaves["phi1"], leaves["alpha1"],
            leaves["bias1"],
        )  # fmt: skip
    kept.pop(x_next.data_ptr(), None)  # the next sublayer's x
    assert 0 < sum(kept.values()) / T < 256


def test_compile_and_graph():
    inputs = make_inputs(Case(4, 64, 96), "cuda")
    parameters = inputs["phi0"], inputs["alpha0"], inputs["bias0"]
    eager = mhc_kernels.mhc_pre(inputs["x"], *parameters)
    compiled = torch.compile(mhc_kernels.mhc_pre, fullgraph=True)(inputs["x"], *parameters)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mhc_kernels.mhc_pre(inputs["x"], *parameters)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


@pytest.mark.parametrize("L", [1, 3, 9])
def test_refill(L):
    generator = torch.Generator().manual_seed(L)

    def random(*size, dtype=torch.float32):
        return torch.rand(size, generator=generator).to("cuda", dtype)

    T, n, C = 70, 4, 128
    x = random(T, n, C, dtype=torch.bfloat16)
    y = [random(T, C, dtype=torch.bfloat16) for _ in range(L)]
    H_post, H_pre = [random(T, n) for _ in range(L)], [random(T, n) for _ in range(L)]
    H_res = [random(T, n, n) / n for _ in range(L)]
    streams, reads = mhc_kernels.mhc_refill(x, y, H_post, H_res, H_pre)
    exact = reference.mhc_refill(x, y, H_post, H_res, H_pre)
    for layer in range(L):
        x = mhc_kernels.mhc_post(x, y[layer], H_post[layer], H_res[layer])
        assert torch.equal(streams[layer], x)
        assert torch.allclose(reads[layer].float(), exact[1][layer].float(), rtol=2e-2, atol=2e-2)
