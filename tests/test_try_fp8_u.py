"""The FP8 read of ``tools/try_fp8_u.py`` without a GPU: its bytes, and that it compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import compile_kernels  # noqa: E402

from mhc_kernels import launch  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import try_fp8_u  # noqa: E402


@pytest.mark.slow
def test_bytes_and_scales_are_the_recipes_in_the_interpreter():
    command = [sys.executable, str(ROOT / "tools" / "try_fp8_u.py"), "--check"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "bit for bit\n"), done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("u", (False, True), ids=("fp8", "fp8 and bf16"))
@pytest.mark.parametrize("tile", (None, *try_fp8_u.TILES))
def test_compiles_without_spills(monkeypatch, tile, u):
    monkeypatch.setitem(compile_kernels.TYPES, torch.float8_e4m3fn, "fp8e4nv")
    monkeypatch.setattr(launch, "_device", lambda index: (90, 132))
    calls: list = []
    for name in ("read_fp8_kernel", "tile_fp8_kernel"):
        kernel = compile_kernels.Recorder(getattr(try_fp8_u, name), calls)
        monkeypatch.setattr(try_fp8_u, name, kernel)
    T, C = 128, 2560
    x = torch.zeros(T, 4, C, dtype=torch.bfloat16)
    s = launch.plan(x)
    o = try_fp8_u.Operands(
        s, x, torch.zeros(4, T, s.KP), torch.zeros(4, T, 10), torch.zeros(3), torch.zeros(s.K),
        torch.zeros(C),
    )  # fmt: skip
    try_fp8_u.read_rows(o, u) if tile is None else try_fp8_u.read_both(o, u, tile)
    for call in calls:
        usage = compile_kernels.compile_call(call, 90)
        print(tile, usage)
        assert usage.stack == 0 and usage.shared <= 227 * 1024
