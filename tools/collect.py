#!/usr/bin/env python
"""One table and one plot of many training runs: what each layout gives, what mHC costs.

    tools/collect.py runs/layouts-27b --out runs/layouts-27b/report
    tools/collect.py slurm-1234.out slurm-1240.out --gpu H100 --json

Reads, at or below the given paths: folders of launch/pretrain.py (metrics.jsonl), reports of
tools/bench_training.py (JSON), and the log of any Megatron run (the lines "iteration ... elapsed
time per iteration (ms) ..."; the arguments printed at its start tell the layout). Per run: step
time, its spread, tokens/s/GPU, model TFLOP/s/GPU, MFU, peak memory, overhead over the same layout
with plain residuals (or over --baseline), scaling efficiency, imbalance between ranks (with
Megatron's timing-log-level: 2). --out gets collect.md, collect.csv, collect.json and collect.png.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
for _path in (str(_ROOT), str(_ROOT / "tools")):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from collecting.compare import Row, as_json, compare  # noqa: E402
from collecting.sources import CollectError, find  # noqa: E402

from mhc_megatron.errors import quiet_pipe  # noqa: E402
from mhc_megatron.hardware import peak_tflops  # noqa: E402


def _percent(value: float) -> str:
    return f"{value:+.1%}"


#: Heading -> (field of Row, how it is written).
COLUMNS: dict[str, tuple[str, Callable[..., str]]] = {
    "run": ("name", str),
    "variant": ("variant", str),
    "GPUs": ("gpus", str),
    "layout": ("layout", str),
    "step, ms": ("step_ms", "{:.1f}".format),
    "jitter": ("jitter", _percent),
    "tokens/s/GPU": ("tokens_per_s", "{:,.0f}".format),
    "TFLOP/s/GPU": ("tflops", "{:.3g}".format),
    "MFU": ("mfu", "{:.1%}".format),
    "GiB": ("memory_gib", "{:.1f}".format),
    "overhead": ("overhead", _percent),
    "scaling": ("scaling", "{:.1%}".format),
    "imbalance": ("imbalance", _percent),
    "loss": ("loss", "{:.4f}".format),
}


@quiet_pipe
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    notes: list[str] = []
    try:
        sources = find(options.paths, notes)
        for note in notes:
            print(f"collect.py: {note}", file=sys.stderr)
        if not sources:
            raise CollectError("no run with a step in it was found there")
        peak = peak_tflops(options.gpu, fp8=options.fp8) if options.gpu else None
        if options.gpu and peak is None:
            raise CollectError(f"--gpu {options.gpu}: its peak is not known")
        if options.baseline and options.baseline not in [source.name for source in sources]:
            raise CollectError(f"--baseline {options.baseline}: there is no run of that name")
        rows = compare(sources, peak, options.baseline)
        if options.out:
            _write(options.out, rows)
        print(json.dumps(as_json(rows), indent=1) if options.json else table(rows), end="\n")
    except CollectError as error:
        print(f"collect.py: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--out", type=Path, metavar="DIR", help="table, CSV, JSON and plot go here")
    parser.add_argument("--baseline", metavar="RUN", help="compare with this run, by its name")
    parser.add_argument("--gpu", help="for logs that do not name it: H100, H800, H200 ...")
    parser.add_argument("--fp8", action="store_true", help="with --gpu: its peak at fp8")
    parser.add_argument("--json", action="store_true", help="print JSON, not the table")
    return parser


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; columns that no run fills are left out."""
    filled = {
        heading: [_cell(row, *how) for row in rows]
        for heading, how in COLUMNS.items()
        if any(getattr(row, how[0]) is not None for row in rows)
    }
    widths = {heading: max(map(len, [heading, *cells])) for heading, cells in filled.items()}
    lines = [" | ".join(h.ljust(widths[h]) for h in filled)]
    lines.append(" | ".join("-" * widths[h] for h in filled))
    for i in range(len(rows)):
        lines.append(" | ".join(cells[i].ljust(widths[h]) for h, cells in filled.items()))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(row: Row, key: str, write: Callable[..., str]) -> str:
    value = getattr(row, key)
    return "–" if value is None else write(value)


def _write(out: Path, rows: Sequence[Row]) -> None:
    records = as_json(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    files = {
        "collect.md": (table(rows) + "\n").encode(),
        "collect.csv": text.getvalue().encode(),
        "collect.json": (json.dumps(records, indent=1) + "\n").encode(),
        "collect.png": plot(rows),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (out / f".{name}.new").write_bytes(data)
            os.replace(out / f".{name}.new", out / name)
    except OSError as error:
        raise CollectError(f"cannot write to {out}: {error.strerror}") from None


def plot(rows: Sequence[Row]) -> bytes:
    """Bars of MFU (of tokens/s/GPU where no peak is known), plain residuals in grey."""
    from reporting import style

    by_mfu = all(row.mfu is not None for row in rows)
    values = [(row.mfu if by_mfu else row.tokens_per_s) or 0.0 for row in rows]
    with style.drawing():
        fig, axes = style.figure(height=1.0 + 0.3 * len(rows))
        panel = axes[0, 0]
        colours = [style.RESIDUAL if row.variant == "none" else style.COLOURS[0] for row in rows]
        panel.barh(range(len(rows)), values, color=colours)
        panel.set_yticks(range(len(rows)), [_short(row) for row in rows])
        panel.invert_yaxis()
        panel.set_xlabel("MFU" if by_mfu else "tokens/s/GPU")
        panel.grid(axis="y", visible=False)
        for i, (row, value) in enumerate(zip(rows, values)):
            said = f"{value:.1%}" if by_mfu else f"{value:,.0f}"
            if row.overhead is not None:
                said += f"  (step {row.overhead:+.1%})"
            panel.annotate(said, (value, i), (4, 0), textcoords="offset points", va="center")
        panel.margins(x=0.2)
        return style.png(fig)


def _short(row: Row) -> str:
    return f"{row.name}, {row.gpus} x {row.layout}".replace("$", r"\$")[:60]


if __name__ == "__main__":
    sys.exit(main())
