"""Runs to compare: from our metrics.jsonl, from the bench's JSON, from any Megatron log."""

from __future__ import annotations

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


def find(paths: Sequence[Path]) -> list[Source]:
    """Every run at or below ``paths``, in the order of their names.

    Raises:
        CollectError: a path does not exist.
    """
    found: list[Source] = []
    for path in paths:
        if not path.exists():
            raise CollectError(f"{path} does not exist")
        found += _in(path)
    for source in found:
        if source.tokens is None and source.config.get("seq_length"):
            batch = source.config.get("global_batch_size")
            source.tokens = float(source.config["seq_length"] * batch) if batch else None
    names = [source.name for source in found]
    for source in found:
        if names.count(source.name) > 1:
            source.name = f"{source.path.resolve().parent.name}/{source.name}"
    return found


class CollectError(Exception):
    """Something the user can mend, in one sentence."""


def _in(path: Path) -> Iterator[Source]:
    if path.is_file():
        yield from (_bench(path) if path.suffix == ".json" else _logs(path.stem, [path]))
        return
    if (path / "metrics.jsonl").exists():
        yield from _metrics(path)
        return
    reports = [p for p in sorted(path.glob("*.json")) if _is_bench(p)]
    if reports:
        for report in reports:
            yield from _bench(report)
        return
    logs = sorted(p for p in path.iterdir() if p.suffix in (".log", ".out", ".txt") and p.is_file())
    read = list(_logs(path.name, logs)) if logs else []
    yield from read
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("iter_"):
            yield from _in(child)


# ------------------------------------------------------------------------------- our own runs


def _metrics(folder: Path) -> Iterator[Source]:
    source = Source(folder.name, folder)
    for line in (folder / "metrics.jsonl").read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        event = record.get("event")
        if event == "start":
            source.config = record.get("config") or {}
            source.variant = (record.get("mhc") or {}).get("variant")
            source.gpus = record.get("world_size")
            source.peak_tflops = record.get("peak_tflops")
        elif event == "resume":
            source.steps = [step for step in source.steps if step[0] <= record["iteration"]]
        elif event == "train":
            source.steps.append(
                (record["iteration"], record["step_time_s"], record["tflops"], record["loss"])
            )
            source.memory_gib = _largest(source.memory_gib, record.get("memory_gib"))
            source.tokens = record["tokens_per_s"] * record["step_time_s"]
    for log in sorted((folder / "logs").glob("rank-*.log")):
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
        source.imbalance = _largest(source.imbalance, _imbalance(text))
    if source.steps:
        yield source


def _largest(a: float | None, b: float | None) -> float | None:
    return max((x for x in (a, b) if x is not None), default=None)


# --------------------------------------------------------------------------- any Megatron's log


def _logs(name: str, paths: Sequence[Path]) -> Iterator[Source]:
    """One run from the files that its ranks wrote."""
    source = Source(name, paths[0])
    for path in paths:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            _read_line(source, line)
        source.imbalance = _largest(source.imbalance, _imbalance(lines))
    if not source.steps:
        return
    source.gpus = source.config.get("world_size")
    yield source


def _read_line(source: Source, line: str) -> None:
    if match := _STEP.search(line):
        values = {key: found[1] for key, at in _FIELDS.items() if (found := at.search(match[2]))}
        if "ms" not in values:
            return
        iteration = int(match[1])
        source.steps = [step for step in source.steps if step[0] < iteration]
        tflops = float(values["tflops"]) if "tflops" in values else None
        loss = float(values["loss"]) if "loss" in values else None
        source.steps.append((iteration, float(values["ms"]) / 1e3, tflops, loss))
        if "batch" in values and source.config.get("seq_length"):
            source.tokens = float(int(values["batch"]) * source.config["seq_length"])
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
            low, high = low + float(match[2]), high + float(match[3])
    return sorted(ratios)[len(ratios) // 2] if ratios else None


# -------------------------------------------------------------------------------------- the bench


def _is_bench(path: Path) -> bool:
    try:
        return "groups" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _bench(path: Path) -> Iterator[Source]:
    """One run for each column that tools/bench_training.py measured."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        groups = report["groups"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CollectError(f"{path} is not a report of tools/bench_training.py") from error
    for group in groups:
        for column in group["columns"]:
            if column.get("step_ms") is None:
                continue
            seconds = column["step_ms"]["median"] / 1e3
            source = Source(
                f"{path.parent.name}: {column['label']}, {group['precision']}",
                path,
                config={"layers": report.get("layers"), "precision": group["precision"]},
                variant=(column.get("mhc") or {}).get("variant"),
                gpus=1,
                steps=[(1, seconds, column.get("model_tflops"), None)],
                tokens=column.get("tokens_per_step"),
                peak_tflops=column.get("peak_tflops"),
                memory_gib=(column.get("step_peak_bytes") or 0) / 2**30 or None,
            )
            if math.isfinite(seconds):
                yield source
