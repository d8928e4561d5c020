"""Reading run folders: metrics.jsonl (see ``mhc_megatron/metrics.py``) as arrays over iterations.

A metrics file is written by a process that can be killed, and read by people who want to see what
is there: a line that cannot be used is left out, counted and named; only a folder that holds
nothing usable is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

METRICS_FILE = "metrics.jsonl"
TRAIN_COLUMNS = (
    "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s", "tflops", "mfu", "memory_gib"
)  # fmt: skip
VALID_COLUMNS = ("loss",)
STABILITY_LISTS = (
    "forward_max", "forward_min", "backward_max", "backward_min",
    "composite_forward_max", "composite_forward_min",
    "composite_backward_max", "composite_backward_min",
    "row_error", "column_error",
)  # fmt: skip


class ReportError(Exception):
    """Something the user can mend, in one sentence."""


@dataclass(frozen=True)
class Table:
    """Records of one kind in the order of their iterations; a number that is missing is NaN."""

    iteration: NDArray[np.int64]
    tokens: Array
    columns: dict[str, Array]

    def __len__(self) -> int:
        return len(self.iteration)

    def __getitem__(self, column: str) -> Array:
        return self.columns[column]


@dataclass(frozen=True)
class Stability:
    """One measurement of H_res: an array over sublayers for each name of STABILITY_LISTS."""

    iteration: int
    tokens: float
    sublayers: tuple[str, ...]
    lists: dict[str, Array]


@dataclass
class Run:
    """What the report knows of one run. ``label`` is its name, made unique among the runs."""

    folder: Path
    start: dict[str, Any]
    train: Table
    valid: Table
    stability: list[Stability]
    notes: list[str]
    label: str = ""

    def __post_init__(self) -> None:
        self.label = self.label or self.name

    @property
    def name(self) -> str:
        return printable(self.start.get("name") or self.folder.name)

    @property
    def mhc(self) -> dict[str, Any]:
        return _mapping(self.start.get("mhc"))

    @property
    def config(self) -> dict[str, Any]:
        return _mapping(self.start.get("config"))

    @property
    def variant(self) -> str:
        """``none`` for the plain residual; ``?`` where the file does not say."""
        if "mhc" not in self.start:
            return "?"
        return printable(self.mhc.get("variant") or "none")

    @property
    def tokens(self) -> float | None:
        """Tokens consumed by the last record of any kind."""
        ends = [t.tokens[-1] for t in (self.train, self.valid) if len(t)]
        ends += [record.tokens for record in self.stability[-1:]]
        return float(max(ends)) if ends else None

    def number(self, key: str) -> float | None:
        """A number of the start record, None where it is missing or not finite."""
        value = _number(self.start.get(key))
        return value if math.isfinite(value) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, in order, each folder once, with unique labels.

    Raises:
        ReportError: a folder is missing or holds nothing usable.
    """
    unique: dict[Path, Path] = {}
    for folder in folders:
        unique.setdefault(folder.resolve(), folder)
    runs = [read_run(folder) for folder in unique.values()]
    _label(runs)
    return runs


def read_run(folder: Path) -> Run:
    """The run of one folder.

    Raises:
        ReportError: the folder or its metrics file is missing, unreadable, or without a record of
            training, validation or stability.
    """
    path = folder / METRICS_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        lack = f"has no {METRICS_FILE}" if folder.exists() else "does not exist"
        raise ReportError(f"{folder} {lack}; give the folder of a run") from None
    except NotADirectoryError:
        raise ReportError(f"{folder} is not a folder; give the folder of a run") from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    reader = _Reader()
    reader.read(data)
    if not any(reader.records.values()):
        raise ReportError(f"{path} has no usable record of training, validation or stability")
    return reader.run(folder)


