"""Checkpoints: saved in one layout, the run goes on in another with the losses of one rank."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cluster import Cluster
from tests.distributed.data import BATCH, SEQUENCE
from tests.distributed.layouts import DISTRIBUTED_OPTIMIZER, KINDS, OVERLAPPED

pytestmark = pytest.mark.distributed

STEPS = 2

#: kind, layout that saves, layout that goes on, further settings of both jobs. Megatron moves the
#: optimizer's state between model-parallel layouts with the distributed optimizer alone.
RESHARDABLE = {"ddp": DISTRIBUTED_OPTIMIZER["ddp"], "sharding": "fully_reshardable"}
MOVES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one rank to TP2, SP, PP2": (
        "dense",
        {},
        {"world": 4, "tp": 2, "sp": True, "pp": 2},
        RESHARDABLE,
    ),
    "PP2, VPP2 to one rank, asynchronous": (
        "dense",
        {"world": 2, "pp": 2, "vp": 2},
        {},
        {**RESHARDABLE, "asynchronous": True},
    ),
    "TP2, SP, DP2 to PP2": (
        "dense",
        {"world": 4, "tp": 2, "sp": True},
        {"world": 2, "pp": 2},
        RESHARDABLE,
    ),
    "PP2, DP2, overlaps to TP2, asynchronous": (
        "dense",
        {"world": 4, "pp": 2, **OVERLAPPED},
        {"world": 2, "tp": 2},
        {**RESHARDABLE, "asynchronous": True},
    ),
    "DP2 to DP4, dp_reshardable": (
        "dense",
        {"world": 2},
        {"world": 4},
        {"ddp": DISTRIBUTED_OPTIMIZER["ddp"]},
    ),
    "one rank to DP2, no distributed optimizer": ("dense", {}, {"world": 2}, {}),
    "MoE: EP2 to EP2, PP2": (
        "MoE alltoall",
        {"world": 2, "ep": 2},
        {"world": 4, "ep": 2, "pp": 2},
        RESHARDABLE,
    ),
    "MoE: EP2 to one rank": ("MoE alltoall", {"world": 2, "ep": 2}, {}, RESHARDABLE),
    "MoE: DP2 to EP2, TP2, SP": (
        "MoE alltoall",
        {"world": 2},
        {"world": 4, "ep": 2, "etp": 1, "tp": 2, "sp": True},
        {**RESHARDABLE, "mhc": {"lr_mult": 0.5}},
    ),
    "first stage without experts: EP2, PP2 to one rank": (
        "MLA, MoE",
        {"world": 4, "ep": 2, "pp": 2, "pipeline_model_parallel_layout": "Et|tttL"},
        {},
        RESHARDABLE,
    ),
    "first stage without experts: one rank to EP2, PP2": (
        "MLA, MoE",
        {},
        {"world": 4, "ep": 2, "pp": 2, "pipeline_model_parallel_layout": "Et|tttL"},
        RESHARDABLE,
    ),
    "first stage without experts, dp_reshardable": (
        "MLA, MoE",
        {"world": 4, "ep": 2, "pp": 2, "pipeline_model_parallel_layout": "Et|tttL"},
        {"world": 4, "ep": 2, "pp": 2, "pipeline_model_parallel_layout": "Et|tttL"},
        {"ddp": DISTRIBUTED_OPTIMIZER["ddp"]},
    ),
    "first stage without experts, no distributed optimizer": (
        "MLA, MoE",
        {"world": 4, "ep": 2, "pp": 2, "pipeline_model_parallel_layout": "Et|tttL"},
        {"world": 4, "ep": 2, "pp": 2, "pipeline_model_parallel_layout": "Et|tttL"},
        {},
    ),
    "MLA, MoE: EP2, PP4 to EP2, PP2": (
        "MLA, MoE",
        {"world": 8, "ep": 2, "pp": 4},
        {"world": 4, "ep": 2, "pp": 2},
        RESHARDABLE,
    ),
    "learned exit, own learning rate: PP2 to TP2, SP": (
        "dense",
        {"world": 2, "pp": 2},
        {"world": 2, "tp": 2, "sp": True},
        {**RESHARDABLE, "mhc": {"exit": "learned", "lr_mult": 0.5}},
    ),
}


#: Moves that others of the table cover in their parts.
SLOW = (
    "MoE: EP2 to EP2, PP2",
    "MoE: EP2 to one rank",
    "TP2, SP, DP2 to PP2",
    "first stage without experts: one rank to EP2, PP2",
    "first stage without experts, dp_reshardable",
    "first stage without experts, no distributed optimizer",
    "MLA, MoE: EP2, PP4 to EP2, PP2",
)


@pytest.mark.parametrize(
    "move", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in MOVES]
)
def test_resume_in_another_layout(move: str, cluster: Cluster, tmp_path) -> None:
    kind, source, target, settings = MOVES[move]
    job = {"kind": KINDS[kind], **settings}
    start, half = str(tmp_path / "start"), str(tmp_path / "half")
    whole = _train(cluster, job, {}, steps=2 * STEPS, save_initial=start)
    first = _train(cluster, job, source, steps=STEPS, load=start, save=half)
    second = _train(cluster, job, target, steps=STEPS, first_step=STEPS, load=half, resume=True)
    assert first + second == pytest.approx(whole, rel=1e-5)


def test_a_chain_has_one_step() -> None:
    """Transformer Engine's Adam keeps it in its groups, and none where a rank has no parameter."""
    from mhc_megatron.optimizer import _agree_on_step

    chain = {
        0: {"optimizer": {"param_groups": [{"step": 7}, {"step": 7}]}},
        1: {"optimizer": {"param_groups": [{"lr": 1.0}, {"lr": 2.0, "step": 0}]}},
    }
    _agree_on_step(chain)
    assert chain[0] == {"optimizer": {"param_groups": [{"step": 7}, {"step": 7}]}}
    assert chain[1]["optimizer"]["param_groups"] == [{"lr": 1.0, "step": 7}, {"lr": 2.0, "step": 7}]
    untouched = {0: {"optimizer": {"param_groups": [{}]}}}
    _agree_on_step(untouched)
    assert untouched == {0: {"optimizer": {"param_groups": [{}]}}}


def _train(cluster: Cluster, job: dict[str, Any], layout: dict[str, Any], **more) -> list[float]:
    """Loss and gradient norm of every step, one after the other."""
    world = layout.get("world", 1)
    ranks = cluster.run("tests.distributed.job:train", world, {**job, "layout": layout, **more})
    parts = [rank["loss"] for rank in ranks if rank["gives_loss"]]
    losses = [sum(step) / (BATCH * SEQUENCE) for step in zip(*parts, strict=True)]
    return [x for pair in zip(losses, ranks[0]["grad_norm"], strict=True) for x in pair]
