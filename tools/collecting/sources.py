"""Runs to compare: from our metrics.jsonl, from the bench's JSON, from any Megatron log."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Megatron's argument -> what the table calls it.
LAYOUT = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
}
#: What must agree between two runs that are compared, besides the layout.
MODEL = (
    "num_layers", "hidden_size", "num_attention_heads", "num_experts", "seq_length",
    "micro_batch_size", "global_batch_size", "bf16", "fp8", "recompute_granularity",
)  # fmt: skip

_STEP = re.compile(r"iteration\s+(\d+)/\s*\d+ \|(.*)")
_FIELDS = {
    "ms": re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)"),
    "tflops": re.compile(r"throughput per GPU \(TFLOP/s/GPU\): ([\d.]+)"),
    "batch": re.compile(r"global batch size:\s*(\d+)"),
    "loss": re.compile(r"lm loss: ([\d.E+-]+|nan|inf)"),
}
_ARGUMENT = re.compile(r"(?:^|\s)([a-z][a-z0-9_]+) \.{2,} (\S.*)$")
_MEMORY = re.compile(r"memory \(([MG])B\).*\bmax allocated: ([\d.]+)")
_TIMES = re.compile(r"^\s*([\w-]+) \.{2,}: \(([\d.]+), ([\d.]+)\)")
#: Timers of a rank's own work, without waiting for others: what tells a slow rank.
_OWN_WORK = ("forward-compute", "backward-compute", "optimizer-inner-step", "batch-generator")


@dataclass
class Source:
    """One run.

    Attributes:
        name: the folder's or the file's.
        path: where it was read.
        config: Megatron's arguments, as far as the run tells them.
        variant: of the connections; ``none`` for plain residuals, None where unknown (a log).
        gpus: ranks.
        steps: (iteration, seconds, TFLOP/s/GPU or None, loss or None), in order.
        tokens: a step, all ranks together; None where unknown.
        peak_tflops: of the GPU at the run's precision, None where unknown.
        memory_gib: largest peak of a GPU that was reported.
        imbalance: slowest over fastest rank, minus 1, of the timers of own work; None without
            ``timing-log-level`` 1 or 2.
    """

    name: str
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    variant: str | None = None
    gpus: int | None = None
    steps: list[tuple[int, float, float | None, float | None]] = field(default_factory=list)
    tokens: float | None = None
    peak_tflops: float | None = None
    memory_gib: float | None = None
    imbalance: float | None = None


def find(paths: Sequence[Path], notes: list[str] | None = None) -> list[Source]:
    """Every run at or below ``paths``, in the order of their names.

    What cannot be used is left out; ``notes`` gets a sentence on it.

    Raises:
        CollectError: a path does not exist, or cannot be read.
    """
    notes = [] if notes is None else notes
    found: list[Source] = []
    for path in paths:
        if not path.exists():
            raise CollectError(f"{path} does not exist")
        try:
            found += _in(path, notes)
        except OSError as error:
            raise CollectError(f"cannot read {error.filename or path}: {error.strerror}") from None
    for source in found:
        if source.tokens is None:
            length = _positive(source.config.get("seq_length"))
            batch = _positive(source.config.get("global_batch_size"))
            source.tokens = length * batch if length and batch else None
    names = [source.name for source in found]
    for source in found:
        if names.count(source.name) > 1:
            source.name = f"{source.path.resolve().parent.name}/{source.name}"
    return found


class CollectError(Exception):
    """Something the user can mend, in one sentence."""


def _in(path: Path, notes: list[str]) -> Iterator[Source]:
    if path.is_file():
        bench = path.suffix == ".json"
        yield from (_bench(path, notes) if bench else _logs(path.stem, [path], notes))
        return
    if (path / "metrics.jsonl").exists():
        yield from _metrics(path, notes)
        return
    reports = [p for p in sorted(path.glob("*.json")) if _is_bench(p)]
    if reports:
        for report in reports:
            yield from _bench(report, notes)
        return
    logs = sorted(p for p in path.iterdir() if p.suffix in (".log", ".out", ".txt") and p.is_file())
    read = list(_logs(path.name, logs, notes)) if logs else []
    yield from read
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("iter_"):
            yield from _in(child, notes)


def _number(value: Any) -> float | None:
    """A number of a file as a float; what is none is None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # hundreds of digits
        return None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 < number < math.inf else None


