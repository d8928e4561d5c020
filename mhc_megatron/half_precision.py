"""Checkpoints of Megatron's half-precision optimizer with float32 parameters among the others.

The connections' parameters stay float32 in a bf16 or fp16 model. Without the distributed optimizer,
``Float16OptimizerWithFloat16Params.sharded_state_dict`` (core/optimizer/optimizer.py:1138 of
megatron-core 0.19.2) numbers the half-precision parameters alone, where the state it describes
numbers all of them: it looks the state of one parameter up under the name of another, and fails if
their shapes differ. ``name_every_parameter`` gives it numbers of all of them.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

_own = Float16OptimizerWithFloat16Params.sharded_state_dict


def name_every_parameter() -> None:
    """Replace the method in this process; optimizers without float32 parameters keep Megatron's."""
    Float16OptimizerWithFloat16Params.sharded_state_dict = _sharded_state_dict


def _sharded_state_dict(
    self: Float16OptimizerWithFloat16Params,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    if not any(self.fp32_from_fp32_groups):
        return _own(self, model_sharded_state_dict, is_loading, metadata)
    if is_loading:
        self.init_state_fn(self.optimizer, self.config)
    state = self.state_dict()
    groups = [group["params"] for group in self.optimizer.param_groups]
    of_model = _parameters_of_model(self)
    sharded = get_param_id_to_sharded_param_map(
        model_sharded_state_dict, (of_model.get(id(p), p) for p in chain.from_iterable(groups))
    )
    numbers = [group["params"] for group in state["optimizer"]["param_groups"]]
    state["fp32_from_fp16_params"] = [
        [
            make_sharded_optimizer_tensor(sharded[number], p, prefix="optimizer.state.fp32_param")
            for number, p in zip(numbers_of_group, group, strict=True)
            if id(p) in of_model
        ]
        for numbers_of_group, group in zip(numbers, groups, strict=True)
    ]
    # An empty list is no tensor: it would be saved apart and not fit its place on loading.
    state["fp32_from_fp16_params"] = [
        group or LocalNonpersistentObject([]) for group in state["fp32_from_fp16_params"]
    ]
    step = self._extract_common_per_param_step(state["optimizer"])
    optim_state_to_sharding_state(state["optimizer"], sharded, exclude_keys="step")
    if step:
        state["optimizer"]["state"]["common_step"] = step
    return state


def _parameters_of_model(optimizer: Float16OptimizerWithFloat16Params) -> dict[int, Tensor]:
    """id of a float32 main copy -> the half-precision parameter it belongs to."""
    main = chain.from_iterable(optimizer.fp32_from_float16_groups)
    half = chain.from_iterable(optimizer.float16_groups)
    return {id(copy): parameter for copy, parameter in zip(main, half, strict=True)}
