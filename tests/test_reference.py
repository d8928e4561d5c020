"""The equations of the connection against independent formulations."""

import itertools
import math

import numpy as np
import pytest
import torch

from mhc_kernels import reference
from mhc_kernels.reference import VARIANTS, alpha_size, mhc_post, mhc_post_pre, mhc_pre, phi_rows

N, C, T = 4, 8, 5


def random_inputs(variant="mhc", n=N, C=C, T=T, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    K = phi_rows(n, variant)
    return {
        "x": normal(T, n, C),
        "phi": normal(K, n * C, scale=0.3),
        "alpha": 0.5 + normal(alpha_size(variant), scale=0.2),
        "bias": normal(K),
    }


def by_hand(x, phi, alpha, bias, variant, iterations=20, eps=reference.NORM_EPS):
    """H_pre, H_post, H_res of one token in plain numpy loops, from the paper's text alone."""
    n, C = x.shape
    flat = x.reshape(-1)
    v = flat / math.sqrt((flat**2).mean() + eps)
    raw = np.array([sum(phi[k, j] * v[j] for j in range(n * C)) for k in range(len(phi))])
    part = np.array([0] * n + [1] * n + [2] * (len(phi) - 2 * n))
    scale = np.array([alpha[p] for p in part])
    logits = scale * (np.tanh(raw) if variant == "hc" else raw) + bias
    pre, post, res = logits[:n], logits[n : 2 * n], logits[2 * n :]
    if variant == "hc":
        return pre, post, res.reshape(n, n)
    H_pre, H_post = 1 / (1 + np.exp(-pre)), 2 / (1 + np.exp(-post))
    if variant == "identity":
        return H_pre, H_post, np.eye(n)
    if variant == "birkhoff":
        weights = np.exp(res) / np.exp(res).sum()
        H_res = np.zeros((n, n))
        for weight, order in zip(weights, itertools.permutations(range(n)), strict=True):
            for o in range(n):
                H_res[o, order[o]] += weight
        return H_pre, H_post, H_res
    M = np.exp(res.reshape(n, n))
    for _ in range(iterations):
        for i in range(n):
            M[:, i] /= M[:, i].sum()
        for o in range(n):
            M[o, :] /= M[o, :].sum()
    return H_pre, H_post, M


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [2, 4])
def test_sublayer_is_the_papers(variant, n):
    """u and x_next, token by token, with loops over streams and channels; H_res not symmetric."""
    inputs = random_inputs(variant, n=n)
    u, H_post, H_res = mhc_pre(**inputs, variant=variant)
    y = torch.randn(T, C, dtype=torch.float64)
    x_next = mhc_post(inputs["x"], y, H_post, H_res)
    numbers = {key: value.numpy() for key, value in inputs.items()}
    for t in range(T):
        x = numbers["x"][t]
        parts = (numbers["phi"], numbers["alpha"], numbers["bias"])
        H_pre, post, res = by_hand(x, *parts, variant)
        for c in range(C):
            assert u[t, c].item() == pytest.approx(sum(H_pre[i] * x[i, c] for i in range(n)))
            for o in range(n):
                mixed = sum(res[o, i] * x[i, c] for i in range(n)) + post[o] * y[t, c].item()
                assert x_next[t, o, c].item() == pytest.approx(mixed)


def test_transposed_H_res_is_another_result():
    """The trap that shipped elsewhere: H_res transposed. A symmetric matrix hides it."""
    inputs = random_inputs()
    _, H_post, H_res = mhc_pre(**inputs)
    y = torch.zeros(T, C, dtype=torch.float64)
    ours = mhc_post(inputs["x"], y, H_post, H_res)
    assert torch.allclose(ours, H_res @ inputs["x"])
    assert not torch.allclose(ours, H_res.transpose(-1, -2) @ inputs["x"], rtol=1e-2)


def test_phi_rows_of_H_res_are_row_major():
    """Raising b at row 2n + o*n + i raises H_res[o, i] above every other entry."""
    inputs = random_inputs()
    for o, i in itertools.product(range(N), range(N)):
        bias = torch.zeros_like(inputs["bias"])
        bias[2 * N + o * N + i] = 12.0
        H_res = mhc_pre(inputs["x"], inputs["phi"], 0 * inputs["alpha"], bias)[2]
        assert H_res[0].argmax().item() == o * N + i


def test_sinkhorn_is_the_projection_by_log_domain_potentials():
    """Against Sinkhorn in dual form: log M = logits + f[o] + g[i], f and g found by log-sum-exp."""
    logits = torch.randn(7, N, N, dtype=torch.float64)
    f, g = torch.zeros(7, N, dtype=torch.float64), torch.zeros(7, N, dtype=torch.float64)
    for _ in range(20):
        g = -torch.logsumexp(logits + f[:, :, None], dim=1)
        f = -torch.logsumexp(logits + g[:, None, :], dim=2)
    expected = (logits + f[:, :, None] + g[:, None, :]).exp()
    assert torch.allclose(reference.sinkhorn(logits), expected, atol=1e-12)


