"""tools/plan.py: its arithmetic, its page and JSON, and bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from mhc_megatron.config import MHCConfig
from mhc_megatron.counting import connection_flops
from mhc_megatron.footprint import best_block, in_flight

ROOT = Path(__file__).resolve().parents[1]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/plan.py"), *arguments],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mhc_27b() -> dict:
    done = plan("--config", "configs/mhc-27b.yaml", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


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


def test_connections_cost(mhc_27b: dict) -> None:
    """2nC (n^2 + 2n) + 2nC (n + 2) a sublayer, three times for training."""
    n, C = 4, 2560
    forward = 2 * n * C * (n * n + 2 * n) + 2 * n * C * (n + 2)
    assert mhc_27b["flops_per_token"]["connections"] == 3 * 60 * forward
    assert connection_flops(MHCConfig(variant="none"), C) == 0


def test_page() -> None:
    done = plan("--config", "configs/dense-1b.yaml", "--gpus", "16", "--set", "mhc.variant=none")
    assert (done.returncode, done.stderr) == (0, "")
    assert "16 GPUs: data 16; 16 microbatches, 2,097,152 tokens a step" in done.stdout
    assert "total         1.236 B" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 180


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config", "configs/none.yaml"), "cannot read the configuration"),
        (("--config", "configs/mhc-27b.yaml", "--gpus", "12"), "contradictory settings"),
        (("--config", "configs/tiny.yaml", "--set", "num-layer=3"), "did you mean 'num-layers'"),
        (("--config", "configs/tiny.yaml", "--set", "run.lr-steps={2: 1}"), "share of the run"),
        (("--config", "configs/tiny.yaml", "--set", "run.gpus=-1"), "must not be negative"),
        (("--config", "configs/tiny.yaml", "--gpus", "0"), "at least 1, not '0'"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    done = plan(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


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
