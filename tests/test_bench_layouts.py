"""tools/bench_layouts.py: its plan, its reading of traces, its table; and the bench on two CPUs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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
    for words, said in (
        (["--gpus", "1"], "at least two GPUs"),
        (["--rows", "EP2 ("], "is no regular expression"),
        ([], "not an empty folder"),
    ):
        out = tmp_path / "new" if words else tmp_path
        done = subprocess.run([*BENCH, "--out", str(out), *words], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert (tmp_path / "old").read_text() == "kept" and not (tmp_path / "new").exists()


def test_a_row_that_failed_is_tried_without_connections(monkeypatch) -> None:
    """Also where its reference is there, and only then; what plain Megatron does is in the row."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import bench_layouts
    import layouts_bench
    from layouts_bench.crew import Outcome

    # The real one sets the sizes of tests/distributed/data.py, for this whole process.
    plan = SimpleNamespace(job=lambda entry, device: {"kind": "dense"}, family=lambda entry: "f")
    monkeypatch.setattr(layouts_bench, "plan", plan, raising=False)
    names = ["dense | TP2 | fp8", "dense | PP2 | fp8", "dense | CP2 | fp8"]
    entries = [SimpleNamespace(name=name, world=2) for name in names]
    rows = [
        {"name": names[0], "error": "a product failed"},
        {"name": names[1], "error": "no reference: it failed"},
        {"name": names[2], "error": "", "mhc": {}},
    ]
    tried = []

    class Crew:
        def run(self, tasks, until, done) -> None:
            for task in tasks:
                tried.append((task.name, task.job["variants"], task.world))
                done(task, Outcome(error="Traceback\nRuntimeError: a product failed\n"))

    options = argparse.Namespace(device="cuda", until=time.monotonic() + 60, scratch=Path("/none"))
    bench_layouts._without_connections(options, Crew(), entries, rows)
    assert tried == [(names[0], ["none"], 2)]
    assert rows[0]["plain_alone"] == "RuntimeError: a product failed"
    broken = rows[0] | {"ok": False}
    assert "    plain Megatron alone: RuntimeError: a product failed" in (
        bench_layouts._layouts_table([broken], [])
    )


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
