"""How much of NCCL's time a trace shows beside computation, and how much alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class Links:
    """One step on one GPU, milliseconds.

    Attributes:
        nccl: time in which at least one of NCCL's kernels ran. A kernel that waits for the other
            side counts: in a pipeline that is its bubble too.
        exposed: the part of it in which no other kernel ran.
        busy: time in which any kernel, copy or fill ran that is not NCCL's.
        span: from the first to the last of all.
    """

    nccl: float
    exposed: float
    busy: float
    span: float

    def values(self) -> tuple[float, ...]:
        return astuple(self)


def links(path: Path, after_barrier: bool = False) -> Links:
    """Of a trace that torch.profiler exported (.json.gz).

    ``after_barrier``: the first of NCCL's kernels is a barrier's; what counts begins after it, as
    ranks start their profilers at different times.
    """
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as f:
        return links_of(json.load(f, strict=False)["traceEvents"], after_barrier)


def links_of(events: Iterable[dict[str, Any]], after_barrier: bool = False) -> Links:
    """Of a trace's events."""
    wire: list[Interval] = []
    work: list[Interval] = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            # ncclDevKernel_SendRecv, ncclDevKernel_AllReduce_Sum_f32_RING_LL, ...
            kind = wire if event["name"].startswith("nccl") else work
            kind.append((event["ts"], event["ts"] + event["dur"]))
    if after_barrier and wire:
        _, start = min(wire)
        wire, work = ([span for span in kind if span[0] >= start] for kind in (wire, work))
    wire, work = merged(wire), merged(work)
    ends = [edge for interval in wire + work for edge in interval]
    nccl = length(wire)
    return Links(
        nccl=nccl / 1e3,
        exposed=(nccl - length(shared(wire, work))) / 1e3,
        busy=length(work) / 1e3,
        span=(max(ends) - min(ends)) / 1e3 if ends else 0.0,
    )


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union, as intervals that do not touch, in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def shared(these: list[Interval], those: list[Interval]) -> list[Interval]:
    """The intersection of two unions."""
    found, i, j = [], 0, 0
    while i < len(these) and j < len(those):
        begin, end = max(these[i][0], those[j][0]), min(these[i][1], those[j][1])
        if begin < end:
            found.append((begin, end))
        if these[i][1] < those[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
