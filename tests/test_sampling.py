"""How a token is chosen from its logits."""

import pytest
import torch

from mhc_megatron.generation import Sampling, choose


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-39, 1e-38, 1e-6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e30])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_tiny_temperatures_take_the_most_probable(
    temperature: float, scale: float, options: dict
) -> None:
    logits = scale * torch.tensor([-1.0, 2.0, 7.0, 6.5, float("-inf"), -3.0])
    generator = torch.Generator().manual_seed(1)
    assert choose(logits, Sampling(temperature, **options), generator) == 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 1e300])
def test_draws_are_as_probable_as_the_softmax_says(temperature: float) -> None:
    logits, generator = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(1)
    drawn = [choose(logits, Sampling(temperature), generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)
    assert torch.allclose(shares, torch.softmax(logits / temperature, 0), atol=0.03)
