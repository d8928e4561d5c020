"""What the bench found: records, and their table, JSON and plot."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from kernel_bench.results import align

from mhc_megatron.counting import Flops

from . import classes
from .columns import BASELINE, FILES, Column
from .measure import Measured, typical
from .trace import Activity

#: A step's time above the GPU's busy time by more than this share: the GPU is not the bottleneck.
IDLE = 0.05
#: Of the rounds, for the interval of the added time.
RESAMPLES = 2000
GIB = 2**30


@dataclass
class Result:
    """One column.

    Attributes:
        column: what it is.
        failed: why it could not be measured.
        tokens: a step and GPU.
        flops: a token, forward and backward, by formula; None where there is no formula.
        peak_tflops: of the GPU at the column's precision; None for an unknown GPU.
        parameters: of this rank, and those of its connections.
        resident: bytes of weights, gradients and optimizer.
        measured: times, peak memory, profile.
    """

    column: Column
    failed: str | None = None
    tokens: float = 0.0
    flops: Flops | None = None
    peak_tflops: float | None = None
    parameters: int = 0
    connections: int = 0
    resident: int = 0
    measured: Measured | None = None

    @property
    def activity(self) -> Activity | None:
        return typical(self.measured.profile) if self.measured else None

    @property
    def tokens_per_s(self) -> float:
        """A GPU."""
        return 1e3 * self.tokens / self.measured.step.median

    @property
    def tflops(self) -> float | None:
        """Model TFLOP/s a GPU, the connections' operations not counted."""
        return self.flops and self.flops.model * self.tokens_per_s / 1e12

    @property
    def mfu(self) -> float | None:
        return self.tflops / self.peak_tflops if self.tflops and self.peak_tflops else None

    @property
    def idle(self) -> float | None:
        """Share of the step in which no kernel ran."""
        activity = self.activity
        return activity and max(0.0, 1 - activity.busy_ms / self.measured.step.median)


@dataclass
class Group:
    """The columns of one precision, measured side by side.

    Attributes:
        vocabulary: milliseconds of kernels for embedding, output and loss of the baseline.
        vocabulary_absent: why that was not measured.
    """

    precision: str
    results: list[Result]
    vocabulary: float | None = None
    vocabulary_absent: str = ""

    @property
    def baseline(self) -> Result | None:
        """The plain residual model, where it was measured."""
        for result in self.results:
            if result.column.label == BASELINE and result.measured:
                return result
        return None

    def overhead(self, result: Result) -> dict[str, float | None]:
        """What ``result`` adds to the baseline, as shares of it.

        ``step``: of the step's time; ``kernels``: of the summed kernel time; ``layers``: the same
        added time as a share of the baseline's kernels without embedding, output and loss.
        """
        base, found = self.baseline, {"step": None, "kernels": None, "layers": None}
        if base is None or base is result or result.measured is None:
            return found
        found["step"] = result.measured.step.median / base.measured.step.median - 1
        ours, theirs = result.activity, base.activity
        if ours and theirs:
            added = ours.kernel_ms - theirs.kernel_ms
            found["kernels"] = added / theirs.kernel_ms
            if self.vocabulary is not None:
                found["layers"] = added / (theirs.kernel_ms - self.vocabulary)
        return found

    def interval(self, result: Result) -> tuple[float, float] | None:
        """Between what ``overhead``'s ``step`` lies for 95 % of resampled rounds.

        A bootstrap over rounds, whose steps stay together, since what slows one model often slows
        the next: it says how much the steps of this run agree, not what another card would give.
        """
        base = self.baseline
        if base is None or base is result or result.measured is None:
            return None
        pairs = list(zip(result.measured.rounds, base.measured.rounds, strict=True))
        if len(pairs) < 2:
            return None
        chance = random.Random(0)
        found = []
        for _ in range(RESAMPLES):
            ours, theirs = zip(*chance.choices(pairs, k=len(pairs)), strict=True)
            found.append(median(ours) / median(theirs) - 1)
        found.sort()
        tail = RESAMPLES // 40
        return found[tail], found[-1 - tail]

    def derived(self, result: Result, layers: int, full: int) -> float | None:
        """Added kernel time at full depth, if each layer costs the slice's mean.

        Derived from the slice, not measured; None where the vocabulary's part is not known.
        """
        if self.overhead(result)["layers"] is None or layers == full:
            return None
        base = self.baseline.activity.kernel_ms
        added = result.activity.kernel_ms - base
        stack = base - self.vocabulary
        return added / layers * full / (self.vocabulary + stack / layers * full)


@dataclass
class Run:
    """A run of the bench: ``header`` says with what, where, when and how it was measured."""

    header: dict[str, str]
    layers: int = 0
    full_layers: int = 0
    groups: list[Group] = field(default_factory=list)

    @property
    def results(self) -> list[Result]:
        return [result for group in self.groups for result in group.results]

    @property
    def failed(self) -> bool:
        return any(result.failed for result in self.results)


