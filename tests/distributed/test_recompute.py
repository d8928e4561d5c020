"""Recompute of blocks changes no bit of training: every kind of model, and layouts on gloo."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cluster import Cluster
from tests.distributed.layouts import DISTRIBUTED_OPTIMIZER, KINDS, OVERLAPPED, selective

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster


#: kind, layout, mhc.recompute, L_r of this rank's chunks. Three sublayers to a block: blocks begin
#: at attention and at the MLP, and the last one is shorter. A prediction layer has two sublayers of
#: its own; in a hybrid stack every layer is one.
CASES: list[tuple[str, dict[str, Any], int | str, list[int]]] = [
    ("dense", {}, 1, [1]),
    ("dense", {}, 8, [8]),
    ("dense", {}, "auto", [2]),
    ("dense", selective("core_attn"), 3, [3]),
    ("dense", selective("layernorm", "mlp"), 3, [3]),
    ("biases, LayerNorm, GELU, learned positions", {}, 3, [3]),
    ("grouped queries, QK norm", {}, 3, [3]),
    ("hidden dropout 0.1", {}, 3, [3]),
    ("bf16", {}, 3, [3]),
    ("fp32 residual, bf16", {}, 3, [3]),
    ("MoE alltoall", {}, 3, [3]),
    ("MoE alltoall", selective("moe", "layernorm"), 3, [3]),
    ("MoE allgather", {}, 3, [3]),
    ("MoE, shared expert, loss-free balancing", {}, 3, [3]),
    ("MoE, auxiliary loss", {}, 3, [3]),
    ("MLA", {}, 3, [3]),
    ("MTP of depth 2", {}, 3, [3, 2, 2]),
    ("MLA, MoE, MTP", {}, 3, [3, 2]),
    ("hybrid *-", {}, 3, [3]),
    ("hybrid *E", {}, 3, [3]),
    ("hybrid *- with MTP", {}, 3, [3, 2]),
    ("dense", {"world": 2, **DISTRIBUTED_OPTIMIZER}, 3, [3]),
    ("dense", {"world": 2, "tp": 2, "sp": True}, 3, [3]),
    ("dense", {"world": 2, "pp": 2}, 3, [3]),
    ("dense, 8 layers", {"world": 2, "pp": 2, "vp": 2}, 3, [3, 3]),
    ("dense", {"world": 4, "pp": 2, **OVERLAPPED}, 2, [2]),
    ("MoE alltoall", {"world": 2, "ep": 2, **DISTRIBUTED_OPTIMIZER}, 3, [3]),
    ("MLA, MoE", {"world": 4, "ep": 2, "pp": 2, "vp": 2}, "auto", [2, 2]),
]


@pytest.mark.parametrize(
    ("kind", "layout", "L_r", "chosen"),
    [
        pytest.param(*case, id=f"{case[0]} | {' '.join(map(str, case[1].values()))} | {case[2]}")
        for case in CASES
    ],
)
def test_the_same_bits(
    cluster: Cluster, kind: str, layout: dict[str, Any], L_r: int | str, chosen: list[int]
) -> None:
    job = {"kind": KINDS[kind], "layout": layout, "recompute": L_r}
    ranks = cluster.run("tests.distributed.recompute_job:compare", layout.get("world", 1), job)
    for rank in ranks:
        assert rank["recomputed"] == rank["kept"]
        assert len(set(rank["kept"])) == 2
        assert rank["L_r"] == chosen
        assert rank["dropped"]["u"] > 0 and rank["dropped"]["normed"] > 0
        assert (rank["dropped"]["x"] > 0) == (max(chosen) > 1)
