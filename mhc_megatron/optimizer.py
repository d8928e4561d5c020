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

import torch
from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
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


def group_connections(mhc: MHCConfig) -> None:
    """Give Megatron's trainer the connections' group.

    Wraps ``get_megatron_optimizer_config`` of training/training.py, which makes the optimizer's
    configuration and overrides for ``setup_model_and_optimizer``. Once a process.
    """
    close_bucket_gaps()
    original = megatron_training.get_megatron_optimizer_config

    @functools.wraps(original)
    def with_connections(args):
        config, overrides = original(args)
        return config, connection_overrides(config, mhc, overrides)

    megatron_training.get_megatron_optimizer_config = with_connections
