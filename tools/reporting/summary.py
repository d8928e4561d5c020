"""The numbers of the report: one row a run, differences to a reference run, configurations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from reporting.runs import Array, Run, Table, printable

#: What stands for a key that a run's configuration does not have.
ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """One run in the summary table; None is what the run does not tell. Losses in nats a token."""

    run: str
    variant: str
    parameters: int | None
    hc_parameters: int | None
    iterations: int | None
    tokens: float | None
    last_train_loss: float | None
    best_valid_loss: float | None
    #: Loss minus the reference's: training (see ``train_gap``), best validation.
    train_loss_difference: float | None
    valid_loss_difference: float | None
    tokens_per_s_median: float | None
    #: Tokens/s over the reference's, medians.
    tokens_per_s_ratio: float | None
    mfu_median: float | None
    memory_gib_max: float | None
    #: Composite Amax gain at full depth, last measurement and largest of all.
    composite_forward_last: float | None
    composite_backward_last: float | None
    composite_forward_worst: float | None
    composite_backward_worst: float | None


def reference_run(runs: Sequence[Run]) -> Run:
    """The run that the others are compared with: the first plain residual one, else the first."""
    return next((run for run in runs if run.variant == "none"), runs[0])


def summarize(runs: Sequence[Run]) -> list[Row]:
    """One row for every run, in order."""
    reference = reference_run(runs)
    return [_row(run, reference) for run in runs]


def as_json(rows: Sequence[Row], reference: Run) -> str:
    """The summary as JSON: ``{"reference": label, "runs": [...]}``."""
    summary = {"reference": reference.label, "runs": [asdict(row) for row in rows]}
    return json.dumps(summary, indent=2, allow_nan=False)


def train_gap(run: Run, reference: Run) -> float | None:
    """Mean difference of training losses over the last tenth of the records both runs have.

    Records are matched by consumed tokens, so that runs on the same data are compared on the same
    batches and the noise they share drops out.
    """
    tokens, gap = paired_gap(run.train, reference.train)
    if run is reference or not len(tokens):
        return None
    return float(np.mean(gap[-math.ceil(len(gap) / 10) :]))


def paired_gap(table: Table, reference: Table) -> tuple[Array, Array]:
    """Tokens that both tables have a finite loss for, and loss minus the reference's loss there."""
    tokens, mine, theirs = np.intersect1d(table.tokens, reference.tokens, return_indices=True)
    gap = table["loss"][mine] - reference["loss"][theirs]
    finite = np.isfinite(gap)
    return tokens[finite], gap[finite]


def smooth(values: Array) -> Array:
    """Centred mean over 2 % of the records, NaN left out; a run of under 100 stays as it is.

    It does not lag behind a falling curve as a running average does. Towards the start, where
    losses fall steeply, the window shrinks on both sides; towards the end only ahead.
    """
    half = len(values) // 100
    if half == 0:
        return values
    index = np.arange(len(values))
    behind = np.minimum(half, index)
    ahead = np.minimum(behind, len(values) - 1 - index)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low, high = index - behind, index + ahead + 1
    number = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(number, 1)
    return np.where(number > 0, means, np.nan)


def settings(run: Run) -> dict[str, str]:
    """The configuration as text by name; the connection's own settings as ``mhc.*``."""
    named = run.config | {f"mhc.{key}": value for key, value in run.mhc.items()}
    return {printable(key): _text(named[key]) for key in sorted(named)}


def all_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Every key of any run with its value in each run."""
    each = [settings(run) for run in runs]
    keys = sorted({key for one in each for key in one})
    return {key: [one.get(key, ABSENT) for one in each] for key in keys}


def differing(table: dict[str, list[str]]) -> dict[str, list[str]]:
    """The keys whose values are not the same in all runs."""
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def _row(run: Run, reference: Run) -> Row:
    speed = _median(run.train["tokens_per_s"])
    other = _median(reference.train["tokens_per_s"])
    valid, other_valid = _best(run.valid), _best(reference.valid)
    is_reference = run is reference
    return Row(
        run=run.label,
        variant=run.variant,
        parameters=_integer(run.number("parameters")),
        hc_parameters=_integer(run.number("hc_parameters")),
        iterations=int(run.train.iteration[-1]) if len(run.train) else None,
        tokens=run.tokens,
        last_train_loss=_finite(run.train["loss"][-1]) if len(run.train) else None,
        best_valid_loss=valid,
        train_loss_difference=train_gap(run, reference),
        valid_loss_difference=(
            None if is_reference or valid is None or other_valid is None else valid - other_valid
        ),
        tokens_per_s_median=speed,
        tokens_per_s_ratio=None if is_reference or not speed or not other else speed / other,
        mfu_median=_median(run.train["mfu"]),
        memory_gib_max=_max(run.train["memory_gib"]),
        composite_forward_last=_last_composite(run, "forward"),
        composite_backward_last=_last_composite(run, "backward"),
        composite_forward_worst=_max(composite(run, "composite_forward_max")),
        composite_backward_worst=_max(composite(run, "composite_backward_max")),
    )


def composite(run: Run, name: str) -> Array:
    """The gain of the product over all sublayers of the stack, one value a measurement.

    Prediction layers come last and have products of their own.
    """
    return np.array([record.lists[name][_stack(record.sublayers) - 1] for record in run.stability])


def _stack(sublayers: Sequence[str]) -> int:
    """The number of sublayers that belong to no prediction layer; all where every one does."""
    return sum(not name.startswith("mtp") for name in sublayers) or len(sublayers)


def _last_composite(run: Run, direction: str) -> float | None:
    gains = composite(run, f"composite_{direction}_max")
    return _finite(gains[-1]) if len(gains) else None


def _best(table: Table) -> float | None:
    losses = table["loss"][np.isfinite(table["loss"])]
    return float(np.min(losses)) if len(losses) else None


def _median(values: Array) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _max(values: Array) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.max(values)) if len(values) else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _integer(value: float | None) -> int | None:
    return None if value is None else int(value)


def _text(value: Any) -> str:
    return printable(value) if isinstance(value, str) else json.dumps(value, sort_keys=True)
