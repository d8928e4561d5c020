#!/usr/bin/env python
"""The report of one or more training runs: one HTML page that opens offline, and its PNGs.

    tools/report.py runs/residual runs/mhc --out runs/report

A run is a folder with a metrics.jsonl (``mhc_megatron/metrics.py`` writes it); it may still be
running. The first residual run among them, or else the first run, is what the others are compared
with. The output is report.html with every picture inside, and the same pictures as PNG files
beside it, overview.png among them. Exit code 2: nothing could be reported, or written; one
sentence on stderr says why.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from reporting.runs import ReportError, Run, printable, read_runs
from reporting.summary import as_json, reference_run, summarize

PAGE_FILE = "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report that the command line asks for; returns the exit code."""
    options = _parser().parse_args(arguments)
    command = shlex.join(["tools/report.py", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        runs = read_runs(options.runs)
        if options.json:
            print(as_json(summarize(runs), reference_run(runs)))
        if options.out or not options.json:
            out = options.out or options.runs[0].resolve().parent / "report"
            files = _files(runs, options.title or _title(runs), command)
            _write(out, files)
            print(out / PAGE_FILE, file=sys.stderr if options.json else sys.stdout)
        sys.stdout.flush()  # here, not when Python ends
    except ReportError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description="One HTML page and its PNGs from training runs."
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, with its metrics.jsonl"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path,
        help="folder for report.html and the PNGs; default: 'report' beside the first run's folder",
    )  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", help="heading of the page")
    parser.add_argument(
        "--json", action="store_true",
        help="print the summary table as JSON; the page is then made only if --out is given",
    )  # fmt: skip
    return parser


def _title(runs: Sequence[Run]) -> str:
    labels = " vs ".join(run.label for run in runs)
    return f"Pretraining: {labels}" if len(labels) <= 60 else f"Pretraining: {len(runs)} runs"


def _files(runs: Sequence[Run], title: str, command: str) -> dict[str, bytes]:
    """Everything the report consists of, by file name; drawn in full before anything is written."""
    from reporting import curves, gains, page, style  # matplotlib: not needed for --json

    with style.drawing(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        colour = style.colours(runs)
        drawn = [
            gains.overview(runs, colour),
            curves.loss(runs, colour),
            curves.gap(runs, reference_run(runs), colour),
            curves.valid(runs, colour),
            curves.gradient(runs, colour),
            gains.over_training(runs, colour),
            gains.over_depth(runs, colour),
            gains.sinkhorn(runs, colour),
            curves.throughput(runs, colour),
        ]
    pictures = [picture for picture in drawn if picture is not None]
    html = page.render(
        page.Page(
            title=printable(title),
            runs=runs,
            rows=summarize(runs),
            colour=colour,
            pictures=pictures,
            command=printable(command),
            time=datetime.now(UTC),
        )
    )
    files = {f"{picture.name}.png": picture.png for picture in pictures}
    return files | {PAGE_FILE: html.encode("utf-8")}


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the files into ``out``: each under a temporary name first, all renamed at the end.

    Raises:
        ReportError: ``out`` cannot be made or written; none of the files is changed then.
    """
    waiting: dict[str, Path] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in files:
            if (out / name).is_dir():
                raise ReportError(f"{out / name} is a folder; choose another --out")
            waiting[name] = _temporary(out, files[name])
        for name, temporary in waiting.items():
            os.replace(temporary, out / name)
    except OSError as error:
        raise ReportError(f"the report cannot be written to {out}: {error.strerror}") from None
    finally:
        for temporary in waiting.values():
            temporary.unlink(missing_ok=True)


def _temporary(folder: Path, data: bytes) -> Path:
    """A new file in ``folder`` with this content and the permissions of an ordinary file."""
    descriptor, name = tempfile.mkstemp(prefix=".report-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
    except OSError:
        os.unlink(name)
        raise
    return Path(name)


if __name__ == "__main__":
    sys.exit(main())
