"""DeepSeek-V4's connection: the arithmetic and the layout, against transformers' own modules."""

from __future__ import annotations

import pytest
import torch

from mhc_kernels import reference
from mhc_megatron.checkpoint.connections import transposition
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.streams import Exit

N, C, B, S = 4, 24, 2, 5

transformers = pytest.importorskip("transformers")


def _config(**changes):
    return transformers.AutoConfig.for_model(
        "deepseek_v4", **{"hidden_size": C, "hc_mult": N, "rms_norm_eps": 1e-5, **changes}
    )


def _randomise(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_a_sublayer_is_transformers_own(iterations: int) -> None:
    """u and x_next on random weights, whose res logits are not symmetric."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    module = DeepseekV4HyperConnection(_config(hc_sinkhorn_iters=iterations))
    _randomise(module, 3)
    x, y = torch.randn(B, S, N, C), torch.randn(B, S, C)
    with torch.no_grad():
        post, comb, collapsed = module(x)
        expected = post.unsqueeze(-1) * y.unsqueeze(-2) + comb.transpose(-1, -2) @ x
    order = torch.tensor(transposition(N))
    u, H_post, H_res = reference.mhc_pre(
        x,
        module.fn[order],
        module.scale,
        module.base[order],
        iterations=iterations,
        eps=1e-5,
        sinkhorn_kind="deepseek-v4",
    )
    torch.testing.assert_close(u, collapsed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(H_res, comb.transpose(-1, -2), atol=1e-6, rtol=1e-5)
    x_next = reference.mhc_post(x, y, H_post, H_res)
    torch.testing.assert_close(x_next, expected, atol=1e-5, rtol=1e-5)
    assert (H_res - H_res.mT).abs().max() > 0.05  # a transposed matrix would have been seen


def test_the_head_is_transformers_own() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead

    head = DeepseekV4HyperHead(_config())
    _randomise(head, 4)
    mhc = MHCConfig(exit="learned", sinkhorn="deepseek-v4", norm_eps=1e-5)
    exit = Exit(mhc, C, torch.device("cpu"))
    with torch.no_grad():
        exit.phi.copy_(head.hc_fn)
        exit.alpha.copy_(head.hc_scale)
        exit.bias.copy_(head.hc_base)
        x = torch.randn(S, B, N, C)
        torch.testing.assert_close(exit(x.flatten(-2)), head(x), atol=1e-5, rtol=1e-5)


def test_gradients_pass_the_gradcheck() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, N, N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.sinkhorn_deepseek_v4(x, 3), (logits,))


def test_it_is_the_paper_s_up_to_its_epsilons() -> None:
    """On logits near the initialisation both projections are the same matrix."""
    torch.manual_seed(2)
    logits = torch.randn(200, N, N, dtype=torch.float64)
    delta = reference.sinkhorn_deepseek_v4(logits) - reference.sinkhorn(logits)
    assert 0 < delta.abs().max() < 1e-3


@pytest.mark.parametrize("n", [2, 3, 4])
def test_transposing_twice_changes_nothing(n: int) -> None:
    order = transposition(n)
    assert [order[k] for k in order] == list(range(n * n + 2 * n))
    assert n < 2 or order != sorted(order)


def test_the_connection_takes_the_eager_path() -> None:
    from mhc_megatron.connection import HyperConnection

    connection = HyperConnection(
        MHCConfig(sinkhorn="deepseek-v4"), C, 0, "0.attn", device=torch.device("cpu")
    )
    assert connection._ops is reference
    x = torch.randn(S, B, N * C)
    u = connection(x)
    expected, _, _ = reference.mhc_pre(
        x.unflatten(-1, (N, C)),
        connection.phi,
        connection.alpha,
        connection.bias,
        sinkhorn_kind="deepseek-v4",
    )
    assert torch.equal(u, expected)


def test_other_variants_refuse_it() -> None:
    with pytest.raises(UserError, match="needs variant mhc"):
        MHCConfig(variant="identity", sinkhorn="deepseek-v4")
