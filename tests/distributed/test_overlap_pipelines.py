"""The overlap schedule in pipelines of several processes: the same numbers, bit for bit."""

from __future__ import annotations

import pytest

from tests.distributed.cluster import Cluster
from tests.distributed.layouts import ATTENTION, KINDS, MOE, OVERLAPPED, flex, offload

pytestmark = pytest.mark.distributed

SHARED = MOE | {"moe_shared_expert_intermediate_size": 32}
NORMS = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}

#: name -> (kind, layout). Two ranks of a pipeline at EP 1; four with EP 2.
CASES = {
    "dense, PP2, VPP2": ({}, {"world": 2, "pp": 2, "vp": 2}),
    "dense and biases, PP2, VPP3": (
        {"num_layers": 6, "add_bias_linear": True, "normalization": "LayerNorm"},
        {"world": 2, "pp": 2, "vp": 3},
    ),
    "MoE, first layer dense, PP2, VPP2": (
        MOE | {"moe_layer_freq": [0, 1, 1, 1]},
        {"world": 2, "pp": 2, "vp": 2},
    ),
    "shared experts, PP2, VPP3, norms recomputed": (
        SHARED | NORMS | {"num_layers": 6},
        {"world": 2, "pp": 2, "vp": 3},
    ),
    "MLA, MoE, MTP, PP2, VPP2": (KINDS["MLA, MoE, MTP"], {"world": 2, "pp": 2, "vp": 2}),
    "MLA, MoE, MTP after the hop: Ett|t|t|mL": (
        KINDS["MLA, MoE, MTP"],
        {"world": 2, "pp": 2, "vp": 2, "pipeline_model_parallel_layout": "Ett|t|t|mL"},
    ),
    "MLA, MoE, MTP alone: Ett|tt|m|L": (
        KINDS["MLA, MoE, MTP"],
        {"world": 2, "pp": 2, "vp": 2, "pipeline_model_parallel_layout": "Ett|tt|m|L"},
    ),
    "shared experts, EP2, PP2, VPP2": (SHARED, {"world": 4, "ep": 2, "pp": 2, "vp": 2}),
    "MoE, TP2, SP, PP2, VPP2": (
        MOE, {"world": 4, "tp": 2, "sp": True, "etp": 1, "pp": 2, "vp": 2, "ep": 2},
    ),
    "shared experts, EP2, PP2, VPP2, gradients reduced and weights gathered meanwhile": (
        SHARED,
        {"world": 4, "ep": 2, "pp": 2, "vp": 2, **OVERLAPPED},
    ),
    "flex dispatcher, shared experts, EP2, PP2, VPP2": (
        SHARED, {"world": 4, "ep": 2, "pp": 2, "vp": 2, **flex("deepep")},
    ),
    "attention offloaded, PP2, VPP2": (
        {"num_layers": 8}, {"world": 2, "pp": 2, "vp": 2, **offload(*ATTENTION)},
    ),
    "embedding and loss alone: E|tt|tt|L": (
        {}, {"world": 2, "pp": 2, "vp": 2, "pipeline_model_parallel_layout": "E|tt|tt|L"},
    ),
}  # fmt: skip

#: Parts of the schedule left out, one after the other.
ABLATIONS = ("mixing_stream", "gradient_wait", "hop_streams", "open_end")


def results(ranks) -> tuple:
    """Losses and gradient norms; of a layout's own ranks, so that they can be compared exactly."""
    return [(rank["loss"], rank["grad_norm"]) for rank in ranks]


#: In ``make test-all`` only.
SLOW = (
    "shared experts, EP2, PP2, VPP2, gradients reduced and weights gathered meanwhile",
    "MLA, MoE, MTP alone: Ett|tt|m|L",
    "MLA, MoE, MTP, PP2, VPP2",
    "MoE, TP2, SP, PP2, VPP2",
    "flex dispatcher, shared experts, EP2, PP2, VPP2",
    "attention offloaded, PP2, VPP2",
    "embedding and loss alone: E|tt|tt|L",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES],
)
def test_the_same_numbers_with_overlap(name: str, cluster: Cluster) -> None:
    kind, layout = CASES[name]
    # Four microbatches on every data-parallel rank, two rounds of the pipeline.
    job = {"kind": kind, "layout": layout, "batch": 8 if layout.get("ep") else 4}
    run = "tests.distributed.job:train"
    plain = cluster.run(run, layout["world"], job)
    planned = cluster.run(run, layout["world"], job | {"layout": layout | {"overlap": True}})
    if "MTP" in name:
        # Embedding and MTP add to one gradient: together without a plan, one by one with it.
        for ours, theirs in zip(planned, plain, strict=True):
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    else:
        assert results(planned) == results(plain)


@pytest.mark.slow
@pytest.mark.parametrize("piece", ABLATIONS)
def test_without_a_piece(piece: str, cluster: Cluster) -> None:
    kind, layout = CASES["MoE, first layer dense, PP2, VPP2"]
    job = {"kind": kind, "layout": layout | {"overlap": True}}
    run = "tests.distributed.job:train"
    whole = cluster.run(run, 2, job)
    less = cluster.run(run, 2, job | {"mhc": {"overlap_without": piece}})
    assert results(less) == results(whole)


def test_recomputed_blocks(cluster: Cluster) -> None:
    kind, layout = CASES["MoE, first layer dense, PP2, VPP2"]
    job = {"kind": kind, "layout": layout, "mhc": {"recompute": 3}}
    run = "tests.distributed.job:train"
    planned = cluster.run(run, 2, job | {"layout": layout | {"overlap": True}})
    assert results(planned) == results(cluster.run(run, 2, job))


@pytest.mark.parametrize("overlap", [True, False])
def test_fp8_wire(overlap: bool, cluster: Cluster) -> None:
    """Off by default; on, the losses are near those without, and not the same."""
    layout = CASES["dense, PP2, VPP2"][1] | {"overlap": overlap}
    run = "tests.distributed.job:train"
    job = {"kind": {}, "layout": layout, "steps": 2}
    exact = cluster.run(run, 2, job)
    rough = cluster.run(run, 2, job | {"mhc": {"wire": "fp8"}})
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
        assert ours["loss"] != theirs["loss"] or not theirs["gives_loss"]


def test_a_model_that_cannot_overlap_says_so(cluster: Cluster) -> None:
    job = {"kind": MOE, "layout": CASES["dense, PP2, VPP2"][1] | {"overlap": True}}
    with pytest.raises(Exception, match="HyperConnectedGPTModel in the place of GPTModel"):
        cluster.run("tests.distributed.job:train", 2, job | {"builder": "examples.own_builder"})
