"""The connections' parameter group: rates, decay, and no Muon."""

from __future__ import annotations

import pytest

from tests.distributed.cluster import Cluster
from tests.distributed.data import OPTIMIZER

pytestmark = pytest.mark.distributed

#: Two ranks of a pipeline, so that groups are aligned over ranks, too.
JOB = {"kind": {}, "layout": {"world": 2, "pp": 2}}


def groups(cluster: Cluster, **job):
    """name of every parameter on both ranks -> settings of its group."""
    ranks = cluster.run("tests.distributed.job:groups", 2, JOB | job)
    return {f"{i}.{name}": group for i, rank in enumerate(ranks) for name, group in rank.items()}


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_rates_and_decay(cluster, distributed_optimizer) -> None:
    seen = groups(
        cluster,
        mhc={"lr_mult": 0.25, "phi_weight_decay": 0.5, "exit": "learned"},
        ddp={"use_distributed_optimizer": distributed_optimizer},
    )
    rate = OPTIMIZER["lr"]
    for name, group in seen.items():
        hc, vector = "_hc." in name or ".exit." in name, name.endswith((".alpha", ".bias"))
        expected = 0.5 if name.endswith(".phi") else 0.0 if hc or "norm.weight" in name else 1.0
        assert group["wd_mult"] == expected, name
        assert group["max_lr"] == (0.25 * rate if hc else rate), name
        assert group["optimizer"] == "AdamW"
        assert not vector or hc
    assert sum(".phi" in name for name in seen) == 9


def test_a_decoupled_rate_is_not_the_connections(cluster) -> None:
    seen = groups(cluster, optimizer={"decoupled_lr": 1e-4}, mhc={"lr_mult": 2.0})
    rates = {name: group["max_lr"] for name, group in seen.items()}
    assert {rate for name, rate in rates.items() if "_hc." in name} == {2 * OPTIMIZER["lr"]}
    assert rates["0.embedding.word_embeddings.weight"] == 1e-4


def test_defaults_decay_phi_like_a_weight_and_nothing_else(cluster) -> None:
    seen = groups(cluster)
    assert {g["wd_mult"] for name, g in seen.items() if name.endswith("_hc.phi")} == {1.0}
    assert {g["wd_mult"] for name, g in seen.items() if name.endswith("_hc.alpha")} == {0.0}
    assert {g["wd_mult"] for name, g in seen.items() if name.endswith("_hc.bias")} == {0.0}
    assert {g["max_lr"] for g in seen.values()} == {OPTIMIZER["lr"]}


@pytest.mark.parametrize("optimizer", ["muon", "adaptive_muon", "soap"])
def test_muon_never_gets_a_connection(cluster, optimizer) -> None:
    pytest.importorskip("emerging_optimizers")
    seen = groups(cluster, optimizer={"optimizer": optimizer}, mhc={"exit": "learned"})
    by_matrix = {name for name, group in seen.items() if group["optimizer"] != "AdamW"}
    assert any(name.endswith("linear_fc1.weight") for name in by_matrix)
    assert not any("_hc." in name or ".exit." in name for name in by_matrix)
    assert {g["optimizer"] for name, g in seen.items() if name.endswith(".phi")} == {"AdamW"}


def test_a_step_with_muon(cluster) -> None:
    pytest.importorskip("emerging_optimizers")
    ranks = cluster.run(
        "tests.distributed.job:train", 2, JOB | {"optimizer": {"optimizer": "muon"}, "steps": 2}
    )
    assert all(0 < norm < 100 for norm in ranks[0]["grad_norm"])
