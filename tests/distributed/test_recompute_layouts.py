"""Recompute of blocks changes no bit of training: every kind of model, and layouts on gloo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.distributed.cluster import Cluster
from tests.distributed.layouts import DISTRIBUTED_OPTIMIZER, KINDS, OVERLAPPED, selective

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Case:
    """A kind of model and a layout, mhc.recompute, and the L_r of each run of sublayers.

    Three sublayers to a block of four layers: blocks begin at attention and at the MLP, the last
    one is shorter. A prediction layer is a run of its own; in a hybrid stack a layer is a sublayer.
    """

    kind: str
    layout: dict[str, Any]
    recompute: int | str = 3
    L_r: tuple[int, ...] = (3,)
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.kind} | {' '.join(map(str, self.layout.values()))} | {self.recompute}"


CASES = [
    Case("dense", {}, 1, (1,)),
    Case("dense", {}, 8, (8,), slow=True),
    Case("dense", {}, "auto", (2,), slow=True),
    Case("dense", selective("core_attn"), slow=True),
    Case("dense", selective("layernorm", "mlp")),
    Case("biases, LayerNorm, GELU, learned positions", {}),
    Case("grouped queries, QK norm", {}, slow=True),
    Case("hidden dropout 0.1", {}),
    Case("bf16", {}, slow=True),
    Case("fp32 residual, bf16", {}),
    Case("fp32 residual, MTP, bf16", {}, L_r=(3, 2)),
    Case("MoE alltoall", {}, slow=True),
    Case("MoE alltoall", selective("moe", "layernorm")),
    Case("MoE allgather", {}, slow=True),
    Case("MoE, shared expert, loss-free balancing", {}, slow=True),
    Case("MoE, auxiliary loss", {}, slow=True),
    Case("MLA", {}, slow=True),
    Case("MTP of depth 2", {}, L_r=(3, 2, 2), slow=True),
    Case("MLA, MoE, MTP", {}, L_r=(3, 2)),
    Case("hybrid *-", {}, slow=True),
    Case("hybrid *E", {}),
    Case("hybrid *- with MTP", {}, L_r=(3, 2), slow=True),
    Case("dense", {"world": 2, **DISTRIBUTED_OPTIMIZER}, slow=True),
    Case("dense", {"world": 2, "tp": 2, "sp": True}, slow=True),
    Case("dense", {"world": 2, "pp": 2}),
    Case("dense, 8 layers", {"world": 2, "pp": 2, "vp": 2}, L_r=(3, 3)),
    Case("dense", {"world": 4, "pp": 2, **OVERLAPPED}, 2, (2,)),
    Case("MoE alltoall", {"world": 2, "ep": 2, **DISTRIBUTED_OPTIMIZER}, slow=True),
    Case("MLA, MoE", {"world": 4, "ep": 2, "pp": 2, "vp": 2}, "auto", (2, 2), slow=True),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if c.slow else []) for c in CASES],
)
def test_the_same_bits(cluster: Cluster, case: Case) -> None:
    job = {"kind": KINDS[case.kind], "layout": case.layout, "recompute": case.recompute}
    world = case.layout.get("world", 1)
    for rank in cluster.run("tests.distributed.recompute_job:compare", world, job):
        assert rank["recomputed"] == rank["kept"]
        assert len(set(rank["kept"])) == 2
        assert tuple(rank["L_r"]) == case.L_r
        assert rank["dropped"]["u"] > 0 and rank["dropped"]["normed"] > 0
        assert (rank["dropped"]["x"] > 0) == (max(case.L_r) > 1)


def test_saved_and_resumed(cluster: Cluster, tmp_path) -> None:
    """A run that stops, and goes on with another L_r, is the run without recompute, to the bit."""
    job = {
        "kind": KINDS["MLA, MoE, MTP"],
        "layout": {"world": 2, "pp": 2},
        **DISTRIBUTED_OPTIMIZER,
        "sharding": "fully_reshardable",
    }
    start, half = str(tmp_path / "start"), str(tmp_path / "half")

    def train(recompute: int | str, **more) -> list[dict[str, Any]]:
        settings = job | {"mhc": {"recompute": recompute}, "steps": 2, **more}
        return cluster.run("tests.distributed.job:train", 2, settings)

    whole = train(0, steps=4, save_initial=start)
    first = train(3, load=start, save=half)
    second = train("auto", first_step=2, load=half, resume=True)
    for rank in range(2):
        for what in ("loss", "grad_norm"):
            assert first[rank][what] + second[rank][what] == whole[rank][what]
