"""The connections' own parameter group in Megatron's optimizers.

A connection's parameters are a few matrices phi [K, n*C] and vectors alpha, b beside billions of
weights, and they steer everything. Left to Megatron's rules phi would be decayed like a weight and,
with ``--optimizer muon``, orthogonalised like one. Their group here:

- learning rate times ``MHCConfig.lr_mult`` (also the end of its decay);
- weight decay times ``MHCConfig.phi_weight_decay`` for phi, none for alpha and b;
- AdamW (or what ``--muon-scalar-optimizer`` says) where Muon and its like take the matrices:
  ``streams.mark`` says of phi what Megatron says of embeddings.

The group is also never merged with another one of the same multipliers: a group that mixes float32
with half-precision parameters is saved wrongly by the distributed optimizer, which looks its
members up in their original order but keeps the float32 ones first (distrib_optimizer.py:1097
reads what :488 reordered), and a checkpoint's groups are told apart by their settings alone
(optimizer.py:139).

Leans on core/optimizer/__init__.py of megatron-core 0.19.2: ``config_overrides`` of
``get_megatron_optimizer``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import (
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    ParamWithNamePredicate,
)
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.training import training as megatron_training

from mhc_megatron.config import MHCConfig
from mhc_megatron.streams import is_connection, is_projection

Overrides = dict[ParamKey, ParamGroupOverride]


def connection_overrides(
    config: OptimizerConfig, mhc: MHCConfig, overrides: Overrides | None = None
) -> Overrides:
    """``config_overrides`` for ``get_megatron_optimizer``: ``overrides`` and the connections'.

    Args:
        config: of the optimizer; its lr and min_lr are what ``lr_mult`` multiplies.
        mhc: the run's choices.
        overrides: those of the rest of the model; Megatron's standard ones where None.
    """
    overrides = get_standard_config_overrides(config) if overrides is None else dict(overrides)
    if not mhc.enabled:
        return overrides
    overrides = {_without_connections(key): value for key, value in overrides.items()}
    for name, matches, decay in (
        ("mhc_phi", is_projection, mhc.phi_weight_decay),
        ("mhc_vectors", lambda p: is_connection(p) and not is_projection(p), 0.0),
    ):
        # What sets the group apart: nothing else in Megatron 0.19.2 sets or reads this flag.
        override = ParamGroupOverride(wd_mult=decay, is_decoupled_lr=True)
        if mhc.lr_mult != 1:
            override["max_lr"] = config.lr * mhc.lr_mult
            override["min_lr"] = (config.min_lr or 0.0) * mhc.lr_mult
        overrides[ParamKey(predicate=ParamPredicate(name=name, fn=matches))] = override
    return overrides


def _without_connections(key: ParamKey) -> ParamKey:
    """``key`` for every parameter but the connections'; two overrides of one value would clash."""

    def matches(parameter: torch.nn.Parameter, name: str) -> bool:
        return not is_connection(parameter) and key.matches(parameter, name)

    name = f"{key} without the connections"
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def close_bucket_gaps() -> None:
    """Make ``--dist-ckpt-optim-fully-reshardable`` right for gradient buffers of several buckets.

    Each bucket ends with padding. Megatron 0.19.2 gathers a buffer's state without these gaps
    (core/optimizer/distrib_optimizer.py:1403) and then looks parameters up at places that count
    them (:1768): what lies behind the first gap is saved under another parameter's name, silently.
    Weights of round sizes leave no gap; the connections' vectors do. Once a process.
    """
    own = DistributedOptimizer.sharded_param_state_fully_reshardable
    if getattr(own, "closes_gaps", False):
        return

    @functools.wraps(own)
    def without_gaps(self, *args, **kwargs):
        places = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _places_without_gaps(buffer)
            return own(self, *args, **kwargs)
        finally:
            for buffer, place in zip(self.buffers, places, strict=True):
                buffer.param_index_map = place

    without_gaps.closes_gaps = True
    DistributedOptimizer.sharded_param_state_fully_reshardable = without_gaps


