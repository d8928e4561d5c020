"""An emulated wire: transfers of the right bytes, by the copy engines, at a given rate.

It stands for p2p over a network card. A transfer copies its bytes between device and pinned host
memory, forward sends down and backward sends up, as each direction has an engine; pauses between
pieces (one thread that spins) bring it to the asked rate. Like NCCL's, a transfer runs on a stream
of its own, after what the current stream holds when it starts; ``wait`` lets the current stream
wait for its end. What is not emulated: the SMs that NCCL's kernels take, and the network.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

MIB = 2**20
#: A copy that goes at once; between two of them the wire pauses.
PIECE = 4 * MIB


class Clock:
    """Kernels of one thread that spin for a given time."""

    def __init__(self, cpu: bool) -> None:
        self.cpu, self.cycles_per_ms = cpu, 0.0
        if not cpu:
            self.cycles_per_ms = 2_000_000 / elapsed(lambda: torch.cuda._sleep(2_000_000))

    def spin(self, ms: float) -> None:
        """On the current stream."""
        if not self.cpu and ms > 0:
            torch.cuda._sleep(int(ms * self.cycles_per_ms))


def elapsed(work, repeat: int = 5) -> float:
    """Milliseconds of ``work``, the smallest of a few."""
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return max(min(times), 1e-6)


@dataclass
class Transfer:
    """One that was started; what NCCL's work handle is."""

    done: torch.cuda.Event

    def wait(self) -> None:
        """Let the current stream wait; the host does not."""
        self.done.wait()


class Wire:
    """One direction of a link.

    Args:
        down: device to host (or up).
        gb_per_s: the rate; 0 for a wire that takes no time.
        clock: for the pauses.
    """

    def __init__(self, down: bool, gb_per_s: float, clock: Clock) -> None:
        self.down, self.rate, self.clock = down, gb_per_s, clock
        device = "cpu" if clock.cpu else "cuda"
        self.stream = torch.cuda.Stream()
        self._device = torch.empty(PIECE, dtype=torch.uint8, device=device)
        self._host = torch.empty(PIECE, dtype=torch.uint8, pin_memory=not clock.cpu)
        #: What the engine does by itself, GB/s.
        self.engine = PIECE / 1e6 / elapsed(self._piece)

    def start(self, size: int) -> Transfer:
        """Transfer ``size`` bytes after what the current stream holds."""
        before, done = torch.cuda.Event(), torch.cuda.Event()
        before.record()
        with torch.cuda.stream(self.stream):
            before.wait()
            if self.rate > 0 and size > 0:
                self._run(size)
            done.record()
        return Transfer(done)

    def _run(self, size: int) -> None:
        """All of it where the engine is fast enough, else as much as fits into the time."""
        ms = size / 1e6 / self.rate
        share = min(1.0, self.engine / self.rate)
        pieces = max(1, int(share * size / PIECE))
        pause = (ms - pieces * PIECE / 1e6 / self.engine) / pieces
        for _ in range(pieces):
            self._piece()
            self.clock.spin(pause)

    def _piece(self) -> None:
        source, target = self._device, self._host
        if not self.down:
            source, target = target, source
        target.copy_(source, non_blocking=True)


def host_time() -> float:
    """Milliseconds of the host's clock."""
    return 1000 * time.perf_counter()
