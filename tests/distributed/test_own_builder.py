"""examples/own_builder.py, which the README shows: a pipeline of two stages equals one rank."""

import pytest

from tests.distributed.cluster import Cluster

pytestmark = pytest.mark.distributed

JOB = {"kind": {}, "builder": "examples.own_builder"}


@pytest.mark.parametrize(
    "layout",
    [
        {"world": 2, "pp": 2},
        {"world": 2, "pp": 2, "vp": 2},
        {"world": 2, "tp": 2, "sp": True},
    ],
    ids=["PP2", "PP2, VPP2", "TP2, SP"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_own_builder(cluster: Cluster, layout, dtype, tmp_path) -> None:
    job = {**JOB, "kind": {"dtype": dtype}}
    run = "tests.distributed.job:train"
    one = cluster.run(run, 1, {**job, "layout": {}, "save_initial": str(tmp_path / "w")})
    many = cluster.run(run, 2, {**job, "layout": layout, "load": str(tmp_path / "w")})
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert many[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=tolerance)
    loss = next(rank["loss"] for rank in many if rank["gives_loss"])
    assert loss == pytest.approx(one[0]["loss"], rel=tolerance)
