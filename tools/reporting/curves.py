"""Plots over training: loss, validation loss, difference to the reference, gradient, throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from reporting import style
from reporting.runs import Array, Run
from reporting.style import Picture
from reporting.summary import paired_gap, smooth

Colours = Mapping[str, str]
#: The zoomed panel begins after this share of the tokens.
ZOOM_FROM = 0.5


def loss(runs: Sequence[Run], colour: Colours) -> Picture | None:
    """Training loss over tokens, the whole run and its second half."""
    runs = [run for run in runs if np.isfinite(run.train["loss"]).any()]
    if not runs:
        return None
    fig, axes = style.figure(1, 2, width_ratios=[3, 2])
    entropies = draw_loss(axes[0, 0], runs, colour)
    axes[0, 0].set_title("Training loss")
    _draw_zoom(axes[0, 1], runs, colour)
    style.legend(fig, _of(runs, colour), entropies)
    return Picture("loss", style.png(fig), "Training loss over tokens")


def draw_loss(axes: Axes, runs: Sequence[Run], colour: Colours) -> list[Line2D]:
    """The loss of all runs with the unigram entropy; returns the legend entries of the latter."""
    curves = []
    for run in runs:
        curves.append(smooth(run.train["loss"]))
        style.plot_faint(axes, run.train.tokens, run.train["loss"], curves[-1], colour[run.label])
    levels = sorted({e for e in (run.number("unigram_entropy") for run in runs) if e is not None})
    for level in levels:
        axes.axhline(level, color="#333333", linewidth=1.1, linestyle=":")
    style.limit(axes, curves, levels)
    style.label_tokens(axes)
    axes.set_ylabel("nats per token")
    values = " / ".join(f"{level:.3f}" for level in levels)
    return [style.dash(f"unigram entropy {values}", ":")] if levels else []


def valid(runs: Sequence[Run], colour: Colours) -> Picture | None:
    """Validation loss over tokens."""
    runs = [run for run in runs if np.isfinite(run.valid["loss"]).any()]
    if not runs:
        return None
    fig, axes = style.figure(1, 2, width_ratios=[3, 2])
    for column, start in enumerate((0.0, ZOOM_FROM * _end(runs, "valid"))):
        shown = []
        for run in runs:
            keep = run.valid.tokens >= start
            shown.append(run.valid["loss"][keep])
            axes[0, column].plot(
                run.valid.tokens[keep], shown[-1], "o-", color=colour[run.label], markersize=3
            )
        style.limit(axes[0, column], shown)
        style.label_tokens(axes[0, column])
    axes[0, 0].set_ylabel("nats per token")
    axes[0, 0].set_title("Validation loss")
    axes[0, 1].set_title("Second half of the tokens")
    style.legend(fig, _of(runs, colour))
    return Picture("valid", style.png(fig), "Validation loss over tokens")


def gap(runs: Sequence[Run], reference: Run, colour: Colours) -> Picture | None:
    """Training and validation loss minus the reference run's, on the same tokens."""
    others = [run for run in runs if run is not reference]
    others = [run for run in others if len(paired_gap(run.train, reference.train)[0])]
    if not others:
        return None
    fig, axes = style.figure()
    shown = []
    for run in others:
        tokens, raw = paired_gap(run.train, reference.train)
        smoothed = smooth(raw)
        style.plot_faint(axes[0, 0], tokens, raw, smoothed, colour[run.label])
        valid_tokens, valid_gap = paired_gap(run.valid, reference.valid)
        axes[0, 0].plot(valid_tokens, valid_gap, "o", color=colour[run.label], markersize=4,
                        markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
        tail = slice(len(raw) // 20, None)  # the first steps differ most and would set the scale
        shown += [smoothed[tail], valid_gap[len(valid_gap) // 20 :]]
    axes[0, 0].axhline(0.0, color=colour[reference.label], linewidth=1.4)
    style.limit(axes[0, 0], shown, [0.0])
    style.label_tokens(axes[0, 0])
    axes[0, 0].set_ylabel("nats per token")
    axes[0, 0].set_title("Loss minus that of the reference run (below 0 is better)")
    dots = Line2D([], [], linestyle="", marker="o", markersize=4, color="#333333",
                  label="validation")  # fmt: skip
    style.legend(fig, _of([reference, *others], colour), [style.dash("training", "-"), dots])
    return Picture("gap", style.png(fig), f"Loss minus that of {reference.label}")


def gradient(runs: Sequence[Run], colour: Colours) -> Picture | None:
    """Gradient norm and learning rate."""
    runs = [run for run in runs if np.isfinite(run.train["grad_norm"]).any()]
    if not runs:
        return None
    with_rate = [run for run in runs if np.isfinite(run.train["lr"]).any()]
    fig, axes = style.figure(1, 2 if with_rate else 1)
    _draw(axes[0, 0], runs, "grad_norm", colour)
    norms = [run.train["grad_norm"] for run in runs]
    if style.spans_decades(norms):
        style.log_axis(axes[0, 0], norms)
    axes[0, 0].set_title("Gradient norm, before clipping")
    if with_rate:
        for run in with_rate:
            axes[0, 1].plot(run.train.tokens, run.train["lr"], color=colour[run.label])
        style.label_tokens(axes[0, 1])
        axes[0, 1].set_title("Learning rate")
    style.legend(fig, _of(runs, colour))
    return Picture("grad_norm", style.png(fig), "Gradient norm and learning rate over tokens")


def throughput(runs: Sequence[Run], colour: Colours) -> Picture | None:
    """Tokens a second, and MFU and memory where the runs tell them."""
    panels = {
        "tokens_per_s": "Tokens per second, all ranks",
        "mfu": "Model FLOPs utilisation",
        "memory_gib": "Peak memory of a GPU (GiB)",
    }
    known = {
        column: [run for run in runs if np.isfinite(run.train[column]).any()] for column in panels
    }
    known = {column: those for column, those in known.items() if those}
    if not known:
        return None
    fig, axes = style.figure(1, len(known), height=3.3)
    for panel, (column, those) in zip(axes[0], known.items()):
        _draw(panel, those, column, colour)
        panel.set_ylim(0, 1.08 * max(np.nanmax(run.train[column]) for run in those) or 1)
        panel.set_title(panels[column])
        formatter = PercentFormatter(1.0, decimals=0) if column == "mfu" else style.human_ticks()
        panel.yaxis.set_major_formatter(formatter)
    style.legend(fig, _of(runs, colour))
    return Picture("throughput", style.png(fig), "Throughput over tokens")


def _draw(axes: Axes, runs: Sequence[Run], column: str, colour: Colours) -> None:
    for run in runs:
        raw = run.train[column]
        style.plot_faint(axes, run.train.tokens, raw, smooth(raw), colour[run.label])
    style.label_tokens(axes)


def _draw_zoom(axes: Axes, runs: Sequence[Run], colour: Colours) -> None:
    """The second half of the tokens, where the differences are."""
    start = ZOOM_FROM * _end(runs, "train")
    shown: list[Array] = []
    for run in runs:
        keep = run.train.tokens >= start
        smoothed = smooth(run.train["loss"])
        raw = run.train["loss"][keep]
        same = smoothed is run.train["loss"]
        shown.append(smoothed[keep])
        style.plot_faint(
            axes, run.train.tokens[keep], raw, raw if same else shown[-1], colour[run.label]
        )
    style.limit(axes, shown)
    style.label_tokens(axes)
    axes.set_title("Second half of the tokens")


def _end(runs: Sequence[Run], table: str) -> float:
    return max(float(getattr(run, table).tokens[-1]) for run in runs)


def _of(runs: Sequence[Run], colour: Colours) -> dict[str, str]:
    return {run.label: colour[run.label] for run in runs}
