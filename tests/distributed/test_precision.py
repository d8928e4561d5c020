"""Connections stay float32 in half-precision training: parameters, gradients, main copies."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("reduce_in_fp32", [False, True])
def test_connections_stay_float32(cluster, dtype, distributed_optimizer, reduce_in_fp32) -> None:
    job = {
        "kind": {"dtype": dtype},
        "layout": {},
        "mhc": {"exit": "learned"},
        "ddp": {
            "use_distributed_optimizer": distributed_optimizer,
            "grad_reduce_in_fp32": reduce_in_fp32,
        },
        "optimizer": {"loss_scale": 128.0 if dtype == "float16" else None},
    }
    (seen,) = cluster.run("tests.distributed.job:dtypes", 1, job)
    assert len(seen["connections"]) == 8 * 3 + 3
    for name, types in seen["connections"].items():
        assert types == {"parameter": "float32", "gradient": "float32", "main": "float32"}, name
    half = {types["parameter"] for types in seen["others"].values()}
    assert half == {dtype}
    # Megatron keeps one buffer for each dtype of parameters; none may hold two.
    assert all(len(types) == 1 for types in seen["buffers"])
    assert {t for types in seen["buffers"] for t in types} == {"float32", dtype}


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_checkpoints_resume(
    cluster, dtype, distributed_optimizer, tmp_path
) -> None:
    """The optimizer's state of mixed dtypes, saved and loaded."""
    job = {
        "kind": {"dtype": dtype},
        "mhc": {"exit": "learned", "lr_mult": 0.5},
        "layout": {"world": 2, "ddp": {"use_distributed_optimizer": distributed_optimizer}},
        "optimizer": {"loss_scale": 128.0 if dtype == "float16" else None},
        "sharding": "fully_reshardable",
    }
    start, half = str(tmp_path / "start"), str(tmp_path / "half")
    run = "tests.distributed.job:train"
    whole = cluster.run(run, 2, {**job, "steps": 4, "save_initial": start})
    cluster.run(run, 2, {**job, "steps": 2, "load": start, "save": half})
    rest = {"steps": 2, "first_step": 2, "load": half, "resume": True}
    resumed = cluster.run(run, 2, {**job, **rest})
    assert resumed[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"][2:], rel=1e-5)
    assert resumed[1]["loss"] == pytest.approx(whole[1]["loss"][2:], rel=1e-5)
