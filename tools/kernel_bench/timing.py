"""How time is taken.

On a GPU: every task is captured into a CUDA graph and replayed, one replay at a time between two
events. Before each replay a buffer of 16 times the L2 is read: every replay starts with a cold L2
whose lines are clean (a buffer that is written instead leaves dirty lines, which the measured
kernels would have to write back), and the host has queued the replay before the reading ends.
Tasks take turns: one replay of each, then the next round.
Nothing is subtracted; the time of a graph that holds one tiny kernel is reported beside the rest,
as the floor of this method.

The yardstick is a copy kernel, replayed in the same rounds; the fastest of a few launch shapes
counts. (``Tensor.copy_`` captured into a graph becomes a memcpy node, which is slower.)

On a CPU: wall-clock time of the eager call, in turns as well. It serves to test the bench.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tasks import Task

EMPTY = "empty graph"
#: Launch shapes of the copy kernel: int32 elements per block, warps.
COPIES = {
    f"copy kernel {block}/{warps}": (block, warps)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8))
}

#: Size of the buffer that is read to clear the L2, in L2 sizes.
FLUSH = 16


@dataclass(frozen=True)
class Times:
    """Milliseconds over the rounds: median, 10th and 90th percentile, smallest."""

    median: float
    p10: float
    p90: float
    least: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float], divide_by: int = 1) -> Times:
        ordered = sorted(sample / divide_by for sample in samples)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.1 * last)],
            ordered[round(0.9 * last)],
            ordered[0],
            len(ordered),
        )

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        return (self.p90 - self.p10) / self.median

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "spread": self.spread}


class WallClock:
    """Times tasks on the CPU."""

    def __init__(self) -> None:
        self._bodies: dict[Hashable, Callable[[], object]] = {}

    def add(self, key: Hashable, task: Task) -> None:
        """Prepare ``task`` under ``key``; runs it once."""
        state = task.prepare()
        task.body(state)
        self._bodies[key] = lambda: task.body(state)

    def run(self, rounds: int) -> dict[Hashable, list[float]]:
        """Milliseconds of every task, ``rounds`` of each."""
        samples: dict[Hashable, list[float]] = {key: [] for key in self._bodies}
        for _ in range(rounds):
            for key, body in self._bodies.items():
                start = time.perf_counter()
                body()
                samples[key].append(1e3 * (time.perf_counter() - start))
        return samples


class GraphClock:
    """Times tasks by replays of CUDA graphs; see the module's docstring."""

    def __init__(self, device: torch.device, copy_bytes: int = 1 << 30) -> None:
        """``copy_bytes``: size of the copy kernel's source and of its target."""
        self._stream = torch.cuda.Stream(device)
        # Tasks give all their memory back before the capture ends and never run side by side:
        # they can share one pool, which is then as large as the largest, not as their sum.
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._alive: list[object] = []
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.ones(FLUSH * l2_bytes // 4, dtype=torch.int32, device=device)
        self._flush_out = torch.zeros((), dtype=torch.int64, device=device)
        self.copy_bytes = copy_bytes
        source = torch.ones(copy_bytes // 4, dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        for key, shape in COPIES.items():
            body = functools.partial(copy_kernel, source, target, *shape)
            self.add(key, Task("copy", lambda: None, lambda _, body=body: body()))
        one = torch.zeros(1, device=device)
        self.add(EMPTY, Task("empty", lambda: None, lambda _: one.add_(1)))

    def add(self, key: Hashable, task: Task) -> None:
        """Warm ``task`` up (compilation, autotuning) and capture it under ``key``."""
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # The forward runs on the capturing stream: autograd runs its backward there too.
            state = task.prepare()
            for _ in range(3):
                task.body(state)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the capture's pool is apart: it needs this memory again
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                task.body(state)
        torch.cuda.synchronize()
        self._graphs[key] = graph
        self._alive += [task, state]

    def run(self, rounds: int) -> dict[Hashable, list[float]]:
        """Milliseconds of every task, ``rounds`` of each; one more round goes first, unused."""
        events: dict[Hashable, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
            key: [] for key in self._graphs
        }
        with torch.cuda.stream(self._stream):
            for _ in range(rounds + 1):
                for key, graph in self._graphs.items():
                    torch.sum(self._flush, dim=0, out=self._flush_out)
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    graph.replay()
                    end.record()
                    events[key].append((start, end))
            torch.cuda.synchronize()
        return {
            key: [start.elapsed_time(end) for start, end in pairs[1:]]
            for key, pairs in events.items()
        }


def copy_bandwidth(samples: dict[Hashable, list[float]], copy_bytes: int) -> float:
    """Bytes a millisecond, read and written, of the launch shape with the smallest median."""
    return 2 * copy_bytes / min(Times.of(samples[key]).median for key in COPIES)


def copy_kernel(source: Tensor, target: Tensor, block: int, warps: int) -> None:
    """target = source, both int32 and contiguous, by one Triton kernel."""
    grid = (triton.cdiv(source.numel(), block),)
    _copy[grid](source, target, source.numel(), BLOCK=block, num_warps=warps)


@triton.jit
def _copy(source, target, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(target + offsets, tl.load(source + offsets, mask=mask), mask=mask)
