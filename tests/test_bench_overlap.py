"""tools/bench_overlap.py: its reading of a trace, and the whole bench on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def timeline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from overlap_bench import timeline

    return timeline


def kernel(begin: float, duration: float, stream: int, launch: int, name: str = "k") -> dict:
    return {"cat": "kernel", "name": name, "ts": begin, "dur": duration,
            "args": {"stream": stream, "correlation": launch}}  # fmt: skip


TRACE = [
    {"cat": "user_annotation", "name": "node:pre_dispatch_computation backward", "ts": 0, "dur": 9},
    {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 2, "args": {"correlation": 1}},
    {"cat": "user_annotation", "name": "node:mhc_post forward", "ts": 10, "dur": 5},
    {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 11, "args": {"correlation": 2}},
    {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 20, "args": {"correlation": 3}},
    kernel(100, 50, 7, 1),
    kernel(130, 40, 13, 2),
    kernel(140, 10, 20, 3, "spin_kernel(long)"),
]


def test_kernels_find_the_node_that_launched_them(timeline) -> None:
    found = timeline.spans(TRACE)
    assert [(s.node, s.backward, s.stream) for s in found] == [
        ("pre_dispatch_computation", True, 7),
        ("mhc_post", False, 13),
        ("hop", False, 20),
    ]


def test_what_is_hidden(timeline) -> None:
    """40 us of F_post,res, the first 20 of them beside attention."""
    numbers = timeline.hidden(timeline.spans(TRACE))
    assert numbers == {"mixing_ms": 0.04, "beside_any": 0.5, "beside_attention": 0.5}
    assert timeline.hidden([])["mixing_ms"] == 0


def test_picture(timeline, tmp_path) -> None:
    path = tmp_path / "timeline.png"
    timeline.draw(timeline.spans(TRACE), path, "a test", (0.0, 1.0))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_bench_runs_on_a_cpu(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench_overlap.py", "--device", "cpu", "--quick",
         "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "EMULATED" in done.stdout
    rows = json.loads((tmp_path / "results.json").read_text())["emulation"]["rows"]
    assert {"whole schedule", "Megatron's own placing"} < set(rows)
    assert all(row["ms"] > 0 for row in rows.values())