def test_sinkhorn_normalises_rows_last():
    """After few iterations rows sum to one to rounding, columns do not yet."""
    M = reference.sinkhorn(3 * torch.randn(50, N, N, dtype=torch.float64), iterations=2)
    assert (M.sum(-1) - 1).abs().max() < 1e-14
    assert (M.sum(-2) - 1).abs().max() > 1e-4


def test_sinkhorn_survives_large_logits():
    logits = 300 * torch.randn(20, N, N)
    M = reference.sinkhorn(logits)
    assert torch.isfinite(M).all() and (M >= 0).all()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_birkhoff_is_doubly_stochastic(n):
    H = reference.birkhoff(5 * torch.randn(30, math.factorial(n), dtype=torch.float64), n)
    one = torch.ones(30, n, dtype=torch.float64)
    assert torch.allclose(H.sum(-1), one) and torch.allclose(H.sum(-2), one)
    assert torch.equal(reference.permutations(n)[0], torch.eye(n))


def test_scale_of_x_does_not_change_the_coefficients():
    """The norm of Eq. (7): logits see the direction of vec(x) alone."""
    inputs = random_inputs()
    small = mhc_pre(**inputs)
    large = mhc_pre(**{**inputs, "x": 1000 * inputs["x"]})
    assert torch.allclose(small[1], large[1]) and torch.allclose(small[2], large[2])
    assert torch.allclose(1000 * small[0], large[0])


def test_norm_weight_and_bias_of_y():
    inputs = random_inputs()
    weight, y_bias = torch.rand(C, dtype=torch.float64), torch.randn(C, dtype=torch.float64)
    plain, H_post, H_res = mhc_pre(**inputs)
    normed, *_ = mhc_pre(**inputs, norm_weight=weight, norm_eps=1e-6)
    expected = torch.nn.functional.rms_norm(plain, (C,), weight, eps=1e-6)
    assert torch.allclose(normed, expected)
    y = torch.randn(T, C, dtype=torch.float64)
    with_bias = mhc_post(inputs["x"], y, H_post, H_res, y_bias)
    assert torch.allclose(with_bias, mhc_post(inputs["x"], y + y_bias, H_post, H_res))


def test_post_pre_is_post_then_pre():
    first, second = random_inputs(seed=1), random_inputs(seed=2)
    _, H_post, H_res = mhc_pre(**first)
    y = torch.randn(T, C, dtype=torch.float64)
    parameters = (second["phi"], second["alpha"], second["bias"])
    x_next, u, *coefficients = mhc_post_pre(first["x"], y, H_post, H_res, *parameters)
    assert torch.equal(x_next, mhc_post(first["x"], y, H_post, H_res))
    expected = mhc_pre(x_next, *parameters)
    for ours, theirs in zip((u, *coefficients), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    """Double precision gradients of the whole sublayer, F a fixed nonlinear map."""
    inputs = random_inputs(variant, n=2 if variant == "birkhoff" else 3, C=4, T=2)
    leaves = [value.requires_grad_() for value in inputs.values()]

    def sublayer(x, phi, alpha, bias):
        u, H_post, H_res = mhc_pre(x, phi, alpha, bias, variant=variant, iterations=5)
        return mhc_post(x, torch.tanh(u) * u, H_post, H_res)

    assert torch.autograd.gradcheck(sublayer, leaves, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    """Streams keep their dtype; coefficients are float32 whatever it is."""
    inputs = random_inputs(dtype=torch.float32)
    x = inputs.pop("x").to(dtype)
    u, H_post, H_res = mhc_pre(x, **inputs)
    x_next = mhc_post(x, u, H_post, H_res)
    assert (u.dtype, H_post.dtype, H_res.dtype) == (dtype, torch.float32, torch.float32)
    assert x_next.dtype == dtype
    exact = mhc_pre(x.double(), **{key: value.double() for key, value in inputs.items()})
    assert torch.allclose(H_res.double(), exact[2], atol=1e-5)


def test_no_tokens():
    inputs = random_inputs()
    inputs["x"] = inputs["x"][:0]
    u, H_post, H_res = mhc_pre(**inputs)
    assert u.shape == (0, C) and H_res.shape == (0, N, N)
    assert mhc_post(inputs["x"], u, H_post, H_res).shape == (0, N, C)


@pytest.mark.parametrize(
    ("n", "variant", "words"),
    [(0, "mhc", "at least 1"), (4, "other", "must be one of"), (5, "birkhoff", "at most 4")],
)
def test_wrong_choices(n, variant, words):
    with pytest.raises(ValueError, match=words):
        phi_rows(n, variant)
