"""How a training step is timed.

The models of a precision take turns: one step of each, then the next round, so that clocks and
temperature drift for all alike. A step lies between two CUDA events on the compute stream; between
steps the host does not wait for the GPU, as in training, unless the model itself makes it wait
(dropless experts do, to learn how many tokens each received). Python's garbage collector runs
between rounds only.

What the GPU did comes from separate steps under torch.profiler, each a trace of its own, in turns
as well: summed kernel time, which does not depend on the host, and the time in which at least one
kernel ran. Where that busy time falls behind the step's time, the GPU waited for the host.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from kernel_bench.timing import Times

from . import trace
from .models import Model
from .trace import Activity

WARM_UP = 3


@dataclass
class Measured:
    """What was measured of one model.

    Attributes:
        rounds: milliseconds between the two events of every step; step i of each model is of the
            same round.
        host: milliseconds in which the host issued it.
        peak: bytes that a step adds to the resident ones, at most.
        profile: one activity a profiled step; none without a GPU.
        loss: of the last step.
    """

    rounds: list[float]
    host: Times
    peak: int
    loss: float | None
    profile: list[Activity] = field(default_factory=list)

    @property
    def step(self) -> Times:
        return Times.of(self.rounds)


def measure(
    models: Sequence[Model],
    steps: int,
    profile_steps: int,
    traces: Path | None,
    say: Callable[[str], None],
) -> list[Measured]:
    """Time ``steps`` steps of every model, then profile ``profile_steps`` of each.

    ``traces``: folder for the last trace of each model; None keeps none. ``say`` hears what begins.
    """
    say(f"{WARM_UP} steps of each to warm up")
    for _ in range(WARM_UP):
        for model in models:
            model.prepare()
            model.step()
    torch.cuda.synchronize()
    say(f"{steps} steps of each, in turns")
    samples = [_Samples() for _ in models]
    gc.collect()
    gc.disable()
    try:
        for _ in range(steps):
            for model, sample in zip(models, samples):
                sample.take(model)
            gc.collect(0)
        torch.cuda.synchronize()
    finally:
        gc.enable()
    say(f"{profile_steps} profiled steps of each")
    profiles = profile(models, profile_steps, traces)
    return [
        Measured(sample.gpu(), Times.of(sample.host), sample.peak, model.loss(), found)
        for model, sample, found in zip(models, samples, profiles)
    ]


class _Samples:
    """The steps of one model."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.host: list[float] = []
        self.peak = 0

    def take(self, model: Model) -> None:
        model.prepare()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        model.step()
        self.host.append(1e3 * (time.perf_counter() - began))
        end.record()
        self._events.append((start, end))
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - resident)

    def gpu(self) -> list[float]:
        return [start.elapsed_time(end) for start, end in self._events]


def profile(
    models: Sequence[Model], steps: int, traces: Path | None = None
) -> list[list[Activity]]:
    """``steps`` profiled steps of every model, in turns; empty lists without a GPU."""
    found: list[list[Activity]] = [[] for _ in models]
    if not _on_gpu():
        return found
    for _ in range(steps):
        for model, activities in zip(models, found):
            activities.append(_profiled(model, traces))
    return found


def _profiled(model: Model, traces: Path | None) -> Activity:
    """One step of ``model`` under the profiler, after one that warms the profiler up."""
    column = model.column
    with tempfile.TemporaryDirectory() as folder:
        path = (traces or Path(folder)) / trace.file_name(column.precision, column.label)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        ) as profiler:
            model.prepare()
            model.step()
            model.prepare()
            torch.cuda.synchronize()
            profiler.step()  # from here on it records
            model.step()
            torch.cuda.synchronize()
            profiler.step()
        return trace.read(path)


def vocabulary(model: Model, steps: int) -> Activity | None:
    """Embedding, final norm, output matrix and loss of a plain residual model; None without a GPU.

    The median of ``steps`` by summed kernel time.
    """
    if not _on_gpu():
        return None
    with model.without_layers():
        model.prepare()
        model.step()
        found = profile([model], steps)[0]
    return sorted(found, key=lambda a: a.kernel_ms)[len(found) // 2] if found else None


def typical(profile: Sequence[Activity]) -> Activity | None:
    """The medians, field by field and class by class, of a model's profiled steps."""
    if not profile:
        return None
    classes = dict.fromkeys(name for a in profile for name in a.classes)
    names = dict.fromkeys(name for a in profile for name in a.names)
    return Activity(
        kernel_ms=median(a.kernel_ms for a in profile),
        busy_ms=median(a.busy_ms for a in profile),
        launches=round(median(a.launches for a in profile)),
        waits=round(median(a.waits for a in profile)),
        at_once=median(a.at_once for a in profile),
        classes={name: median(a.classes.get(name, 0.0) for a in profile) for name in classes},
        names={name: median(a.names.get(name, 0.0) for a in profile) for name in names},
    )


def _on_gpu() -> bool:
    from mhc_megatron import cpu

    return not cpu.enabled()
