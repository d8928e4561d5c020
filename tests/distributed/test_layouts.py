"""Every row of layouts.py trains as one rank does: same weights, same data, same losses.

Each test prints its row's line and the rows end up in build/layouts.jsonl, from which
tools/support_table.py makes the README's table.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.distributed.cluster import Cluster
from tests.distributed.compare import differences, losses
from tests.distributed.layouts import KINDS, ROWS, Row

pytestmark = pytest.mark.distributed

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
RECORDS = os.path.join(_ROOT, "build", "layouts.jsonl")

@pytest.fixture(scope="module")
def reference(cluster, tmp_path_factory):
    """kind -> (folder of the weights, results of one rank), made once."""
    made: dict[str, tuple[str, list[dict[str, Any]]]] = {}

    def of(kind: str) -> tuple[str, list[dict[str, Any]]]:
        if kind not in made:
            folder = str(tmp_path_factory.mktemp("weights"))
            job = {"kind": KINDS[kind], "layout": {}, "save_initial": folder}
            made[kind] = folder, cluster.run("tests.distributed.job:train_both", 1, job)
        return made[kind]

    return of


@pytest.fixture(scope="module")
def records():
    """Rows of this run over those of earlier ones, in the table's order."""
    rows: dict[str, dict[str, Any]] = {}
    if os.path.exists(RECORDS):
        with open(RECORDS, encoding="utf-8") as f:
            rows = {row["name"]: row for row in map(json.loads, f)}
    yield rows
    os.makedirs(os.path.dirname(RECORDS), exist_ok=True)
    with open(RECORDS + ".part", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(rows[row.name]) + "\n" for row in ROWS if row.name in rows)
    os.replace(RECORDS + ".part", RECORDS)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else [])
        for row in ROWS
    ],
)
def test_layout_equals_one_rank(row: Row, cluster: Cluster, reference, records) -> None:
    folder, one = reference(row.kind)
    job = {"kind": KINDS[row.kind], "layout": row.settings, "load": folder}
    many = cluster.run("tests.distributed.job:train_both", row.settings["world"], job)
    record = {
        "name": row.name,
        "kind": row.kind,
        "layout": row.layout,
        "ranks": row.settings["world"],
        "tolerance": row.tolerance,
        "losses": losses(many, "mhc"),
        "grad_norm": many[0]["mhc"]["grad_norm"],
    }
    for variant in ("mhc", "none"):
        moved = set(many[0][variant]["offloaded"])
        assert moved == set(row.settings.get("offload_modules", ())), moved
        errors = loss_error, norm_error = differences(one, many, variant)
        record[variant] = {"loss_error": loss_error, "grad_norm_error": norm_error}
        assert all(map(_is_finite, errors)), f"{variant}: {many[0][variant]}"
    records[row.name] = record
    print(line(record))
    for error in ("loss_error", "grad_norm_error"):
        ours, plain = record["mhc"][error], record["none"][error]
        assert ours <= row.tolerance, (
            f"{error} {ours:.1e} > {row.tolerance:.0e} (plain Megatron {plain:.1e})"
        )


def line(record: dict[str, Any]) -> str:
    """kind, layout, losses, gradient norm, differences to one rank: ours and plain Megatron's."""
    ours, plain = record["mhc"], record["none"]
    return (
        f"{record['name']:66s} loss {' '.join(f'{x:.6f}' for x in record['losses'])} "
        f"norm {record['grad_norm'][-1]:.6f} "
        f"diff {ours['loss_error']:.0e} {ours['grad_norm_error']:.0e} "
        f"plain {plain['loss_error']:.0e} {plain['grad_norm_error']:.0e}"
    )


def _is_finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("MLA", {"world": 2, "tp": 2, "whole_position_gradient": False}),
        ("MTP", {"world": 2, "cp": 2}),
    ],
    ids=["MLA, TP2", "MTP, CP2"],
)
def test_megatron_itself_differs(kind: str, layout, cluster: Cluster, reference) -> None:
    """Why two rows have what they have: without it plain Megatron is not one rank's model.

    ``models.sum_position_gradients`` for latent attention under tensor parallelism,
    ``layouts.KINDS["MTP, two documents"]`` for context parallelism. Where this fails, Megatron has
    mended it and the row can do without.
    """
    folder, one = reference(kind)
    job = {"kind": KINDS[kind], "layout": layout, "load": folder}
    many = cluster.run("tests.distributed.job:train_both", layout["world"], job)
    _, plain = differences(one, many, "none")
    assert 1e-4 < plain < 1e-2, f"gradient norm, plain Megatron: {plain:.1e}"


def test_the_check_sees_a_wrong_connection(cluster: Cluster, reference) -> None:
    """One Sinkhorn step instead of twenty, in the same layout, is not the same model."""
    folder, one = reference("dense")
    job = {"kind": KINDS["dense"], "layout": {}, "load": os.path.join(folder, "mhc")}
    wrong = cluster.run(
        "tests.distributed.job:train", 1, job | {"mhc": {"sinkhorn_iterations": 1}}
    )
    error, _ = differences(one, [{"mhc": wrong[0]}], "mhc")
    assert error > 1e-4
