"""Plots of the residual mapping: Amax gains over training and over depth, Sinkhorn errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from reporting import curves, style
from reporting.runs import Array, Run, Stability
from reporting.style import Picture
from reporting.summary import composite

Colours = Mapping[str, str]
DIRECTIONS = ("forward", "backward")
SUMS = {"forward": "row sums", "backward": "column sums"}
#: Errors below are drawn here: float32 sums cannot tell them from 0, nor can a logarithmic axis.
ERROR_FLOOR = 1e-9
#: With more sublayers than this the depth axis counts them instead of naming them.
NAMED_SUBLAYERS = 16


def over_training(runs: Sequence[Run], colour: Colours) -> Picture | None:
    """Composite gain at full depth over tokens, forward and backward."""
    runs = [run for run in runs if run.stability]
    if not runs:
        return None
    fig, axes = style.figure(1, 2, sharey=True)
    for panel, direction in zip(axes[0], DIRECTIONS):
        draw_composite(panel, runs, direction, colour)
        panel.set_title(f"Composite gain, {direction} ({SUMS[direction]})")
    _scale_together(axes[0])
    axes[0, 0].set_ylabel("gain through all sublayers")
    style.legend(fig, _of(runs, colour), [style.dash("max", "-"), style.dash("min", "--")])
    return Picture("gain_training", style.png(fig), "Composite gain over tokens")


def draw_composite(axes: Axes, runs: Sequence[Run], direction: str, colour: Colours) -> None:
    """Largest and smallest composite gain over tokens."""
    for run in runs:
        tokens = np.array([record.tokens for record in run.stability])
        for side, line in (("max", "-"), ("min", "--")):
            gains = composite(run, f"composite_{direction}_{side}")
            _draw_line(axes, tokens, gains, line, colour[run.label])
    style.label_tokens(axes)
    style.scale_gain(axes, _drawn(axes))


def over_depth(runs: Sequence[Run], colour: Colours) -> Picture | None:
    """Composite and single gains over depth at the last measurement."""
    runs = [run for run in runs if run.stability]
    if not runs:
        return None
    fig, axes = style.figure(2, 2, height=6.4, sharex=True, sharey="row")
    for row, prefix in enumerate(("composite_", "")):
        for panel, direction in zip(axes[row], DIRECTIONS):
            for run in runs:
                _draw_depth(panel, run.stability[-1], f"{prefix}{direction}", colour[run.label])
            what = "Product of sublayers 0…k" if prefix else "Single sublayer k"
            panel.set_title(f"{what}, {direction} ({SUMS[direction]})")
        axes[row, 0].set_ylabel("gain")
        _scale_together(axes[row])
    for panel in axes[1]:
        _name_sublayers(panel, max((run.stability[-1].sublayers for run in runs), key=len))
    style.legend(fig, _of(runs, colour), [style.dash("max", "-"), style.dash("min", "--")])
    return Picture("gain_depth", style.png(fig), "Gain over depth at the last measurement")


def sinkhorn(runs: Sequence[Run], colour: Colours) -> Picture | None:
    """Row and column error over tokens: the worst sublayer and the median one."""
    names = {"row_error": "Row sums", "column_error": "Column sums"}
    runs = [
        run for run in runs
        if any(np.isfinite(record.lists[name]).any() for record in run.stability for name in names)
    ]  # fmt: skip
    if not runs:
        return None
    fig, axes = style.figure(1, 2, sharey=True)
    for panel, (name, title) in zip(axes[0], names.items()):
        for run in runs:
            _draw_error(panel, run, name, colour[run.label])
        panel.set_yscale("log")
        panel.set_title(f"{title} of H_res: distance from 1")
        style.label_tokens(panel)
    axes[0, 0].set_ylabel("error")
    lines = [style.dash("worst sublayer", "-"), style.dash("median sublayer", "--")]
    style.legend(fig, _of(runs, colour), lines)
    return Picture("sinkhorn", style.png(fig), "Sinkhorn row and column error over tokens")


def overview(runs: Sequence[Run], colour: Colours) -> Picture:
    """Loss and composite gain side by side: the picture for a README."""
    with_loss = [run for run in runs if np.isfinite(run.train["loss"]).any()]
    with_gain = [run for run in runs if run.stability]
    fig, axes = style.figure(1, 2 if with_gain else 1, height=3.9)
    extra = curves.draw_loss(axes[0, 0], with_loss, colour)
    axes[0, 0].set_title("Training loss")
    if with_gain:
        draw_composite(axes[0, 1], with_gain, "backward", colour)
        axes[0, 1].set_title("Composite Amax gain, backward")
        extra += [style.dash("gain, max", "-"), style.dash("gain, min", "--")]
    style.legend(fig, _of(runs, colour), extra)
    return Picture("overview", style.png(fig), "Training loss and composite gain over tokens")


def _draw_depth(axes: Axes, record: Stability, name: str, colour: str) -> None:
    depth = np.arange(len(record.sublayers), dtype=np.float64)
    high, low = record.lists[f"{name}_max"], record.lists[f"{name}_min"]
    axes.fill_between(depth, low, high, color=colour, alpha=0.10, linewidth=0)
    _draw_line(axes, depth, high, "-", colour)
    _draw_line(axes, depth, low, "--", colour)


def _draw_error(axes: Axes, run: Run, name: str, colour: str) -> None:
    """A sublayer without the number does not count; a measurement without any is left out."""
    known = [r for r in run.stability if np.isfinite(r.lists[name]).any()]
    tokens = np.array([record.tokens for record in known])
    for reduce, line in ((np.nanmax, "-"), (np.nanmedian, "--")):
        errors = np.array([reduce(record.lists[name]) for record in known])
        _draw_line(axes, tokens, np.maximum(errors, ERROR_FLOOR), line, colour)


def _draw_line(axes: Axes, x: Array, y: Array, line: str, colour: str) -> None:
    marker = "o" if len(x) <= 40 else ""
    width = 1.6 if line == "-" else 1.2
    axes.plot(x, y, line, color=colour, linewidth=width, marker=marker, markersize=2.6)


def _scale_together(panels: Sequence[Axes]) -> None:
    """One scale for panels that share their y axis."""
    values = [data for panel in panels for data in _drawn(panel)]
    for panel in panels:
        style.scale_gain(panel, values)


def _drawn(axes: Axes) -> list[Array]:
    """The data of the curves drawn so far (a reference line has only its two ends)."""
    return [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()]


def _name_sublayers(axes: Axes, names: Sequence[str]) -> None:
    if len(names) <= NAMED_SUBLAYERS:
        axes.set_xticks(range(len(names)), names, rotation=60 if len(names) > 6 else 0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("sublayer k, from the embedding upwards")


def _of(runs: Sequence[Run], colour: Colours) -> dict[str, str]:
    return {run.label: colour[run.label] for run in runs}
