"""The overlap schedule on real streams: bit for bit what serial execution computes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

STRESS = Path(__file__).parent / "overlap_stress.py"
pytestmark = pytest.mark.timeout(420)


def run(*arguments: str, before: tuple[str, ...] = (), **environment: str):
    """The stress in a process of its own: (exit code, its last line as JSON or None, output)."""
    done = subprocess.run(
        [*before, sys.executable, str(STRESS), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, json.loads(lines[-1]) if lines else None, done.stdout + done.stderr


def test_random_schedules_and_delays() -> None:
    code, result, output = run("--schedules", "200")
    assert result is not None, output[-4000:]
    print(result)
    assert result["different"] == [] and code == 0
    assert sum(result["ran"].values()) == 200 and min(result["ran"].values()) >= 33


def test_without_the_caching_allocator() -> None:
    """Memory that is given back is unmapped: a use after it is a fault, not a wrong number."""
    code, result, output = run("--schedules", "12", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert result is not None, output[-4000:]
    assert result["allocator"] == "off"
    assert result["different"] == [] and code == 0


def test_delayed_weight_gradients() -> None:
    """delay_wgrad_compute, which only Transformer Engine's modules have."""
    pytest.importorskip("transformer_engine.pytorch")
    code, result, output = run("--schedules", "5", "--te")
    assert result is not None, output[-4000:]
    assert result["different"] == [] and code == 0


def test_a_missing_wait_shows() -> None:
    """The stress finds a plan whose mixing stream waits for nothing."""
    code, result, output = run("--schedules", "12", "--broken")
    assert result is not None and result["different"], output[-4000:]
    assert code == 1


def test_compute_sanitizer() -> None:
    """No access outside of live memory, with every allocation its own (memcheck)."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    # NCCL asks the driver for what it may not have; those refusals are no accesses.
    quiet = ("--report-api-errors", "no", "--error-exitcode", "9")
    before = (sanitizer, "--tool", "memcheck", *quiet, "--")
    off = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, result, output = run("--schedules", "1", before=before, **off)
    assert result is not None and code == 0, output[-4000:]
