"""The overlap schedule on real streams: random schedules and delays against serial execution.

    python tests/gpu/overlap_stress.py --schedules 200
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 python tests/gpu/overlap_stress.py --schedules 10

One GPU, EP 1. Each schedule draws a model, which forward meets which backward, and delays: before
a node its stream may get a kernel that spins, so that the streams drift apart by more than a node
takes. Every loss, every gradient of a parameter and of a chunk's input must be the same, bit for
bit, as without a plan on one stream. Prints one line of JSON; exit code 1 on a difference.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: the same sums on all streams
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
_ROOT = Path(__file__).parents[2]
for _path in (str(_ROOT / "kernels"), str(_ROOT)):
    if _path not in sys.path:
        sys.path.insert(0, _path)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from tests import overlap_cases  # noqa: E402

#: Models of two chunks, with L_r where blocks are recomputed: every kind of node is in one of them.
KINDS = (
    ("dense, biases", 0),
    ("MoE, first layer dense", 0),
    ("MoE, norms recomputed", 0),
    ("MTP", 0),
    ("dense, biases", 3),
    ("MTP", 2),
)
MICROBATCHES = 3


def start() -> None:
    """Megatron on one GPU, in one process, deterministic."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.cuda.init()
    torch.cuda.set_device(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


@contextlib.contextmanager
def delays(draw: random.Random, longest_ms: float):
    """Before a node, with a chance of one in three, its stream spins for up to ``longest_ms``.

    Which stream is slow changes with every schedule: one is drawn that is hit three times as hard.
    """
    from megatron.core.pipeline_parallel.utils import ScheduleNode

    from mhc_megatron.recompute import Block

    acquire, fill = ScheduleNode.stream_acquire_context, Block._fill
    slow = draw.choice(["compute", "mixing", "wire", "none"])

    @contextlib.contextmanager
    def delayed(node, name=None):
        with acquire(node, name):
            if draw.random() < 1 / 3:
                kind = {"mhc_post": "mixing", "moe_dispatch": "wire", "moe_combine": "wire"}
                factor = 3 if kind.get(node.name, "compute") == slow else 1
                torch.cuda._sleep(int(1.5e6 * longest_ms * draw.random() * factor))
            yield
            if draw.random() < 1 / 6:
                torch.cuda._sleep(int(1.5e6 * longest_ms * draw.random()))

    def slow_fill(block, filled):
        torch.cuda._sleep(int(1.5e6 * longest_ms * draw.random()))  # on the refill's own stream
        fill(block, filled)

    ScheduleNode.stream_acquire_context, Block._fill = delayed, slow_fill
    try:
        yield
    finally:
        ScheduleNode.stream_acquire_context, Block._fill = acquire, fill


class Models:
    """A kind's model and what it computes without a plan, made when first asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._made: dict[tuple[str, int], tuple] = {}

    def of(self, kind: tuple[str, int]) -> tuple[list, overlap_cases.Result]:
        from mhc_megatron.config import MHCConfig

        if kind not in self._made:
            name, L_r = kind
            # A read that makes the norm itself leaves nothing of it to recompute.
            fuse = name != "MoE, norms recomputed"
            mhc = MHCConfig(alpha=0.5, init_std=0.1, recompute=L_r, fuse_norm=fuse)
            models = overlap_cases.build(overlap_cases.KINDS[name], mhc, chunks=2, dtype=self.dtype)
            torch.cuda.synchronize()
            expected = overlap_cases.plain(models, MICROBATCHES)
            torch.cuda.synchronize()
            again = overlap_cases.plain(models, MICROBATCHES)
            torch.cuda.synchronize()
            if expected.differences(again):
                raise RuntimeError(f"{kind}: two serial runs differ: {expected.differences(again)}")
            self._made[kind] = models, expected
        return self._made[kind]


def stress(schedules: int, longest_ms: float = 0.5, dtype=torch.bfloat16, first: int = 0) -> dict:
    """Run ``schedules`` random ones; what differed, and what was run."""
    models, found, ran, began = Models(dtype), [], dict.fromkeys(map(str, KINDS), 0), time.time()
    for seed in range(first, first + schedules):
        draw = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        chunks, expected = models.of(kind)
        pairs = overlap_cases.random_pairs(seed, len(chunks), MICROBATCHES)
        with delays(draw, longest_ms):
            got = overlap_cases.planned(chunks, MICROBATCHES, pairs)
        torch.cuda.synchronize()
        differences = expected.differences(got)
        if differences:
            found.append({"seed": seed, "kind": kind, "differences": differences[:5]})
        ran[str(kind)] += 1
    return {
        "schedules": schedules,
        "ran": ran,
        "different": found,
        "seconds": round(time.time() - began, 1),
        "allocator": "off" if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1" else "on",
        "device": torch.cuda.get_device_name(),
    }


#: Models of Transformer Engine's modules: wide enough for its kernels.
TE_KINDS = {
    "dense": {},
    "shared experts": overlap_cases.SHARED | {"moe_ffn_hidden_size": 64, "moe_grouped_gemm": True},
}


def delayed_weight_gradients(schedules: int, longest_ms: float) -> dict:
    """``delay_wgrad_compute`` in a plan against no delay and no plan, with Transformer Engine."""
    found = []
    for name, kind in TE_KINDS.items():
        settings = kind | {"hidden_size": 128, "ffn_hidden_size": 256}
        build = functools.partial(
            overlap_cases.build, settings, chunks=2, dtype=torch.bfloat16, te=True
        )
        expected = overlap_cases.plain(overlap_cases.accumulate_in_float32(build()), MICROBATCHES)
        models = overlap_cases.accumulate_in_float32(build(delay_wgrad=True))
        for seed in range(schedules):
            pairs = overlap_cases.random_pairs(seed, 2, MICROBATCHES)
            with delays(random.Random(seed), longest_ms):
                got = overlap_cases.planned(models, MICROBATCHES, pairs)
            torch.cuda.synchronize()
            differences = expected.differences(got)
            if differences:
                found.append({"seed": seed, "kind": name, "differences": differences[:5]})
    return {"te": list(TE_KINDS), "schedules": schedules, "different": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--longest-ms", type=float, default=0.5, help="of a delay")
    parser.add_argument("--broken", action="store_true", help="mixing waits for nothing: must fail")
    parser.add_argument("--te", action="store_true", help="delayed weight gradients instead")
    options = parser.parse_args()
    start()
    if options.broken:
        forget_to_wait()
    if options.te:
        result = delayed_weight_gradients(options.schedules, options.longest_ms)
    else:
        result = stress(options.schedules, options.longest_ms, first=options.first)
    print(json.dumps(result))
    return 1 if result["different"] else 0


def forget_to_wait() -> None:
    """Break the plan: the mixing stream waits for no other. For the test of the test."""
    from megatron.core.pipeline_parallel.utils import ScheduleNode

    acquire = ScheduleNode.stream_acquire_context

    @contextlib.contextmanager
    def broken(node, name=None):
        if node.name != "mhc_post":
            with acquire(node, name):
                yield
            return
        with torch.cuda.stream(node.stream):
            yield
        node.event.record(node.stream)

    ScheduleNode.stream_acquire_context = broken


if __name__ == "__main__":
    sys.exit(main())
