"""What ran when: a profiler's trace of a few slots, as a picture and as numbers."""

from __future__ import annotations

import bisect
import contextlib
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: Megatron's names of nodes -> (what a reader calls them, colour).
NODES = {
    "pre_dispatch_computation": ("attention, router", "#4c78a8"),
    "mlp": ("MLP, experts", "#9ecae9"),
    "moe_dispatch": ("dispatch", "#54a24b"),
    "moe_combine": ("combine", "#88d27a"),
    "mhc_post": ("F_post,res", "#e45756"),
    "hop": ("transfer between stages", "#f2cf5b"),
}
OTHER = ("other", "#bab0ac")

#: What a stream is called that works for a node.
_ROWS = {
    "pre_dispatch_computation": "compute",
    "mlp": "compute",
    "mhc_post": "mixing",
    "moe_dispatch": "experts' wire",
    "moe_combine": "experts' wire",
    "hop": "hop",
}


@dataclass(frozen=True)
class Span:
    """A kernel or a copy on the GPU, microseconds: ``node`` is a key of NODES or empty."""

    begin: float
    end: float
    stream: int
    name: str
    node: str
    backward: bool


def record(work: Callable[[], None], path: Path) -> list[Span]:
    """Run ``work`` under the profiler; returns the trace's spans.

    Writes the trace to ``path``, which ends with .json.gz (Chrome's format, compressed).
    """
    from torch.profiler import ProfilerActivity, profile

    with _named_nodes(), profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        work()
        torch.cuda.synchronize()
    prof.export_chrome_trace(str(path))
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return spans(json.load(f)["traceEvents"])


@contextlib.contextmanager
def _named_nodes():
    """While open, every node of a plan is a range of the profiler."""
    from megatron.core.pipeline_parallel.utils import ScheduleNode

    acquire = ScheduleNode.stream_acquire_context

    @contextlib.contextmanager
    def named(node, name=None):
        with acquire(node, name), torch.profiler.record_function(f"node:{name}"):
            yield

    ScheduleNode.stream_acquire_context = named
    try:
        yield
    finally:
        ScheduleNode.stream_acquire_context = acquire


def spans(events: list[dict[str, Any]]) -> list[Span]:
    """GPU work of a trace, each with the node whose range launched it.

    A kernel carries the correlation number of its launch on the host; the launch lies in the range
    of a node on the launching thread, or, for work of autograd's own thread, in time.
    """
    launches: dict[int, float] = {}
    ranges: list[tuple[float, float, str]] = []
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            number = event.get("args", {}).get("correlation")
            if number is not None:
                launches[number] = event["ts"]
        elif event.get("cat") == "user_annotation" and event["name"].startswith("node:"):
            ranges.append((event["ts"], event["ts"] + event["dur"], event["name"][5:]))
    ranges.sort()
    found = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launch = launches.get(event.get("args", {}).get("correlation"))
        name = _within(ranges, launch) if launch is not None else ""
        if not name and any(part in event["name"] for part in ("HtoD", "DtoH", "spin_kernel")):
            name = "hop forward"  # the emulated wire, which runs outside of nodes
        node, _, way = name.partition(" ")
        found.append(
            Span(event["ts"], event["ts"] + event["dur"], int(event["args"].get("stream", -1)),
                 event["name"], node, way.startswith("backward"))
        )  # fmt: skip
    return sorted(found, key=lambda span: span.begin)


def _within(ranges: list[tuple[float, float, str]], at: float) -> str:
    """The range that holds the moment ``at``; the last that began, as nodes do not nest."""
    i = bisect.bisect_right(ranges, (at, float("inf"), "")) - 1
    return ranges[i][2] if i >= 0 and ranges[i][0] <= at <= ranges[i][1] else ""


def hidden(found: list[Span]) -> dict[str, float]:
    """How much of F_post,res runs while other nodes' kernels do.

    Returns milliseconds of F_post,res, and the shares of it beside any node's kernel and beside
    attention's.
    """
    mixing = [s for s in found if s.node == "mhc_post"]
    total = sum(s.end - s.begin for s in mixing)
    if total == 0:
        return {"mixing_ms": 0.0, "beside_any": 0.0, "beside_attention": 0.0}
    others = [s for s in found if s.node in NODES and s.node not in ("mhc_post", "hop")]
    attention = [s for s in others if s.node == "pre_dispatch_computation"]
    return {
        "mixing_ms": total / 1000,
        "beside_any": _shared(mixing, others) / total,
        "beside_attention": _shared(mixing, attention) / total,
    }


def _shared(these: list[Span], those: list[Span]) -> float:
    """Microseconds of ``these`` during which at least one of ``those`` runs."""
    merged: list[list[float]] = []
    for span in sorted(those, key=lambda s: s.begin):
        if merged and span.begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], span.end)
        else:
            merged.append([span.begin, span.end])
    return sum(
        max(0.0, min(span.end, end) - max(span.begin, begin))
        for span in these
        for begin, end in merged
    )


def draw(found: list[Span], path: Path, title: str, window: tuple[float, float]) -> None:
    """A picture of the spans in ``window`` (shares of the whole): one row per stream."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    first, last = found[0].begin, max(s.end for s in found)
    begin, end = (first + share * (last - first) for share in window)
    shown = [s for s in found if s.end > begin and s.begin < end]
    streams = sorted({s.stream for s in shown}, key=lambda i: _rank(shown, i))
    figure, axes = plt.subplots(figsize=(14, 1.2 + 0.6 * len(streams)))
    bars: dict[tuple[int, str, bool], list[tuple[float, float]]] = {}
    for span in shown:
        _, colour = NODES.get(span.node, OTHER)
        bar = (span.begin - begin) / 1000, (span.end - span.begin) / 1000
        bars.setdefault((streams.index(span.stream), colour, span.backward), []).append(bar)
    for (row, colour, backward), of_row in bars.items():
        axes.broken_barh(
            of_row,
            (row - 0.4, 0.8),
            facecolors=colour,
            hatch="////" if backward else None,
            edgecolor="white" if backward else colour,
            linewidth=0.0,
        )
    axes.set_yticks(range(len(streams)), [_main_node(shown, i) for i in streams])
    axes.set_xlim(0, (end - begin) / 1000)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10)
    seen = {s.node for s in shown}
    keys = [Patch(color=c, label=label) for node, (label, c) in NODES.items() if node in seen]
    keys.append(Patch(facecolor="#bbbbbb", hatch="////", edgecolor="white", label="backward"))
    axes.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=7, fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _main_node(found: list[Span], stream: int) -> str:
    """What a stream is called: after the node that it works for most."""
    time: dict[str, float] = {}
    for span in found:
        if span.stream == stream:
            time[span.node] = time.get(span.node, 0.0) + span.end - span.begin
    node = max(time, key=time.__getitem__)
    return f"{_ROWS.get(node, 'other')} ({stream})"


def _rank(found: list[Span], stream: int) -> tuple[int, int]:
    order = ["compute", "mixing", "experts' wire", "hop", "other"]
    return order.index(_main_node(found, stream).partition(" (")[0]), stream
