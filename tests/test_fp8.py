"""mhc_megatron/fp8.py: weights and their scales in a checkpoint, with a stand-in for a TE module.

Transformer Engine's own modules: tests/gpu/test_transformer_engine_gpu.py, resumed runs.
"""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch import nn

from mhc_megatron.fp8 import scales_before_weights

DELAYED = Namespace(fp8_param_gather=True, fp8_recipe="delayed", stream_ckpt_dequant=True)


class _Quantized(torch.Tensor):
    """A weight whose ``copy_`` rounds to a grid of its owner's scale and notes what it met."""

    @staticmethod
    def __new__(cls, data, owner):
        made = torch.Tensor._make_subclass(cls, data)
        made.owner = owner
        return made

    def copy_(self, src, *args, **kwargs):
        self.owner.amax = float(src.abs().max())
        grid = 8.0 * self.owner.scale
        with torch._C.DisableTorchFunctionSubclass():
            self.data.copy_((src * grid).round() / grid)
        return self


class Linear(nn.Module):
    """What matters of TransformerEngineBaseModule: FP8 weights, scale and amax in extra state."""

    def __init__(self, scale: float = 1.0, amax: float = 0.0) -> None:
        super().__init__()
        self.primary_weights_in_fp8, self.scale, self.amax = True, scale, amax
        self.register_buffer("weight", _Quantized(torch.zeros(3), self))

    def get_extra_state(self):
        return {"scale": self.scale, "amax": self.amax}

    def set_extra_state(self, state) -> None:
        self.scale, self.amax = state["scale"], state["amax"]


def saved() -> dict:
    """Weights on the grid of the scale 50, whose master's amax was 0.0351."""
    model = nn.Sequential(Linear(50.0))
    model[0].weight.copy_(torch.tensor([0.01, -0.02, 0.035]))
    model[0].amax = 0.0351
    return {key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in model.state_dict().items()}  # fmt: skip


def test_loaded_weights_are_the_saved_ones() -> None:
    state, model = saved(), nn.Sequential(Linear())
    with scales_before_weights([model], DELAYED):
        assert not DELAYED.stream_ckpt_dequant  # what the loader would quantise with scale 1
        model.load_state_dict(state)
    assert DELAYED.stream_ckpt_dequant
    assert torch.equal(torch.Tensor(model[0].weight), torch.Tensor(state["0.weight"]))
    assert model[0].get_extra_state() == {"scale": 50.0, "amax": 0.0351}


@pytest.mark.parametrize("changes", [{"fp8_recipe": "blockwise"}, {"fp8_param_gather": False}])
def test_nothing_is_done_elsewhere(changes) -> None:
    """The stand-in then loses its small weights, as a fresh module's scale makes it."""
    state, model = saved(), nn.Sequential(Linear())
    args = Namespace(**vars(DELAYED) | changes)
    with scales_before_weights([model], args):
        assert args.stream_ckpt_dequant
        model.load_state_dict(state)
    assert torch.Tensor(model[0].weight).abs().max() == 0
    assert not model[0]._load_state_dict_pre_hooks


def test_hooks_go_and_a_missing_state_is_none() -> None:
    """A checkpoint of bf16 weights has no scales."""
    state, model = saved(), nn.Sequential(Linear())
    del state["0._extra_state"]
    with scales_before_weights([model], DELAYED):
        model.load_state_dict(state, strict=False)
    assert model[0].scale == 1.0 and not model[0]._load_state_dict_pre_hooks