def printable(text: object) -> str:
    """``text`` in one line without control characters, for a plot or a page."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


@dataclass
class _Reader:
    """The state of reading one file: records by kind and iteration, and what went wrong."""

    start: dict[str, Any] = field(default_factory=dict)
    records: dict[str, dict[int, dict[str, Any]]] = field(
        default_factory=lambda: {"train": {}, "valid": {}, "stability": {}}
    )
    resumed_at: list[int] = field(default_factory=list)
    superseded: int = 0
    bad_lines: list[int] = field(default_factory=list)
    half_written: bool = False

    def read(self, data: bytes) -> None:
        """Take in the whole file."""
        lines = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                self.take(_parse(line))
            except (ValueError, RecursionError):
                if number == len(lines):  # nothing after it, not even its newline
                    self.half_written = True
                else:
                    self.bad_lines.append(number)

    def take(self, record: dict[str, Any]) -> None:
        """File one record; raises ValueError where a known event lacks what it must have."""
        event = record.get("event")
        if event == "start":
            self.start = record
        elif event == "resume":
            iteration = _iteration(record)
            self.resumed_at.append(iteration)
            for kind in self.records:
                self.cut(kind, iteration + 1)
        elif event in self.records:
            clean = _stability(record) if event == "stability" else _scalars(record, event)
            self.cut(event, clean["iteration"])
            self.records[event][clean["iteration"]] = clean

    def cut(self, kind: str, iteration: int) -> None:
        """Void the records from this iteration on: the run went back and does them again.

        Iterations are in rising order in a dict that is only ever cut and appended to.
        """
        records = self.records[kind]
        while records and next(reversed(records)) >= iteration:
            records.popitem()
            self.superseded += 1

    def run(self, folder: Path) -> Run:
        stability = [
            Stability(r["iteration"], r["consumed_tokens"], r["sublayers"], r["lists"])
            for r in self.records["stability"].values()
        ]
        return Run(
            folder=folder,
            start=self.start,
            train=_table(self.records["train"], TRAIN_COLUMNS),
            valid=_table(self.records["valid"], VALID_COLUMNS),
            stability=stability,
            notes=self.notes(),
        )

    def notes(self) -> list[str]:
        """Sentences on what a reader of the report should know about the file."""
        notes: list[str] = []
        if not self.start:
            notes.append("No start record: name, variant and configuration are not known.")
        if self.resumed_at:
            places = ", ".join(str(i) for i in self.resumed_at)
            notes.append(f"Resumed after iteration {places}.")
        if self.superseded:
            notes.append(
                f"{_count(self.superseded, 'record')} of iterations that were run again "
                "left out: the last one counts."
            )
        if self.bad_lines:
            places = ", ".join(str(n) for n in self.bad_lines[:10])
            more = ", …" if len(self.bad_lines) > 10 else ""
            notes.append(
                f"{_count(len(self.bad_lines), 'corrupted line')} of {METRICS_FILE} "
                f"left out (line {places}{more})."
            )
        if self.half_written:
            notes.append("The last line is half-written (the run was killed, or is writing it): "
                         "left out.")  # fmt: skip
        losses = self.records["train"].values()
        bad = [r["iteration"] for r in losses if not math.isfinite(r["loss"])]
        if bad:
            notes.append(
                f"The loss is not finite in {_count(len(bad), 'record')}, "
                f"first at iteration {bad[0]}."
            )
        return notes


def _parse(line: bytes) -> dict[str, Any]:
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def _iteration(record: dict[str, Any]) -> int:
    value = record.get("iteration")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError("no iteration")
    return value


def _number(value: Any) -> float:
    """A JSON number as a float; null, missing and not a number are NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _scalars(record: dict[str, Any], event: str) -> dict[str, Any]:
    """The numbers of a train or valid record; it must have an iteration, tokens and a loss key."""
    columns = TRAIN_COLUMNS if event == "train" else VALID_COLUMNS
    tokens = _number(record.get("consumed_tokens"))
    if "loss" not in record or not math.isfinite(tokens):
        raise ValueError("no loss or no tokens")
    numbers = {column: _number(record.get(column)) for column in columns}
    return {"iteration": _iteration(record), "consumed_tokens": tokens, **numbers}


def _stability(record: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a stability record; a list that is absent is NaN throughout."""
    sublayers, tokens = record.get("sublayers"), _number(record.get("consumed_tokens"))
    if not isinstance(sublayers, list) or not sublayers or not math.isfinite(tokens):
        raise ValueError("no sublayers or no tokens")
    lists: dict[str, Array] = {}
    for name in STABILITY_LISTS:
        values = record.get(name) or [None] * len(sublayers)
        if not isinstance(values, list) or len(values) != len(sublayers):
            raise ValueError(f"{name} does not match the sublayers")
        lists[name] = np.array([_number(value) for value in values])
    return {
        "iteration": _iteration(record),
        "consumed_tokens": tokens,
        "sublayers": tuple(printable(s) for s in sublayers),
        "lists": lists,
    }


def _table(records: dict[int, dict[str, Any]], columns: Sequence[str]) -> Table:
    rows = list(records.values())
    return Table(
        iteration=np.array([r["iteration"] for r in rows], dtype=np.int64),
        tokens=np.array([r["consumed_tokens"] for r in rows], dtype=np.float64),
        columns={c: np.array([r[c] for r in rows], dtype=np.float64) for c in columns},
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _label(runs: Sequence[Run]) -> None:
    """Tell runs of the same name apart by the end of their folders' paths."""
    for name in {run.name for run in runs}:
        same = [run for run in runs if run.name == name]
        paths = [run.folder.resolve().parts for run in same]
        depth = 1
        while len({path[-depth:] for path in paths}) < len(paths):
            depth += 1
        for run, path in zip(same, paths):
            tail = printable("/".join(path[-depth:]))
            run.label = f"{name} ({tail})" if len(same) > 1 else name
