"""FP8 on the wire: what it costs in error and in bytes."""

from __future__ import annotations

import pytest
import torch

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.wire import BLOCK, decode, encode


def error(x: torch.Tensor) -> float:
    got = decode(encode(x), x.dtype)
    return float((got.double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_and_bytes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 2, 4 * 256, generator=generator).to(dtype)
    assert encode(x).shape == (64, 2, 4 * 256 + 4 * 4 * 256 // BLOCK)
    assert 0.02 < error(x) < 0.03
    # A scale for each block: blocks of other sizes lose no more.
    x[..., :BLOCK] *= 1e4
    x[..., BLOCK : 2 * BLOCK] *= 1e-6
    assert 0.02 < error(x) < 0.03
    assert 0.02 < error(x[..., BLOCK : 2 * BLOCK]) < 0.03


def test_zeros_powers_of_two_and_nan() -> None:
    x = torch.zeros(3, 1, BLOCK)
    assert torch.equal(decode(encode(x), x.dtype), x)
    x[0] = 448.0  # the largest of e4m3: exact
    x[1, 0, :4] = torch.tensor([1.0, -0.5, 0.25, 0.0])
    assert torch.equal(decode(encode(x), x.dtype)[0], x[0])
    torch.testing.assert_close(decode(encode(x), x.dtype)[1], x[1], rtol=1e-6, atol=0)
    x[2, 0, 5] = float("nan")
    assert decode(encode(x), x.dtype)[2].isnan().any()


def test_unknown_wire() -> None:
    with pytest.raises(UserError, match="wire must be one of model, fp8"):
        MHCConfig(wire="int4")
