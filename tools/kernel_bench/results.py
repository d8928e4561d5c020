"""What a run found: the records, and their table, JSON and plot."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .accuracy import Saved
from .case import PARTS, SUBLAYERS, Case
from .timing import Times

FILES = ("bench_kernels.txt", "bench_kernels.json", "bench_kernels.png")


@dataclass
class ColumnResult:
    """One implementation at one shape."""

    name: str
    version: str = ""
    note: str = ""
    #: Why the column takes no part, in words.
    absent: str | None = None
    times: dict[str, Times] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    saved: Saved | None = None
    #: What was tried and failed -> the reason.
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def worst_error(self) -> tuple[str, float] | None:
        """The largest error of one operation (the chain adds up eight sublayers': left out)."""
        single = {key: value for key, value in self.errors.items() if not key.startswith("chain.")}
        if not single:
            return None
        key = max(single, key=lambda key: math.inf if math.isnan(single[key]) else single[key])
        return key, single[key]


@dataclass
class ShapeResult:
    """All columns at one shape."""

    case: Case
    #: Copy bandwidth in bytes a millisecond, of the same rounds; None without a GPU.
    copy: float | None
    #: Milliseconds of a graph with one tiny kernel; None without a GPU.
    empty_graph: float | None
    columns: list[ColumnResult]

    def floor(self, part: str) -> float | None:
        """Milliseconds that ``part`` takes at the copy bandwidth."""
        return self.case.floor_bytes(part) / self.copy if self.copy else None

    def gb_s(self, column: ColumnResult, part: str) -> float:
        """The bytes ``part`` must move over the time it took (not those it happens to move)."""
        return self.case.floor_bytes(part) / column.times[part].median / 1e6

    def of_floor(self, column: ColumnResult, part: str) -> float | None:
        """floor / time: 1 is the floor."""
        floor = self.floor(part)
        return floor / column.times[part].median if floor else None


@dataclass
class Run:
    """A run of the bench: ``header`` says with what, where, when and how it was measured."""

    header: dict[str, str]
    shapes: list[ShapeResult] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(column.failed for shape in self.shapes for column in shape.columns)


def table(run: Run) -> str:
    """The whole run as text."""
    blocks = ["\n".join(f"{key}: {value}" for key, value in run.header.items())]
    blocks += [_shape_table(shape) for shape in run.shapes]
    return "\n\n".join(blocks) + "\n"


def write(run: Run, out: Path) -> list[Path]:
    """Table, JSON and plot into ``out``; each file appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / name for name in FILES]
    contents = (
        lambda path: path.write_text(table(run)),
        lambda path: path.write_text(json.dumps(as_json(run), indent=1, allow_nan=False) + "\n"),
        lambda path: plot(run, path),
    )
    for path, make in zip(paths, contents, strict=True):
        partial = path.with_name(f".{path.name}.partial{path.suffix}")
        make(partial)
        os.replace(partial, path)
    return paths


def as_json(run: Run) -> dict[str, Any]:
    """The run as JSON values; an error that is not finite becomes the string nan or inf."""
    return {
        **run.header,
        "sublayers of the chain": SUBLAYERS,
        "shapes": [
            {
                **asdict(shape.case),
                "copy_gb_s": shape.copy and shape.copy / 1e6,
                "empty_graph_ms": shape.empty_graph,
                "floor_ms": {part: shape.floor(part) for part in PARTS},
                "columns": {column.name: _column_json(shape, column) for column in shape.columns},
            }
            for shape in run.shapes
        ],
    }


def _column_json(shape: ShapeResult, column: ColumnResult) -> dict[str, Any]:
    if column.absent is not None:
        return {"absent": column.absent}
    return {
        "version": column.version,
        "note": column.note,
        "ms": {
            part: {
                **times.as_dict(),
                "gb_s": shape.gb_s(column, part),
                "of_floor": shape.of_floor(column, part),
            }
            for part, times in column.times.items()
        },
        "errors": {
            key: value if math.isfinite(value) else str(value)
            for key, value in column.errors.items()
        },
        "saved_bytes": column.saved and column.saved.as_dict(),
        "failed": column.failed,
    }


def _shape_table(shape: ShapeResult) -> str:
    case = shape.case
    lines = [f"T {case.T}, C {case.C}, n {case.n}, {case.dtype}, {case.variant}"]
    if shape.copy is not None:
        lines[0] += (
            f"; copy kernel {shape.copy / 1e9:.2f} TB/s, floor of the chain "
            f"{shape.floor('chain'):.3f} ms; an empty graph {shape.empty_graph:.4f} ms"
        )
    present = [column for column in shape.columns if column.absent is None]
    lines += align(_summary_rows(shape, present))
    lines += ["", "parts, ms (of their own floor)"]
    lines += align(_part_rows(shape, present))
    lines += ["", "relative Frobenius errors against float64"]
    lines += align(_error_rows(present))
    for column in shape.columns:
        if column.note:
            lines.append(f"note: {column.name}: {column.note}")
        if column.absent is not None:
            lines.append(f"absent: {column.name}: {column.absent}")
        lines += [f"failed: {column.name}, {what}: {why}" for what, why in column.failed.items()]
    return "\n".join(lines)


def _summary_rows(shape: ShapeResult, columns: list[ColumnResult]) -> list[list[str]]:
    head = ["column", "version", "chain ms", "spread", "GB/s", "of floor"]
    rows = [[*head, "saved B", "beyond x,y", "allocated B", "worst error"]]
    for column in columns:
        row = [column.name, column.version, "-", "-", "-", "-"]
        if "chain" in column.times:
            times = column.times["chain"]
            row[2:] = [f"{times.median:.4f}", f"{100 * times.spread:.1f} %"]
            row += [f"{shape.gb_s(column, 'chain'):.0f}", _percent(shape.of_floor(column, "chain"))]
        saved = column.saved
        row += [
            f"{saved.total:.0f}" if saved else "-",
            f"{saved.beyond_x_y:.0f}" if saved else "-",
            f"{saved.allocated:.0f}" if saved and saved.allocated is not None else "-",
        ]
        worst = column.worst_error
        rows.append([*row, f"{worst[1]:.1e} {worst[0]}" if worst else "-"])
    return rows


def _part_rows(shape: ShapeResult, columns: list[ColumnResult]) -> list[list[str]]:
    parts = [part for part in PARTS if part != "chain"]
    rows = [["column", *(part.replace("_fwd", " fwd").replace("_bwd", " bwd") for part in parts)]]
    for column in columns:
        row = [column.name]
        for part in parts:
            cell = "-"
            if part in column.times:
                cell = f"{column.times[part].median:.4f}"
                share = shape.of_floor(column, part)
                cell += f" ({_percent(share)})" if share is not None else ""
            row.append(cell)
        rows.append(row)
    return rows


def _error_rows(columns: list[ColumnResult]) -> list[list[str]]:
    measured = [column for column in columns if column.errors]
    names = dict.fromkeys(name for column in measured for name in column.errors)
    rows = [["", *(column.name for column in measured)]]
    for name in names:
        cells = [column.errors.get(name) for column in measured]
        rows.append([name, *("-" if cell is None else f"{cell:.1e}" for cell in cells)])
    return rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def align(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


#: Line colours, from Okabe and Ito's palette (told apart by colour-blind readers).
_COLOURS = {
    "ours": "#d55e00",
    "te": "#0072b2",
    "tile": "#009e73",
    "liger": "#cc79a7",
    "compile": "#e69f00",
    "reference": "#777777",
}
_LABELS = {
    "ours": "mhc_kernels",
    "te": "Transformer Engine",
    "tile": "TileKernels",
    "liger": "Liger-Kernel",
    "compile": "torch.compile",
    "reference": "eager",
}
#: Factor between the outer shapes and the edges of the plot.
_MARGIN = 1.2
_FLOOR = "floor: bytes the fused boundary must move / copy bandwidth"


def plot(run: Run, path: Path) -> None:
    """Time of one sublayer over T x C, floor drawn in, and the same as multiples of the floor."""
    from matplotlib.figure import Figure

    shapes = sorted(run.shapes, key=lambda shape: (shape.case.T * shape.case.C, shape.case.T))
    with_floor = bool(shapes) and all(shape.copy for shape in shapes)
    figure = Figure(figsize=(12 if with_floor else 7, 5.6), layout="constrained")
    axes = figure.subplots(1, 2 if with_floor else 1, squeeze=False)[0]
    _draw(axes[0], shapes, relative=False)
    axes[0].set_ylabel("ms per sublayer, forward + backward")
    if with_floor:
        _draw(axes[1], shapes, relative=True)
        axes[1].set_ylabel("time / floor")
    first = shapes[0].case
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    figure.suptitle(
        f"One mHC sublayer in a chain of {SUBLAYERS}: n = {first.n}, {first.dtype}, "
        f"{first.variant}; {run.header.get('device', '')}"
    )
    figure.savefig(path, dpi=150, format="png")


def _draw(axis: Any, shapes: list[ShapeResult], relative: bool) -> None:
    sizes = [shape.case.T * shape.case.C for shape in shapes]
    if all(shape.copy for shape in shapes):
        floors = [1.0 if relative else shape.floor("chain") for shape in shapes]
        # On to the edges of the plot: the floor is proportional to T x C.
        edges = (1.0, 1.0) if relative else (1 / _MARGIN, _MARGIN)
        floors = [edges[0] * floors[0], *floors, edges[1] * floors[-1]]
        wide = [sizes[0] / _MARGIN, *sizes, sizes[-1] * _MARGIN]
        axis.plot(wide, floors, "k--", linewidth=1.5, label=_FLOOR)
    names = dict.fromkeys(column.name for shape in shapes for column in shape.columns)
    for name in names:
        points = [_point(shape, name, relative) for shape in shapes]
        if any(not math.isnan(point) for point in points):
            colour, label = _COLOURS.get(name), _LABELS.get(name, name)
            width = 2.4 if name == "ours" else 1.5
            axis.plot(sizes, points, "o-", color=colour, label=label, linewidth=width, markersize=5)
    _log_axes(axis, shapes, sizes)


def _log_axes(axis: Any, shapes: list[ShapeResult], sizes: list[int]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(sizes[0] / _MARGIN, sizes[-1] * _MARGIN)
    axis.minorticks_off()
    labels = [f"{shape.case.T}x{shape.case.C}" for shape in shapes]
    axis.set_xticks(sizes, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    low, high = axis.get_ylim()
    ticks = [
        digit * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in (1, 2, 5)
    ]
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("tokens T x channels C, spaced by their product")
    axis.grid(True, alpha=0.3)


def _point(shape: ShapeResult, name: str, relative: bool) -> float:
    for column in shape.columns:
        if column.name == name and "chain" in column.times:
            time = column.times["chain"].median
            floor = shape.floor("chain")
            return time / floor if relative and floor else time
    return math.nan
