"""tools/bench_layouts.py: its plan, its reading of traces, its table; and the bench on two CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCH = [sys.executable, str(ROOT / "tools" / "bench_layouts.py"), "--device", "cpu"]


def kernel(name: str, begin: float, duration: float) -> dict:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": duration}


def test_exposed_is_what_no_other_kernel_covers(monkeypatch) -> None:
    """100 us of a transfer, 60 of them beside products; then 50 us alone; before it a barrier."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from overlap_bench.exposed import links_of

    step = [
        kernel("ncclDevKernel_SendRecv", 0, 100),
        kernel("gemm", 20, 30),
        kernel("gemm", 40, 40),
        kernel("ncclDevKernel_AllGather", 200, 50),
    ]
    found = links_of(step)
    assert found.values() == pytest.approx((0.15, 0.09, 0.06, 0.25))
    barrier = [kernel("ncclDevKernel_AllReduce", -500, 450), kernel("fill", -400, 2)]
    assert links_of(barrier + step, after_barrier=True) == found
    assert links_of([]).values() == (0, 0, 0, 0)


def test_one_gpu_and_a_full_folder_are_refused(tmp_path) -> None:
    (tmp_path / "old").write_text("kept")
    for words, said in ((["--gpus", "1"], "at least two GPUs"), ([], "not an empty folder")):
        out = tmp_path / "new" if words else tmp_path
        done = subprocess.run([*BENCH, "--out", str(out), *words], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert (tmp_path / "old").read_text() == "kept" and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_rows_run_on_two_processes(tmp_path) -> None:
    """gloo in NCCL's place; every row as the table's own test finds it."""
    out = tmp_path / "out"
    words = ["--quick", "--parts", "layouts", "--minutes", "9", "--out", str(out)]
    done = subprocess.run([*BENCH, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "results.json").read_text())["layouts"]
    assert len(found["rows"]) == 6 and not found["skipped"]
    for row in found["rows"]:
        assert row["ok"] and max(row["mhc"].values()) < 1e-4, row
    assert "6 of 6 rows" in (out / "table.txt").read_text()
