"""tools/plan.py: its arithmetic, its page and JSON, and bad input."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest

from mhc_megatron.config import MHCConfig
from mhc_megatron.counting import connection_flops
from mhc_megatron.footprint import best_block, in_flight
from tests.distributed.cluster import Cluster

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def plan(cluster: Cluster, name: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr for a configuration."""
    words = ["--config", str(CONFIGS / f"{name}.yaml"), *arguments]
    return cluster.run("tests.counting_jobs:plan", 1, {"arguments": words})[0]


@pytest.fixture(scope="module")
def mhc_27b(cluster: Cluster) -> dict:
    code, out, err = plan(cluster, "mhc-27b", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_layout_and_traffic(mhc_27b: dict) -> None:
    assert mhc_27b["layout"]["gpus"] == 128 and mhc_27b["layout"]["data"] == 32
    assert mhc_27b["layout"]["microbatches"] == 40
    stages = mhc_27b["stages"]
    assert [stage["holds"] for stage in stages] == ["Etttt|tttt", *["tttt|tttt"] * 2, "tttt|ttL"]
    # 4096 tokens x 4 x 2560 channels x 2 bytes
    assert {stage["p2p"] for stage in stages} == {80 * 2**20}
    assert all(stage["streams"] == 4 * stage["residual"] for stage in stages)
    assert [stage["in_flight"] for stage in stages] == [11, 9, 7, 5]


def test_memory_of_a_stage(mhc_27b: dict) -> None:
    """Of the second stage, which has eight layers with experts: 2 + 4 bytes a parameter and 12
    over the data-parallel ranks, 32 of the layer and 4 of an expert."""
    stage, C, E, W = mhc_27b["stages"][1], 2560, 72, 1536
    experts = 8 * E // 8 * 3 * C * W
    connections = 8 * 2 * (24 * 4 * C + 24 + 3)
    rest = stage["parameters"] - experts - connections
    assert stage["weights"] == 2 * (experts + rest) + 4 * connections
    assert stage["gradients"] == 4 * stage["parameters"]
    expected = 12 * (experts / 4 + rest / 32) + 8 * connections / 32
    assert stage["optimizer"] == pytest.approx(expected, rel=1e-6)


def test_blocks_of_a_stage(cluster: Cluster, mhc_27b: dict) -> None:
    """The best L_r, or the chosen one: what ``mhc_megatron.recompute`` will do."""
    n, L, width = 4, 8, 4096 * 2560 * 2
    code, out, _ = plan(cluster, "mhc-27b", "--json", "--set", "mhc.recompute=3")
    assert code == 0
    for best, chosen in zip(mhc_27b["stages"], json.loads(out)["stages"], strict=True):
        L_r, elements = best_block(n, L, best["in_flight"])
        assert (best["L_r"], best["recomputed"]) == (L_r, elements * width)
        elements = n * math.ceil(L / 3) * best["in_flight"] + (n + 2) * 3
        assert (chosen["L_r"], chosen["recomputed"]) == (3, elements * width)


def test_connections_cost(mhc_27b: dict) -> None:
    """2nC (n^2 + 2n) + 2nC (n + 2) a sublayer, three times for training."""
    n, C = 4, 2560
    forward = 2 * n * C * (n * n + 2 * n) + 2 * n * C * (n + 2)
    assert mhc_27b["flops_per_token"]["connections"] == 3 * 60 * forward
    assert connection_flops(MHCConfig(variant="none"), C) == 0
    # H_res = I: no rows of phi for it, and no product with x.
    without = 2 * n * C * 2 * n + 2 * n * C * 2
    assert connection_flops(MHCConfig(variant="identity"), C) == without


def test_page(cluster: Cluster) -> None:
    code, out, err = plan(cluster, "dense-1b", "--gpus", "16", "--set", "mhc.variant=none")
    assert (code, err) == (0, "")
    assert "16 GPUs: data 16; 16 microbatches, 2,097,152 tokens a step" in out
    assert "total         1.236 B" in out
    assert max(map(len, out.splitlines())) < 180


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("none", (), "cannot read the configuration"),
        ("mhc-27b", ("--gpus", "12"), "contradictory settings"),
        ("tiny", ("--set", "num-layer=3"), "did you mean 'num-layers'"),
        ("tiny", ("--set", "run.lr-steps={2: 1}"), "share of the run"),
        ("tiny", ("--set", "run.gpus=-1"), "must not be negative"),
        ("tiny", ("--set", "expert-model-parallel-size=none"), "must be at least 1, not 'none'"),
        (
            "tiny",
            (
                "--set", "mhc.recompute=2", "--set", "recompute-granularity=full",
                "--set", "recompute-method=uniform", "--set", "recompute-num-layers=1",
            ),
            "mhc: recompute 2: recompute-granularity full",
        ),
        ("tiny", ("--set", "hidden-size=0"), "hidden-size must be at least 1, not 0"),
        (
            "tiny",
            ("--set", "window-size=(16, 0)", "--set", "window-attn-skip-freq=2"),
            "operations of a model with window-size",
        ),
        (
            "tiny",
            ("--set", "num-attention-heads=2", "--set", "tensor-model-parallel-size=3"),
            "2 attention heads do not divide over 3 tensor-parallel ranks",
        ),
        (
            "tiny",
            (
                "--set", "num-attention-heads=12", "--set", "tensor-model-parallel-size=4",
                "--set", "group-query-attention=true", "--set", "num-query-groups=6",
                "--set", "kv-channels=32",
            ),
            "num-query-groups (6) must be a multiple or a divisor of tensor-model-parallel",
        ),
        (
            "tiny",
            (
                "--set", "num-attention-heads=4", "--set", "group-query-attention=true",
                "--set", "num-query-groups=3",
            ),
            "4 attention heads do not divide into 3 query groups",
        ),
        ("tiny", ("--gpus", "0"), "at least 1, not '0'"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    cluster: Cluster, name: str, options: tuple[str, ...], said: str
) -> None:
    code, out, err = plan(cluster, name, *options)
    assert (code, out) == (2, ""), err
    assert said in err.splitlines()[-1]
    assert err.count("\n") == 1 or err.startswith("usage: ")


@pytest.mark.parametrize("L", [1, 2, 7, 16, 61])
@pytest.mark.parametrize("m", [1, 4, 47])
def test_best_block_is_near_the_papers(L: int, m: int) -> None:
    """L_r* = sqrt(n L m / (n + 2)), at most L; nothing near it stores less than the integer."""
    n = 4
    L_r, width = best_block(n, L, m)
    near = min(L, max(1, round(math.sqrt(n * L * m / (n + 2)))))
    assert 1 <= L_r <= L
    for other in {near, max(1, near - 1), min(L, near + 1)}:
        assert width <= n * math.ceil(L / other) * m + (n + 2) * other
    assert width == n * math.ceil(L / L_r) * m + (n + 2) * L_r


def test_microbatches_in_flight() -> None:
    args = Namespace(
        pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=None,
        global_batch_size=16, micro_batch_size=1, data_parallel_size=1,
    )  # fmt: skip
    assert [in_flight(args, rank) for rank in range(4)] == [4, 3, 2, 1]
    args.global_batch_size = 2
    assert [in_flight(args, rank) for rank in range(4)] == [2, 2, 2, 1]
    args.pipeline_model_parallel_size = 1
    assert in_flight(args, 0) == 1
