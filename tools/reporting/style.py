"""How every plot looks: colours by run, axes, legends outside the data, PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from reporting.runs import Array, Run

#: The plain residual; everything else takes the next of COLOURS.
RESIDUAL = "#595959"
#: Okabe and Ito's palette, which colour-blind readers can tell apart, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: A range of more than this factor is drawn on a logarithmic axis.
LOG_RANGE = 20.0
WIDTH_IN = 9.6
_DPI = 160
_LEGEND_LETTERS = 44
_RC: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # a run may be called $x
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
        palette = [matplotlib.colors.to_hex(matplotlib.colormaps["cividis"](s)) for s in steps]
    return named | dict(zip(others, palette))


def figure(rows: int = 1, columns: int = 1, height: float = 3.6, **share: Any) -> tuple[Figure, Any]:
    """An empty figure of the page's width and its axes, always as an array [rows, columns]."""
    fig = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return fig, fig.subplots(rows, columns, squeeze=False, **share)


def legend(fig: Figure, entries: Mapping[str, Any], extra: Sequence[Line2D] = ()) -> None:
    """A legend above the axes: the runs by colour, then ``extra`` lines with their own labels."""
    handles = [Line2D([], [], color=colour, linewidth=2.2) for colour in entries.values()]
    names = [_short(label) for label in entries]
    handles += list(extra)
    names += [str(line.get_label()) for line in extra]
    longest = max((len(name) for name in names), default=1)
    columns = max(1, min(len(names), 120 // (longest + 8)))
    fig.legend(
        handles, names, loc="outside upper left", ncols=columns, handlelength=1.8,
        columnspacing=1.6, borderaxespad=0.4,
    )  # fmt: skip


def dash(label: str, linestyle: str = "--", colour: str = "#333333") -> Line2D:
    """A legend entry for a kind of line, whatever the run."""
    return Line2D([], [], color=colour, linestyle=linestyle, linewidth=1.4, label=label)


def plot_faint(axes: Axes, x: Array, raw: Array, smoothed: Array, colour: str) -> None:
    """A smoothed curve over the faint one it was made from; a single record is a dot."""
    if len(x) == 1:
        axes.plot(x, raw, "o", color=colour, markersize=4)
        return
    if smoothed is not raw:
        axes.plot(x, raw, color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(x, smoothed, color=colour)


def label_tokens(axes: Axes) -> None:
    """The x axis counts tokens."""
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def spans_decades(values: Sequence[Array]) -> bool:
    """Whether the positive values range over more than LOG_RANGE."""
    flat = _finite(values)
    flat = flat[flat > 0]
    return len(flat) > 0 and flat.max() / flat.min() > LOG_RANGE


def scale_gain(axes: Axes, values: Sequence[Array]) -> None:
    """The y axis of a gain: logarithmic if its range asks for it, with 1 in sight in any case."""
    axes.axhline(1.0, color="#333333", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    if spans_decades(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    flat = np.append(_finite(values), 1.0)
    reach = max(1.15 * np.abs(flat - 1.0).max(), 0.05)
    low = 1.0 - (reach if flat.min() < 0.95 else 0.05)
    axes.set_ylim(max(0.0, low), 1.0 + (reach if flat.max() > 1.05 else 0.05))


def limit(axes: Axes, values: Sequence[Array], include: Sequence[float] = ()) -> None:
    """y limits around the finite values, ``include`` among them, with a small margin."""
    flat = np.append(_finite(values), include)
    if len(flat):
        margin = 0.06 * (flat.max() - flat.min()) or 0.05 * abs(flat.max()) or 0.1
        axes.set_ylim(flat.min() - margin, flat.max() + margin)


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


def _finite(values: Sequence[Array]) -> Array:
    flat = np.concatenate([np.ravel(v) for v in values]) if len(values) else np.array([])
    return flat[np.isfinite(flat)]


def _short(label: str) -> str:
    """A label that fits the legend; matplotlib leaves out those that begin with an underscore."""
    if len(label) > _LEGEND_LETTERS:
        label = label[: _LEGEND_LETTERS - 1] + "…"
    return f" {label}" if label.startswith("_") else label