def write(run: Run, out: Path, plot: bool = True) -> list[Path]:
    """Table, JSON and plot into ``out``; each file appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    contents = [
        lambda path: path.write_text(table(run)),
        lambda path: path.write_text(json.dumps(as_json(run), indent=1) + "\n"),
        lambda path: path.write_bytes(picture(run)),
    ]
    paths = [out / name for name in FILES]
    if not plot or not any(result.measured for result in run.results):
        paths.pop()
    for path, make in zip(paths, contents):
        partial = path.with_name(f".{path.name}.partial{path.suffix}")
        make(partial)
        os.replace(partial, path)
    return paths


# -------------------------------------------------------------------------------------------- JSON


def as_json(run: Run) -> dict[str, Any]:
    """The run as JSON values."""
    return {
        **run.header,
        "layers": run.layers,
        "full_layers": run.full_layers,
        "groups": [
            {
                "precision": group.precision,
                "vocabulary_kernel_ms": group.vocabulary,
                "vocabulary_absent": group.vocabulary_absent or None,
                "columns": [_column_json(run, group, result) for result in group.results],
            }
            for group in run.groups
        ],
    }


def _column_json(run: Run, group: Group, result: Result) -> dict[str, Any]:
    head = {
        "label": result.column.label,
        "precision": result.column.precision,
        "peer": result.column.peer or None,
        "mhc": result.column.mhc.to_mapping(),
        "failed": result.failed,
    }
    if result.measured is None:
        return head
    activity = result.activity
    if activity:
        spread = [a.kernel_ms for a in result.measured.profile]
        longest = sorted(activity.names.items(), key=lambda item: -item[1])[:40]
        profiled = {
            **asdict(activity),
            "names": dict(longest),
            "steps": len(spread),
            "kernel_ms_least": min(spread),
            "kernel_ms_most": max(spread),
        }
    return {
        **head,
        "parameters": result.parameters,
        "connection_parameters": result.connections,
        "tokens_per_step": result.tokens,
        "step_ms": result.measured.step.as_dict(),
        "host_ms": result.measured.host.as_dict(),
        "tokens_per_s": result.tokens_per_s,
        "flops_per_token": result.flops and asdict(result.flops),
        "model_tflops": result.tflops,
        "peak_tflops": result.peak_tflops,
        "mfu": result.mfu,
        "resident_bytes": result.resident,
        "step_peak_bytes": result.measured.peak,
        "loss": _finite(result.measured.loss),
        "profile": profiled if activity else None,
        "idle": result.idle,
        "overhead": group.overhead(result),
        "step_overhead_95": group.interval(result),
        "rounds_ms": result.measured.rounds,
        "derived_full_depth_overhead": group.derived(result, run.layers, run.full_layers),
        "bottleneck": bottleneck(result),
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


# ------------------------------------------------------------------------------------------- table


def table(run: Run) -> str:
    """The whole run as text."""
    blocks = ["\n".join(f"{key}: {value}" for key, value in run.header.items())]
    blocks += [_group_table(run, group) for group in run.groups]
    return "\n\n".join(blocks) + "\n"


def _group_table(run: Run, group: Group) -> str:
    measured = [result for result in group.results if result.measured]
    lines = [group.precision]
    if measured:
        lines += align(_summary(group, measured))
        if measured[0].flops:
            lines += _flops_lines(measured)
        if any(result.activity for result in measured):
            lines += ["", "kernel time by class, ms (the difference to none)"]
            lines += align(_classes(group, measured))
        lines += ["", *_overhead_lines(run, group, measured)]
        lines += [line for result in measured if (line := _bottleneck_line(result))]
    lines += [f"failed: {r.column.label}: {r.failed}" for r in group.results if r.failed]
    return "\n".join(lines)


def _summary(group: Group, results: Sequence[Result]) -> list[list[str]]:
    rows = [
        ["", "step ms", "spread", "tokens/s", "TFLOP/s", "MFU", "added", "95 %", "kernels ms",
         "added", "launches", "waits", "idle", "resident GiB", "step GiB"]
    ]  # fmt: skip
    for result in results:
        overhead, activity = group.overhead(result), result.activity
        step = result.measured.step
        rows.append(
            [
                result.column.label,
                f"{step.median:.2f}",
                f"{100 * step.spread:.1f} %",
                f"{result.tokens_per_s:,.0f}",
                f"{result.tflops:.4g}" if result.tflops else "-",
                _percent(result.mfu),
                _percent(overhead["step"], sign=True),
                _interval(group.interval(result)),
                f"{activity.kernel_ms:.2f}" if activity else "-",
                _percent(overhead["kernels"], sign=True),
                str(activity.launches) if activity else "-",
                str(activity.waits) if activity else "-",
                _percent(result.idle),
                f"{result.resident / GIB:.2f}",
                f"{result.measured.peak / GIB:.2f}",
            ]
        )
    return rows


def _flops_lines(results: Sequence[Result]) -> list[str]:
    """Model FLOPs count what every column has in common; what the connections add stands apart."""
    model = results[0].flops.model
    added = {
        r.column.label: r.flops.connections for r in results if r.flops and r.flops.connections
    }
    line = f"model FLOPs a token {model / 1e9:.3f} G, as TFLOP/s and MFU count them"
    if added:
        line += "; the connections' own, not counted: " + ", ".join(
            f"{label} {flops / 1e9:.3f} G ({100 * flops / model:.2f} %)"
            for label, flops in added.items()
        )
    return [line]


def _classes(group: Group, results: Sequence[Result]) -> list[list[str]]:
    shown = [r for r in results if r.activity]
    base = group.baseline and group.baseline.activity
    rows = [["", *(result.column.label for result in shown)]]
    for name in classes.NAMES:
        if any(result.activity.classes.get(name) for result in shown):
            cells = []
            for result in shown:
                value = result.activity.classes.get(name, 0.0)
                cell = f"{value:.3f}"
                if base and result is not group.baseline:
                    cell += f" ({value - base.classes.get(name, 0.0):+.3f})"
                cells.append(cell)
            rows.append([name, *cells])
    return rows


def _overhead_lines(run: Run, group: Group, results: Sequence[Result]) -> list[str]:
    lines = []
    for result in results:
        overhead = group.overhead(result)
        if overhead["kernels"] is None:
            continue
        line = f"{result.column.label}: {_percent(overhead['kernels'], sign=True)} kernel time"
        if overhead["layers"] is not None:
            line += (
                f"; {_percent(overhead['layers'], sign=True)} of the layers alone (embedding, "
                f"output and loss take {group.vocabulary:.2f} ms)"
            )
        derived = group.derived(result, run.layers, run.full_layers)
        if derived is not None:
            line += (
                f"; derived, not measured: {_percent(derived, sign=True)} at all "
                f"{run.full_layers} layers, if each costs the slice's mean"
            )
        lines.append(line)
    if group.vocabulary_absent and lines:
        lines.append(f"layers alone: not measured, {group.vocabulary_absent}")
    return lines


def bottleneck(result: Result) -> str | None:
    """``gpu``, ``host`` or ``waits``: what a step's time is made of; None without a profile."""
    activity = result.activity
    if activity is None:
        return None
    if result.idle <= IDLE:
        return "gpu"
    return "host" if activity.at_once > 0.5 or not activity.waits else "waits"