def _ranks(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _note(notes: list[str], path: Path, lines: Sequence[int]) -> None:
    """Name the lines of a file that were left out, as tools/report.py does."""
    if lines:
        places = ", ".join(map(str, lines[:10])) + (", …" if len(lines) > 10 else "")
        count = "1 corrupted line" if len(lines) == 1 else f"{len(lines)} corrupted lines"
        notes.append(f"{path}: {count} left out (line {places})")


# ------------------------------------------------------------------------------- our own runs


def _metrics(folder: Path, notes: list[str]) -> Iterator[Source]:
    source, path, bad = Source(folder.name, folder), folder / "metrics.jsonl", []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            _take(source, json.loads(line))
        except (ValueError, RecursionError):
            bad.append(number)
    _note(notes, path, bad)
    for log in sorted((folder / "logs").glob("rank-*.log")):
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
        source.imbalance = _largest(source.imbalance, _imbalance(text))
    if source.steps:
        yield source


def _take(source: Source, record: Any) -> None:
    """One record of metrics.jsonl; ValueError where it lacks what a step must have."""
    if not isinstance(record, dict):
        raise ValueError("not an object")
    event = record.get("event")
    if event == "start":
        source.config = _mapping(record.get("config"))
        variant = _mapping(record.get("mhc")).get("variant")
        source.variant = variant if isinstance(variant, str) else None
        source.gpus = _ranks(record.get("world_size"))
        source.peak_tflops = _positive(record.get("peak_tflops"))
    if event not in ("resume", "train"):
        return
    iteration, seconds = record.get("iteration"), _positive(record.get("step_time_s"))
    if type(iteration) is not int or (event == "train" and seconds is None):
        raise ValueError("no iteration or no time")
    if event == "resume":
        source.steps = [step for step in source.steps if step[0] <= iteration]
        return
    numbers = _number(record.get("tflops")), _number(record.get("loss"))
    source.steps.append((iteration, seconds, *numbers))
    source.memory_gib = _largest(source.memory_gib, _number(record.get("memory_gib")))
    rate = _positive(record.get("tokens_per_s"))
    source.tokens = rate * seconds if rate else source.tokens


def _largest(a: float | None, b: float | None) -> float | None:
    return max((x for x in (a, b) if x is not None), default=None)


# --------------------------------------------------------------------------- any Megatron's log


def _logs(name: str, paths: Sequence[Path], notes: list[str]) -> Iterator[Source]:
    """One run from the files that its ranks wrote."""
    source = Source(name, paths[0])
    for path in paths:
        lines, bad = path.read_text(encoding="utf-8", errors="replace").splitlines(), []
        for number, line in enumerate(lines, start=1):
            try:
                _read_line(source, line)
            except ValueError:  # "1.2.3", or thousands of digits
                bad.append(number)
        _note(notes, path, bad)
        source.imbalance = _largest(source.imbalance, _imbalance(lines))
    if not source.steps:
        return
    source.gpus = _ranks(source.config.get("world_size"))
    yield source


def _read_line(source: Source, line: str) -> None:
    if match := _STEP.search(line):
        values = {key: found[1] for key, at in _FIELDS.items() if (found := at.search(match[2]))}
        if "ms" not in values:
            return
        iteration, seconds = int(match[1]), _positive(float(values["ms"]) / 1e3)
        if seconds is None:
            raise ValueError("a step without a time")
        source.steps = [step for step in source.steps if step[0] < iteration]
        tflops = float(values["tflops"]) if "tflops" in values else None
        loss = float(values["loss"]) if "loss" in values else None
        source.steps.append((iteration, seconds, tflops, loss))
        length = _positive(source.config.get("seq_length"))
        if length and float(values.get("batch", 0)):
            source.tokens = float(values["batch"]) * length
    elif match := _MEMORY.search(line):
        gib = float(match[2]) / (1024 if match[1] == "M" else 1)
        source.memory_gib = _largest(source.memory_gib, gib or None)
    elif match := _ARGUMENT.search(line):
        source.config.setdefault(match[1], _literal(match[2].strip()))


def _literal(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    if text == "None":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _imbalance(lines: Sequence[str]) -> float | None:
    """Median over steps of (slowest - fastest) / fastest of the ranks' own work."""
    ratios, low, high = [], 0.0, 0.0
    for line in [*lines, "time across ranks"]:
        if "time across ranks" in line:
            if low > 0:
                ratios.append(high / low - 1)
            low = high = 0.0
        elif (match := _TIMES.match(line)) and match[1] in _OWN_WORK:
            with contextlib.suppress(ValueError):  # "1.2.3"
                low, high = low + float(match[2]), high + float(match[3])
    return sorted(ratios)[len(ratios) // 2] if ratios else None


# -------------------------------------------------------------------------------------- the bench


def _is_bench(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8"))["groups"], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _bench(path: Path, notes: list[str]) -> Iterator[Source]:
    """One run for each column that tools/bench_training.py measured."""
    if not _is_bench(path):
        raise CollectError(f"{path} is not a report of tools/bench_training.py")
    report = json.loads(path.read_text(encoding="utf-8"))
    for number, group in enumerate(report["groups"], start=1):
        precision, columns = _mapping(group).get("precision"), _mapping(group).get("columns")
        if precision is None or not isinstance(columns, list):
            notes.append(f"{path}: group {number} left out: it has no precision or no columns")
            continue
        for place, column in enumerate(columns, start=1):
            column = _mapping(column)
            if column and column.get("step_ms") is None:  # was not measured
                continue
            median = _positive(_mapping(column.get("step_ms")).get("median"))
            if median is None or "label" not in column:
                notes.append(
                    f"{path}: group {number}, column {place} left out: it has no label or no median"
                )
                continue
            yield Source(
                f"{path.parent.name}: {column['label']}, {precision}",
                path,
                config={"layers": report.get("layers"), "precision": precision},
                variant=_mapping(column.get("mhc")).get("variant"),
                gpus=1,
                steps=[(1, median / 1e3, _number(column.get("model_tflops")), None)],
                tokens=_positive(column.get("tokens_per_step")),
                peak_tflops=_positive(column.get("peak_tflops")),
                memory_gib=(_positive(column.get("step_peak_bytes")) or 0) / 2**30 or None,
            )
