"""What a GPU did in one step, from the trace that torch.profiler exports.

The trace is Chrome's JSON: complete events (``ph: X``) with ``ts`` and ``dur`` in microseconds. The
GPU's are of category ``kernel``, ``gpu_memcpy`` or ``gpu_memset``, the launches that made them of
category ``cuda_runtime`` or ``cuda_driver``; ``args.correlation`` ties the two together.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .classes import class_of

GPU = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cuda_runtime", "cuda_driver")
#: A kernel that begins this soon after the end of its launch found an empty queue, in microseconds.
AT_ONCE_US = 8.0
#: Calls that make the host wait for the GPU.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Activity:
    """One step on one GPU; times in milliseconds.

    Attributes:
        kernel_ms: sum of all kernels, copies and fills, each from the end of the one before it in
            its stream: a programmatic dependent launch puts a kernel on the GPU early, where it
            waits for that end, and its duration would count the other's work twice.
        busy_ms: time in which at least one of them ran.
        launches: how many.
        waits: how often the host waited for the GPU before it had launched the last of them.
        at_once: share of the kernels that found an empty queue: near 1 where the host cannot keep
            up, near 0 where the GPU is behind.
        classes: ``kernel_ms`` by class.
        names: ``kernel_ms`` by kernel.
    """

    kernel_ms: float
    busy_ms: float
    launches: int
    waits: int
    at_once: float
    classes: dict[str, float] = field(default_factory=dict)
    names: dict[str, float] = field(default_factory=dict)


def file_name(precision: str, label: str) -> str:
    """Of a column's trace."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in label)
    return f"trace-{precision}-{safe}.json.gz"


def read(path: Path) -> Activity:
    """The activity that a trace file holds (``.json`` or ``.json.gz``)."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as f:
        return activity(json.load(f, strict=False)["traceEvents"])


def activity(events: Iterable[dict[str, Any]]) -> Activity:
    """The activity of a trace's events."""
    events = [event for event in events if event.get("ph") == "X"]
    gpu = [event for event in events if event.get("cat") in GPU]
    host = [event for event in events if event.get("cat") in HOST]
    classes: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for name, milliseconds in own_time(gpu):
        classes[class_of(name)] += milliseconds
        names[name] += milliseconds
    return Activity(
        kernel_ms=sum(classes.values()),
        busy_ms=union((event["ts"], event["ts"] + event["dur"]) for event in gpu) / 1e3,
        launches=len(gpu),
        waits=_waits(gpu, host),
        at_once=_at_once(gpu, host),
        classes=dict(classes),
        names=dict(names),
    )


def own_time(gpu: Iterable[dict[str, Any]]) -> Iterable[tuple[str, float]]:
    """Name and milliseconds of each event, without what it spent behind the one before it."""
    ends: dict[tuple[Any, Any], float] = {}
    for event in sorted(gpu, key=lambda event: event["ts"]):
        stream = event.get("pid"), event.get("tid")
        stop = event["ts"] + event["dur"]
        start = max(event["ts"], ends.get(stream, event["ts"]))
        ends[stream] = max(stop, start)
        yield event["name"], max(0.0, stop - start) / 1e3


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of ``intervals``."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _waits(gpu: list[dict[str, Any]], host: list[dict[str, Any]]) -> int:
    """How often the host waited between its first launch and its last, where a wait costs."""
    launched = {event.get("args", {}).get("correlation") for event in gpu} - {None}
    times = [e["ts"] for e in host if e.get("args", {}).get("correlation") in launched]
    first, last = min(times, default=0), max(times, default=0)
    return sum(e["name"] in WAITS and first < e["ts"] < last for e in host)


def _at_once(gpu: list[dict[str, Any]], host: list[dict[str, Any]]) -> float:
    """Share of the kernels that began within AT_ONCE_US of the end of their launch."""
    launched = {
        event["args"]["correlation"]: event["ts"] + event["dur"]
        for event in host
        if "correlation" in event.get("args", {})
    }
    delays = [
        event["ts"] - launched[event["args"]["correlation"]]
        for event in gpu
        if event["cat"] == "kernel" and event.get("args", {}).get("correlation") in launched
    ]
    return sum(delay < AT_ONCE_US for delay in delays) / len(delays) if delays else 0.0
