#!/usr/bin/env python3
"""Measures launch shapes of the kernels on this GPU and writes the shipped table.

    python tools/tune_kernels.py [--shapes 16384x2560,4096x1280] [--out tuned.json]

Each candidate runs the backward (or forward) of one boundary as a CUDA graph with a cleared L2; the
median of the repeats decides, summed over the shapes of one C. The table is printed last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from mhc_kernels import launch, tuning  # noqa: E402
from mhc_kernels.tuning import Block  # noqa: E402

SHAPES = "4096x1280,4096x1920,4096x2560,16384x2560,8192x4096,4096x7168"
CANDIDATES = {
    "project_hopper": [
        Block(64, 64, 8, 3, 8),
        Block(64, 32, 4, 3, 8),
        Block(128, 32, 8, 4, 8),
    ],
    "read": [
        Block(8, 256, 4, 2),
        Block(16, 256, 4, 2),
        Block(8, 128, 4, 2),
        Block(16, 128, 4, 2),
    ],
    "read_grad": [Block(4, 256, 1), Block(8, 256, 2), Block(4, 128, 1)],
    "phi_grad": [Block(64, 64, 4, 4, 8), Block(64, 128, 4, 3, 8), Block(128, 64, 4, 3, 8)],
    "boundary_grad_hopper": [
        Block(32, 32, 4, 3, 16),
        Block(32, 64, 8, 3, 16),
        Block(64, 32, 8, 3, 16),
    ],
    "post_grad_hopper": [
        Block(32, 32, 4, 3, 16),
        Block(32, 64, 8, 3, 16),
        Block(32, 32, 4, 4, 16),
        Block(64, 32, 8, 4, 16),
        Block(16, 64, 4, 4, 16),
        Block(16, 64, 4, 3, 16),
    ],
    "post": [Block(8, 256, 4), Block(8, 128, 4), Block(4, 512, 4)],
}


def boundary(T: int, C: int) -> dict:
    """For every kernel of CANDIDATES a function that launches it on random operands, n = 4."""
    n, bf16 = 4, torch.bfloat16

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=dtype)

    x, y, g, du = (normal(T, *size, C, dtype=bf16) for size in ((n,), (), (n,), ()))
    phi, alpha, bias = normal(24, n * C) * 0.02, normal(3), normal(24)
    H_post, H_res = torch.rand(T, n, device="cuda"), torch.rand(T, n, n, device="cuda")

    def plan() -> launch.Plan:
        return launch.plan(x)

    def project():
        return launch.project(plan(), x, y, None, H_post, H_res, phi, False)

    def read():
        return launch.read(plan(), *projected, alpha, bias, None, 20, 1e-20, 1e-6)

    def logits_grad():
        return launch.logits_grad(
            plan(), projected[0], du, H_post, H_res, phi, alpha, bias, None, *saved, 20, 1e-6
        )

    def after_logits(run):
        """The counters of ``logits`` are used up by a launch: make them again."""
        return lambda: run(logits_grad())

    projected = project()
    saved = read()[3:6]
    return {
        "project_hopper": project,
        "read": read,
        "read_grad": logits_grad,
        "phi_grad": after_logits(
            lambda logits: launch.phi_grad(plan(), projected[0], logits, alpha)
        ),
        "boundary_grad_hopper": after_logits(
            lambda logits: launch.boundary_grad(
                plan(), x, y, None, H_post, H_res, g, du, phi, None, logits
            )
        ),
        "post_grad_hopper": lambda: launch.boundary_grad(plan(), x, y, None, H_post, H_res, g),
        "post": lambda: launch.post(plan(), x, y, None, H_post, H_res),
    }


def milliseconds(run, repeats: int = 11) -> float:
    """Median of CUDA-graph replays, the L2 cleared before each."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(shapes: list[tuple[int, int]], compile_only: bool = False) -> dict:
    """total[kernel][C][candidate number], ms. ``compile_only``: run each once, time nothing."""
    total: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    shipped = tuning.block
    for T, C in shapes:
        for kernel, candidates in CANDIDATES.items():
            for number, candidate in enumerate(candidates):

                def block(name, n, C, itemsize, arch, kernel=kernel, candidate=candidate):
                    return candidate if name == kernel else shipped(name, n, C, itemsize, arch)

                if C % candidate.BC == 0:
                    tuning.block = block
                    run = boundary(T, C)[kernel]
                    if compile_only:
                        run()
                        tuning.block = shipped
                        continue
                    ms = milliseconds(run)
                    tuning.block = shipped
                    total[kernel][C][number] += ms
                    print(f"{kernel:22s} {T:6d}x{C:<5d} {candidate} {ms:.4f} ms", flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="TxC, separated by commas")
    parser.add_argument("--out", type=Path, default=tuning.TABLE)
    parser.add_argument(
        "--compile-only", action="store_true", help="fill Triton's cache; for runs side by side"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_kernels needs a CUDA device.", file=sys.stderr)
        sys.exit(2)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    rows: dict = {}
    if options.compile_only:
        measure(shapes, compile_only=True)
        return
    for kernel, by_C in measure(shapes).items():
        rows[kernel] = [
            {"C": C, "block": asdict(CANDIDATES[kernel][min(times, key=times.get)])}
            for C, times in sorted(by_C.items())
        ]
    table = json.loads(options.out.read_text()) if options.out.exists() else {}
    major, minor = torch.cuda.get_device_capability()
    table[f"sm{10 * major + minor}"] = rows
    text = json.dumps(table, indent=1) + "\n"
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
