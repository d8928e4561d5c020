"""One row a run: speed, spread, and what it is against the runs that it belongs with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from collecting.sources import LAYOUT, MODEL, Source

#: Records of the first steps are left out: compilation, allocation, the first batch.
WARMUP = 3


@dataclass(frozen=True)
class Row:
    """What the table says of a run; None is what the run does not tell.

    Attributes:
        step_ms: median over the records after the first three.
        jitter: 95th percentile of the step time over the median, minus 1.
        tokens_per_s: a GPU.
        tflops: model TFLOP/s a GPU, hyper-connections not counted.
        overhead: step time over that of the baseline, minus 1: the named one, or the run of the
            same model, layout and GPUs with plain residuals.
        scaling: tokens/s a GPU over that of the same model and variant on the fewest GPUs.
        imbalance: slowest over fastest rank's own work, minus 1.
    """

    name: str
    variant: str | None
    gpus: int | None
    layout: str
    steps: int
    step_ms: float
    jitter: float | None
    tokens_per_s: float | None
    tflops: float | None
    mfu: float | None
    memory_gib: float | None
    overhead: float | None
    scaling: float | None
    imbalance: float | None
    loss: float | None


def compare(
    sources: Sequence[Source], peak_tflops: float | None = None, baseline: str | None = None
) -> list[Row]:
    """One row a run, in order.

    Args:
        sources: the runs.
        peak_tflops: of the GPU, for runs that do not say theirs.
        baseline: name of the run that all are compared with; None for each one's own.
    """
    named = next((source for source in sources if source.name == baseline), None)
    return [_row(source, sources, peak_tflops, named) for source in sources]


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def step_seconds(source: Source) -> float:
    """Median step time after the warm-up (of all records where there are no more)."""
    return median(_times(source))


def _times(source: Source) -> list[float]:
    times = [seconds for _, seconds, _, _ in source.steps]
    return times[WARMUP:] or times


def _row(
    source: Source, sources: Sequence[Source], peak: float | None, named: Source | None
) -> Row:
    seconds, times = step_seconds(source), sorted(_times(source))
    rate = tokens_rate(source)
    flops = [tflops for _, _, tflops, _ in source.steps if tflops is not None]
    tflops = median(flops[WARMUP:] or flops) if flops else None
    peak = source.peak_tflops or peak
    losses = [loss for *_, loss in source.steps if loss is not None]
    return Row(
        name=source.name,
        variant=source.variant,
        gpus=source.gpus,
        layout=layout(source),
        steps=len(source.steps),
        step_ms=1e3 * seconds,
        jitter=times[int(0.95 * (len(times) - 1) + 0.5)] / seconds - 1 if len(times) > 4 else None,
        tokens_per_s=rate,
        tflops=tflops,
        mfu=tflops / peak if tflops and peak else None,
        memory_gib=source.memory_gib,
        overhead=_overhead(source, sources, named),
        scaling=_scaling(source, sources),
        imbalance=source.imbalance,
        loss=losses[-1] if losses else None,
    )


def tokens_rate(source: Source) -> float | None:
    """Tokens/s a GPU."""
    if not source.tokens or not source.gpus:
        return None
    return source.tokens / step_seconds(source) / source.gpus


def layout(source: Source) -> str:
    """``TP2 PP4 EP8``, what is 1 left out; ``DP`` where nothing is left."""
    parts = []
    for key, short in LAYOUT.items():
        size = source.config.get(key)
        if isinstance(size, int) and size > 1:
            parts.append(f"{short.upper()}{size}")
    return " ".join(parts) or ("DP" if (source.gpus or 1) > 1 else "one rank")


def _model(source: Source, *left_out: str) -> tuple:
    values = {key: source.config.get(key) for key in MODEL if key not in left_out}
    values |= {key: source.config.get(key) for key in ("layers", "precision")}
    return tuple(str(value) for value in values.values())


def _overhead(
    source: Source, sources: Sequence[Source], named: Source | None
) -> float | None:
    """Against ``named``, or the last plain run of the same model, layout and number of GPUs."""
    if named is not None:
        return None if source is named else step_seconds(source) / step_seconds(named) - 1
    if source.variant in (None, "none"):
        return None
    plain = [
        other
        for other in sources
        if other.variant == "none"
        and other.gpus == source.gpus
        and layout(other) == layout(source)
        and _model(other) == _model(source)
    ]
    return step_seconds(source) / step_seconds(plain[-1]) - 1 if plain else None


def _scaling(source: Source, sources: Sequence[Source]) -> float | None:
    """Against the same model, variant and model-parallel layout on the fewest GPUs.

    The global batch may grow with the GPUs (weak scaling) or stay (strong): tokens/s a GPU tell.
    """
    mine = tokens_rate(source)
    family = [
        other
        for other in sources
        if other.gpus
        and other.variant == source.variant
        and layout(other).replace("one rank", "DP") == layout(source).replace("one rank", "DP")
        and _model(other, "global_batch_size") == _model(source, "global_batch_size")
        and tokens_rate(other)
    ]
    if mine is None or len({other.gpus for other in family}) < 2:
        return None
    fewest = min(family, key=lambda other: other.gpus)
    return mine / tokens_rate(fewest)
