"""How every plot looks: colours by run, axes, legends outside the data, PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from reporting.runs import Array, Run

#: The plain residual; everything else takes the next of COLOURS.
RESIDUAL = "#595959"
#: Okabe and Ito's palette, which colour-blind readers can tell apart, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: A range of more than this factor is drawn on a logarithmic axis.
LOG_RANGE = 20.0
WIDTH_IN = 9.6
Dash = Literal["-", "--", ":"]
_DPI = 160
_LEGEND_LETTERS = 44
#: Letters in a row of the legend, its lines counted as six.
_LEGEND_ROW = 125
_RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": _DPI,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure: file name without ending, PNG bytes, what it shows in a few words."""

    name: str
    png: bytes
    alt: str


@contextmanager
def drawing() -> Iterator[None]:
    """The plots' settings, for as long as they are drawn; the user's own come back afterwards."""
    with matplotlib.rc_context(_RC):
        yield


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """One colour for each label: the first residual run grey, the others from the palette."""
    named: dict[str, str] = {}
    residual = next((run.label for run in runs if run.variant == "none"), None)
    others = [run.label for run in runs if run.label != residual]
    if residual is not None:
        named[residual] = RESIDUAL
    palette: Sequence[str] = COLOURS
    if len(others) > len(COLOURS):
        steps = np.linspace(0.0, 0.92, len(others))
        palette = [matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](s)) for s in steps]
    return named | dict(zip(others, palette))


def figure(
    rows: int = 1, columns: int = 1, height: float = 3.6, **share: Any
) -> tuple[Figure, Any]:
    """An empty figure of the page's width and its axes, always as an array [rows, columns]."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    fig = Figure(figsize=(WIDTH_IN, height), layout=layout)
    return fig, fig.subplots(rows, columns, squeeze=False, **share)


def legend(fig: Figure, entries: Mapping[str, Any], extra: Sequence[Line2D] = ()) -> None:
    """A legend above the axes: the runs by colour, then ``extra`` lines with their own labels."""
    handles = [Line2D([], [], color=colour, linewidth=2.2) for colour in entries.values()]
    names = [_short(label) for label in entries]
    handles += list(extra)
    names += [str(line.get_label()) for line in extra]
    columns = _columns(names)
    width, height = fig.get_size_inches()
    fig.set_size_inches(width, height + 0.19 * ((len(names) - 1) // columns))  # rows but the first
    fig.legend(
        handles, names, loc="outside upper left", ncols=columns, handlelength=1.8,
        columnspacing=1.6, borderaxespad=0.4,
    )  # fmt: skip


def dash(label: str, linestyle: Dash = "--") -> Line2D:
    """A legend entry for a kind of line, whatever the run."""
    return Line2D([], [], color="#333333", linestyle=linestyle, linewidth=1.4, label=label)


def plot_faint(axes: Axes, x: Array, raw: Array, smoothed: Array, colour: str) -> None:
    """A smoothed curve over the faint one it was made from; a single record is a dot."""
    if len(x) == 1:
        axes.plot(x, raw, "o", color=colour, markersize=4)
        return
    if smoothed is not raw:
        many = len(x) > 1000
        axes.plot(x, raw, color=colour, alpha=0.10 if many else 0.25, linewidth=0.7, zorder=1.5)
    axes.plot(x, smoothed, color=colour)


def label_tokens(axes: Axes) -> None:
    """The x axis counts tokens."""
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(human_ticks())


def human_ticks() -> FuncFormatter:
    """Tick labels such as 200k, 1.2M, 50B."""
    return FuncFormatter(lambda value, _: human(value, 4))


def spans_decades(values: Sequence[Array]) -> bool:
    """Whether the positive values range over more than LOG_RANGE."""
    return _ratio(values) > LOG_RANGE


def log_axis(axes: Axes, values: Sequence[Array]) -> None:
    """A logarithmic y axis with plain numbers, at 1, 2, 5 of every decade if these are few."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if _ratio(values) < 1e3 else (1.0,))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def scale_gain(axes: Axes, values: Sequence[Array]) -> None:
    """The y axis of a gain: logarithmic if its range asks for it, with 1 in sight in any case."""
    axes.axhline(1.0, color="#333333", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    if spans_decades(values):
        log_axis(axes, values)
        return
    flat = np.append(_finite(values), [0.95, 1.05])  # a rounding error must not fill the plot
    low, high = float(np.min(flat)), float(np.max(flat))
    margin = 0.06 * (high - low)
    axes.set_ylim(max(0.0, low - margin), high + margin)


def limit(axes: Axes, values: Sequence[Array], include: Sequence[float] = ()) -> None:
    """y limits around the finite values, ``include`` among them, with a small margin."""
    flat = np.append(_finite(values), include)
    if len(flat):
        low, high = float(np.min(flat)), float(np.max(flat))
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
        axes.set_ylim(low - margin, high + margin)


def png(fig: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    return buffer.getvalue()


def human(value: float | None, digits: int = 3) -> str:
    """1234567 as 1.23M; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    for limit_, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit_ * (1 - 0.5 * 10**-digits):
            return f"{value / limit_:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def _ratio(values: Sequence[Array]) -> float:
    """The largest of the positive values over the smallest; 1 if there is none."""
    flat = _finite(values)
    flat = flat[flat > 0]
    return float(np.max(flat) / np.min(flat)) if len(flat) else 1.0


def _finite(values: Sequence[Array]) -> Array:
    flat = np.concatenate([np.ravel(v) for v in values]) if len(values) else np.array([])
    return flat[np.isfinite(flat)]


def _columns(names: Sequence[str]) -> int:
    """Columns of a legend: all in one row if they fit, else of the longest name's width."""
    letters = [len(name) + 6 for name in names]
    if sum(letters) <= _LEGEND_ROW:
        return max(1, len(names))
    return max(1, min(len(names), _LEGEND_ROW // max(letters)))


def _short(label: str) -> str:
    """A label that fits the legend and is not read as mathematics.

    Matplotlib leaves out those that begin with an underscore.
    """
    if len(label) > _LEGEND_LETTERS:
        label = label[: _LEGEND_LETTERS - 1] + "…"
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label
