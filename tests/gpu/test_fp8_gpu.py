"""What mhc_megatron/fp8.py relies on, with Transformer Engine's own modules, on one GPU.

One linear with FP8 weights and delayed scaling is trained, its state taken as Megatron's
checkpoints hold it (weights dequantised, scales in the extra state), and loaded into a fresh one.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
te = pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
from transformer_engine.common.recipe import DelayedScaling  # noqa: E402

WIDTH = 256
RECIPE = DelayedScaling(amax_history_len=1, amax_compute_algo="most_recent")


class Trained:
    """A linear and the float32 weight that its FP8 weight is made from, as Megatron has it."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        with te.fp8_model_init(enabled=True, recipe=RECIPE):
            self.linear = te.Linear(WIDTH, WIDTH, bias=False, params_dtype=torch.bfloat16).cuda()
        self.main = self.linear.weight.detach().dequantize().float()

    def step(self, number: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(number)
        x = torch.randn(WIDTH, WIDTH, device="cuda", generator=generator).bfloat16()
        x.requires_grad_()
        with te.fp8_autocast(enabled=True, fp8_recipe=RECIPE):
            y = self.linear(x)
        (y.float() ** 2).mean().backward()
        self.main -= 0.5 * self.linear.weight.grad.float()
        self.linear.weight.grad = None
        with torch.no_grad():
            self.linear.weight.quantize_(self.main)
        return torch.cat([y.detach().float(), x.grad.float()])

    def state(self) -> dict[str, torch.Tensor]:
        found = {key: value.detach() for key, value in self.linear.state_dict().items()}
        return found | {"weight": self.linear.weight.detach().dequantize().clone()}

    def everything(self) -> dict[str, torch.Tensor]:
        weight, meta = self.linear.weight, self.linear.fp8_meta
        return {
            "weight's bits": weight._data.clone(),
            "weight's scale_inv": weight._scale_inv.clone(),
            "its quantizer's scale": weight._quantizer.scale.clone(),
            "its quantizer's amax": weight._quantizer.amax.clone(),
            **{f"{way} {what}": getattr(meta[f"scaling_{way}"], what).clone()
               for way in ("fwd", "bwd") for what in ("scale", "amax_history")},
        }  # fmt: skip


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")


def resumed(state: dict[str, torch.Tensor], *, streamed: bool) -> Trained:
    """``streamed``: Megatron's loader quantises the weight into the module's own tensor first."""
    fresh = Trained()
    if streamed:
        with torch.no_grad():
            fresh.linear.weight.copy_(state["weight"])
        state = state | {"weight": fresh.linear.weight}
    fresh.linear.load_state_dict(state)
    return fresh


def test_a_loaded_module_is_the_saved_one() -> None:
    """All of its state, and what it computes in three more steps, bit for bit."""
    one = Trained()
    for number in range(4):
        one.step(number)
    other = resumed(one.state(), streamed=False)
    other.main = one.main.clone()
    mine, saved = other.everything(), one.everything()
    assert float(saved["its quantizer's scale"]) > 100  # a fresh module's is 1
    assert [key for key in saved if not torch.equal(mine[key], saved[key])] == []
    for number in range(4, 7):
        assert torch.equal(other.step(number), one.step(number)), number


def test_streamed_weights_are_coarser() -> None:
    one = Trained()
    for number in range(4):
        one.step(number)
    other = resumed(one.state(), streamed=True)
    saved, found = (each.linear.weight.detach().dequantize().float() for each in (one, other))
    error = float((found - saved).norm() / saved.norm())
    print(f"relative error of the weights {error:.1e}")
    assert error > 1e-3
