"""mhc_megatron/fp8.py: weights and their scales in a checkpoint, with stand-ins for TE's modules.

Transformer Engine's own modules: tests/gpu/test_fp8_gpu.py; runs that are saved and resumed:
tests/gpu/test_transformer_engine_gpu.py.
"""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch import nn

from mhc_megatron.errors import UserError
from mhc_megatron.fp8 import check_expert_scales, scales_before_weights

DELAYED = {"fp8_param_gather": True, "fp8_recipe": "delayed", "stream_ckpt_dequant": True}
EXPERTS = 3


class Grouped(nn.Module):
    """What matters of Megatron's TEGroupedLinear: experts' scales in one extra state.

    As Transformer Engine does, it takes its extra state before anything else is done; as Megatron
    does, it merges what was saved expert by expert in a hook, which comes after.
    """

    def __init__(self) -> None:
        super().__init__()
        self.primary_weights_in_fp8, self.scales = True, torch.ones(EXPERTS)
        self._register_load_state_dict_pre_hook(self._merge)

    def _merge(self, state_dict, prefix, *_) -> None:
        keys = [f"{prefix}_extra_state{i or ''}" for i in range(EXPERTS)]
        if keys[-1] in state_dict:
            merged = torch.cat([state_dict.pop(key) for key in keys])
            state_dict[keys[0]] = merged

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if f"{prefix}_extra_state" in state_dict:
            self.set_extra_state(state_dict[f"{prefix}_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def get_extra_state(self):
        return self.scales

    def set_extra_state(self, state) -> None:
        if state.shape != self.scales.shape:
            raise RuntimeError(f"{len(state)} scales for {len(self.scales)} experts")
        self.scales = state.clone()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"experts": Grouped()}))


def saved() -> dict:
    """A checkpoint's state, expert by expert."""
    state = model().state_dict()
    state |= {f"1.experts._extra_state{i or ''}": torch.tensor([10.0 + i]) for i in range(EXPERTS)}
    return state


def test_scales_of_experts_arrive() -> None:
    one, args = model(), Namespace(**DELAYED)
    with scales_before_weights([one], args):
        assert not args.stream_ckpt_dequant  # what the loader would quantise with a scale of 1
        one.load_state_dict(saved())
    assert args.stream_ckpt_dequant
    assert one[1]["experts"].scales.tolist() == [10, 11, 12]


@pytest.mark.parametrize("changes", [{"fp8_recipe": "blockwise"}, {"fp8_param_gather": False}])
def test_nothing_is_done_elsewhere(changes) -> None:
    """The stand-in then fails as Megatron's layer does with delayed scaling."""
    one, args = model(), Namespace(**DELAYED | changes)
    with scales_before_weights([one], args):
        assert args.stream_ckpt_dequant
        with pytest.raises(RuntimeError, match="1 scales for 3 experts"):
            one.load_state_dict(saved())


def test_all_is_as_it_was_after_a_load_that_failed() -> None:
    one, args = model(), Namespace(**DELAYED)
    with pytest.raises(RuntimeError, match="Missing key"), scales_before_weights([one], args):
        one.load_state_dict({})
    assert args.stream_ckpt_dequant and not one._load_state_dict_pre_hooks


def test_a_checkpoint_of_bf16_weights_has_no_scales() -> None:
    state, one = saved(), model()
    state = {key: value for key, value in state.items() if "_extra_state" not in key}
    with scales_before_weights([one], Namespace(**DELAYED)):
        one.load_state_dict(state, strict=False)
    assert one[1]["experts"].scales.tolist() == [1, 1, 1]


def trained(**changes) -> Namespace:
    own = {"fp8": "hybrid", "fp8_recipe": "delayed", "num_experts": 8, "moe_grouped_gemm": True}
    return Namespace(**own | {"expert_model_parallel_size": 2, "load": "there"} | changes)


def test_scales_of_other_experts_are_refused() -> None:
    said = "4 experts a rank, .* this run's 2: set expert-model-parallel-size: 2"
    with pytest.raises(UserError, match=said):
        check_expert_scales(trained(), trained(expert_model_parallel_size=4))


@pytest.mark.parametrize(
    "changes", [{"fp8": None}, {"fp8_recipe": "blockwise"}, {"moe_grouped_gemm": False}]
)
def test_what_has_no_such_scales_may_change_its_layout(changes) -> None:
    other = trained(expert_model_parallel_size=4, **changes)
    check_expert_scales(trained(), other)
    check_expert_scales(other, trained())
    check_expert_scales(Namespace(), trained())
    check_expert_scales(trained(), trained(tensor_model_parallel_size=2))