def _bottleneck_line(result: Result) -> str | None:
    kind, activity = bottleneck(result), result.activity
    if kind is None:
        return None
    label, idle = result.column.label, 100 * result.idle
    if kind == "gpu":
        return f"{label}: the GPU is the bottleneck (idle {idle:.1f} % of the step)"
    why = (
        f"the host cannot keep up: {100 * activity.at_once:.0f} % of the kernels found an empty "
        "queue"
        if kind == "host"
        else f"the host waits for it {activity.waits} times a step and launches late afterwards"
    )
    return (
        f"{label}: NOT bound by the GPU, which is idle {idle:.1f} % of the step; {why}. Compare "
        "kernel times, not step times."
    )


def _interval(shares: tuple[float, float] | None) -> str:
    return "-" if shares is None else "..".join(f"{100 * share:+.1f}" for share in shares)


def _percent(share: float | None, sign: bool = False) -> str:
    if share is None:
        return "-"
    return f"{100 * share:+.2f} %" if sign else f"{100 * share:.1f} %"


# -------------------------------------------------------------------------------------------- plot

#: Class -> colour; the connection's three share a hue.
_COLOURS = {
    "GEMM": "#0072B2",
    "attention": "#56B4E9",
    "MoE permute": "#009E73",
    "quantise": "#E69F00",
    "mHC forward": "#D55E00",
    "mHC backward": "#A03D00",
    "mHC refill": "#F0A070",
    "communication": "#CC79A7",
}
_GREYS = ("#999999", "#b5b5b5", "#cccccc", "#dddddd", "#e8e8e8")


def picture(run: Run) -> bytes:
    """PNG: a bar for each column, kernel time by class; without a profile, the step's time."""
    from reporting.style import drawing, figure, png

    results = [result for result in run.results if result.measured]
    profiled = all(result.activity for result in results)
    with drawing():
        fig, axes = figure(height=1.4 + 0.45 * len(results))
        axis = axes[0, 0]
        labels = [f"{r.column.label}, {r.column.precision}" for r in results]
        if profiled:
            _stack(axis, labels, results)
            fig.legend(loc="outside upper left", ncols=7, fontsize=8)
        else:
            axis.barh(labels, [r.measured.step.median for r in results], color="#0072B2")
        axis.plot(
            [r.measured.step.median for r in results], labels, "k|", markersize=14, label="step"
        )
        axis.invert_yaxis()
        axis.set_xlabel("ms a step: kernels by class (bars), step (marks)" if profiled else "ms")
        return png(fig)


def _stack(axis: Any, labels: Sequence[str], results: Sequence[Result]) -> None:
    left = [0.0] * len(results)
    greys = iter(_GREYS * 2)
    for name in classes.NAMES:
        values = [result.activity.classes.get(name, 0.0) for result in results]
        if any(values):
            colour = _COLOURS.get(name) or next(greys)
            axis.barh(labels, values, left=left, color=colour, label=name)
            left = [a + b for a, b in zip(left, values)]