def _places_without_gaps(buffer) -> dict[torch.nn.Parameter, tuple[int, int, int]]:
    """``buffer.param_index_map`` (start, end, bucket) less the padding of the buckets before."""
    gaps, closed = [], 0
    for bucket in buffer.buckets:
        gaps.append(bucket.offset - closed)
        closed += bucket.numel_unpadded
    return {
        parameter: (start - gaps[bucket], end - gaps[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def load_across_expert_layouts() -> None:
    """Load the distributed optimizer's state where ranks chain other optimizers than were saved.

    Where expert parallelism is larger than one, parameters of experts have an optimizer of their
    own, and a checkpoint numbers the two (core/optimizer/optimizer.py:1570). Megatron 0.19.2 loads
    these neither into a run with one optimizer nor the other way round (:1579). With
    ``--dist-ckpt-optim-fully-reshardable`` the tensors are stored by parameter and arrive anyway;
    the settings of the parameter groups are handed on here. Once a process.
    """
    own = ChainedOptimizer.load_state_dict
    if getattr(own, "across_layouts", False):
        return

    @functools.wraps(own)
    def arranged(self, state_dict):
        _agree_on_step(state_dict)
        return own(self, _arrange(state_dict, self.chained_optimizers))

    arranged.across_layouts = True
    ChainedOptimizer.load_state_dict = arranged


def _arrange(state: Any, optimizers: list[MegatronOptimizer]) -> Any:
    """``state`` with an entry for each of ``optimizers``; as it is where it has them already."""
    count = len(optimizers)
    distributed = all(isinstance(optimizer, DistributedOptimizer) for optimizer in optimizers)
    if not (distributed and isinstance(state, dict)):
        return state
    own = [state] if count == 1 else [state.get(i, {}) for i in range(count)]
    if all("optimizer" in part for part in own):
        return state
    saved = [state, *(state[key] for key in state if isinstance(key, int))]
    saved = [part for part in saved if "optimizer" in part]
    if not saved:
        return state
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    parts = []
    for optimizer, part in zip(optimizers, own):
        chosen = _groups_for(optimizer, groups)
        part = {key: part[key] for key in part if not isinstance(key, int)}
        parts.append({**saved[0], **part, "optimizer": {**saved[0]["optimizer"], **chosen}})
    return parts[0] if count == 1 else dict(enumerate(parts))


def _groups_for(optimizer: DistributedOptimizer, groups: list[dict]) -> dict[str, list[dict]]:
    """``groups`` as ``optimizer`` looks for them: by settings, one of which says "of experts"."""
    expert = any(group.get("is_expert_parallel") for group in optimizer.param_groups)
    # Of two with the same settings it takes the later one: its own kind last.
    ordered = sorted(groups, key=lambda group: bool(group.get("is_expert_parallel")) == expert)
    return {"param_groups": [{**group, "is_expert_parallel": expert} for group in ordered]}


def save_without_parameters() -> None:
    """Save and load an optimizer that holds no parameter on this rank.

    Under expert parallelism the experts' optimizer of a pipeline stage without experts is one.
    Without a parameter it has made no step: with torch's Adam Megatron 0.19.2 cannot save it
    (core/optimizer/distrib_optimizer.py:839), and with any it saves no step. Where the first stage
    is such a one, its answer is what the whole checkpoint has: torch's Adam then cannot be loaded
    by the stages with experts, Transformer Engine's begins to count at one again. Here it takes the
    step of the optimizer it is chained to, also from a checkpoint without (``_agree_on_step``).
    Once a process.
    """
    state_of, collect = DistributedOptimizer.state_dict, ChainedOptimizer.sharded_state_dict
    if getattr(state_of, "without_parameters", False):
        return

    @functools.wraps(state_of)
    def state_dict(self):
        groups = self.optimizer.param_groups
        if self.ddp_config.use_megatron_fsdp or any(group["params"] for group in groups):
            return state_of(self)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        state = {"optimizer": {"param_groups": [{"step": 0, **group} for group in settings]}}
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    @functools.wraps(collect)
    def sharded_state_dict(self, *args, **kwargs):
        state = collect(self, *args, **kwargs)
        _agree_on_step(state)
        return state

    state_dict.without_parameters = True
    DistributedOptimizer.state_dict = state_dict
    ChainedOptimizer.sharded_state_dict = sharded_state_dict


def _agree_on_step(state: Any) -> None:
    """Give the optimizers of a chain's ``state`` that have made no step the step of the others.

    A distributed optimizer's step is among the settings of its groups, Transformer Engine's always;
    another one's with torch's Adam beside the state of its parameters. Both are the same number in
    all of a chain (core/optimizer/optimizer.py:1992).
    """
    if not isinstance(state, dict):
        return
    parts = [state, *(state[key] for key in state if isinstance(key, int))]
    parts = [part.get("optimizer", part) for part in parts]  # not FP32Optimizer's: it is its own
    parts = [getattr(part, "data", part) for part in parts]  # of a ShardedObject
    parts = [part for part in parts if "param_groups" in part]
    groups = [group for part in parts for group in part["param_groups"]]
    states = [part["state"] for part in parts if "state" in part]
    for holders, name in ((groups, "step"), (states, "common_step")):
        step = next((holder[name] for holder in holders if holder.get(name)), None)
        for holder in holders:
            if step is not None and not holder.get(name):
                holder[name] = step


def number_float32_parameters() -> None:
    """Let half-precision training without the distributed optimizer save float32 parameters.

    core/optimizer/optimizer.py:1138 of Megatron 0.19.2 numbers the half-precision parameters
    alone, where the state that it is about to save numbers all: the connections' state would have
    no name, and what comes after them another's. While the state is collected, ``float16_groups``
    has every parameter, in the optimizer's order; nothing else reads it there. Right where no group
    mixes dtypes, which ``connection_overrides`` sees to. Once a process.
    """
    optimizer = Float16OptimizerWithFloat16Params
    collect, load = optimizer.sharded_state_dict, optimizer.load_state_dict
    if getattr(collect, "numbers_all", False):
        return

    @functools.wraps(collect)
    def collect_all(self, *args, **kwargs):
        half = self.float16_groups
        pairs = zip(half, self.fp32_from_fp32_groups)
        self.float16_groups = [[*of_half, *of_float] for of_half, of_float in pairs]
        try:
            state = collect(self, *args, **kwargs)
        finally:
            self.float16_groups = half
        # A float32 group has no copies. Its empty list would be left over when the tensors are
        # taken out, and not merge with the others at load (dist_checkpointing/dict_utils.py:229).
        groups = enumerate(state["fp32_from_fp16_params"])
        state["fp32_from_fp16_params"] = {number: group for number, group in groups if group}
        return state

    @functools.wraps(load)
    def load_all(self, state_dict):
        copies = state_dict.get("fp32_from_fp16_params")
        if isinstance(copies, dict):
            groups = range(len(self.fp32_from_float16_groups))
            copies = [copies.get(number, []) for number in groups]
            state_dict = {**state_dict, "fp32_from_fp16_params": copies}
        return load(self, state_dict)

    collect_all.numbers_all = True
    optimizer.sharded_state_dict, optimizer.load_state_dict = collect_all, load_all


def load_float32_parameters() -> None:
    """Let the distributed optimizer load the state of float32 parameters.

    Its shard of one is a view of the parameter itself, which requires a gradient
    (core/optimizer/distrib_optimizer.py:467 of Megatron 0.19.2), and torch refuses the copy into it
    (:1225) unless gradients are off: they are for the other formats (:2095), not for the default
    one, ``dp_reshardable`` (:2061). Once a process.
    """
    own = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(own, "without_gradients", False):
        return

    @functools.wraps(own)
    def set_states(self, *args, **kwargs):
        with torch.no_grad():
            return own(self, *args, **kwargs)

    set_states.without_gradients = True
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def mend_checkpoints() -> None:
    """What Megatron's optimizers need to save and load the connections' state in every layout."""
    load_float32_parameters()
    close_bucket_gaps()
    load_across_expert_layouts()
    save_without_parameters()
    number_float32_parameters()


def group_connections(mhc: MHCConfig) -> None:
    """Give Megatron's trainer the connections' group.

    Wraps ``get_megatron_optimizer_config`` of training/training.py, which makes the optimizer's
    configuration and overrides for ``setup_model_and_optimizer``. Once a process.
    """
    mend_checkpoints()
    original = megatron_training.get_megatron_optimizer_config

    @functools.wraps(original)
    def with_connections(args):
        config, overrides = original(args)
        return config, connection_overrides(config, mhc, overrides)

    megatron_training.get_megatron_optimizer_config = with_connections
