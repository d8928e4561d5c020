#!/usr/bin/env python3
"""Measure the host's time for the boundaries: what mHC costs where the GPU waits for the host.

    python tools/bench_host.py                       # one GPU: 8 sublayers, 128 tokens, C = 2560
    python tools/bench_host.py --norm --channels 4096

A chain of sublayers without layers in it (``mhc_enter``, ``mhc_post_pre``s, ``mhc_post``), and so
few tokens that the GPU waits for the host. A forward is timed until the host is through it, not the
GPU, then its backward, once the GPU is; of 50 of each the median is printed, per sublayer:

    forward 312 us, backward 405 us a sublayer

On a CPU (``--device cpu``) the eager reference runs: that shows that the script does, nothing else.
Exit code 0; 2 for bad arguments or no GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

import mhc_kernels  # noqa: E402

N, SUBLAYERS = 4, 8


class Chain:
    """The operands of a chain of sublayers, and its forward."""

    def __init__(self, tokens: int, C: int, norm: bool, device: str) -> None:
        def leaf(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*size, dtype=dtype, device=device).requires_grad_()

        self.x = leaf(tokens, 1, N, C, dtype=torch.bfloat16)
        K = N * (N + 2)
        self.parameters = [(leaf(K, N * C), leaf(3), leaf(K)) for _ in range(SUBLAYERS)]
        self.norm_weight = leaf(C) if norm else None
        self.leaves = [self.x, *(t for ts in self.parameters for t in ts)]
        self.leaves += [self.norm_weight] if norm else []
        self.gradient = torch.ones_like(self.x)

    def forward(self) -> Tensor:
        first, *others = self.parameters
        options = {"norm_weight": self.norm_weight}
        x, u, H_post, H_res = mhc_kernels.mhc_enter(self.x, *first, **options)
        for parameters in others:
            x, u, H_post, H_res = mhc_kernels.mhc_post_pre(
                x, u, H_post, H_res, *parameters, **options
            )
        return mhc_kernels.mhc_post(x, u, H_post, H_res)

    def times(self, device: str) -> tuple[float, float]:
        """Seconds until the host is through a forward, and through its backward."""
        for t in self.leaves:
            t.grad = None
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        wait()
        begun = time.perf_counter()
        out = self.forward()
        forward = time.perf_counter() - begun
        wait()
        begun = time.perf_counter()
        out.backward(self.gradient)
        return forward, time.perf_counter() - begun


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--channels", type=int, default=2560)
    parser.add_argument("--norm", action="store_true", help="with the layer's norm in the boundary")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_host.py: needs a CUDA device.", file=sys.stderr)
        return 2
    chain = Chain(args.tokens, args.channels, args.norm, args.device)
    for _ in range(3):
        chain.times(args.device)
    times = zip(*(chain.times(args.device) for _ in range(args.steps)))
    forward, backward = (1e6 * statistics.median(t) / SUBLAYERS for t in times)
    print(f"forward {forward:.0f} us, backward {backward:.0f} us a sublayer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
