"""The HTML page: summary, plots with a word on how to read each, configurations. One file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from reporting.runs import Run, printable
from reporting.style import Picture, human
from reporting.summary import Row, all_settings, differing, reference_run

#: Section title and how to read the plot, by the picture's name, in the page's order.
SECTIONS: dict[str, tuple[str, str]] = {
    "loss": (
        "Training loss",
        "Lower is better. In a run of 100 records or more the strong line is a centred mean "
        "over 2 % of them, the faint one the records themselves. The dotted line is the unigram "
        "entropy of the corpus, where it is known: what a model would reach that knows how "
        "frequent each token is and nothing about context; a model that learns language falls "
        "well below it.",
    ),
    "gap": (
        "Difference to the reference run",
        "The loss of each run minus that of the reference at the same number of consumed tokens: "
        "below zero the run is better. On the same data both saw the same batches, so "
        "most of the noise cancels; this is where differences of a hundredth of a nat show.",
    ),
    "valid": (
        "Validation loss",
        "The loss on text that is not trained on. If it rises while the training loss falls, "
        "the model is learning its data by heart.",
    ),
    "grad_norm": (
        "Gradient norm and learning rate",
        "A steady or slowly falling norm is healthy; spikes that last, or a rise late in the run, "
        "announce a loss that will diverge. The axis is logarithmic where the range asks for it.",
    ),
    "gain_training": (
        "Composite gain over training",
        "How much the residual mapping of all sublayers together, the product of their H_res, can "
        "amplify the signal (forward: row sums) and the gradient (backward: column sums): per "
        "token the largest and the smallest absolute sum, averaged over tokens. A plain residual "
        "is exactly 1, the dotted line. mHC keeps it near 1 by making every H_res doubly "
        "stochastic; unconstrained hyper-connections (hc) are free to drift, "
        "to about 3000 in the paper's 27B run, where the loss surges.",
    ),
    "gain_depth": (
        "Gain over depth, at the last measurement",
        "Top: the product of the mappings of sublayers 0 to k, which is what a signal meets on its "
        "way up (and a gradient on its way down). Bottom: each sublayer alone. Small deviations of "
        "single sublayers multiply: a composite that leaves 1 steadily with k grows with "
        "every layer added.",
    ),
    "sinkhorn": (
        "Sinkhorn error",
        "How far H_res is from doubly stochastic: the distance of its row and column sums from 1. "
        "Rows are normalised last, so their error is that of rounding; the column error tells "
        "whether the iterations were enough, and grows as the logits sharpen. Errors under 1e-9 "
        "are drawn at 1e-9.",
    ),
    "throughput": (
        "Throughput",
        "Tokens per second over all ranks, from zero. MFU counts the model's own FLOPs only "
        "(what the connection adds is left out, so that variants compare), and is shown where the "
        "device's peak is known. Dips are usually checkpoints, validation or another job.",
    ),
}

_GAIN = "composite gain, fwd / bwd"
_PAIR = " class=whole"
#: Names of up to so many letters are not broken over lines.
_WHOLE_NAME = 32
_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fafafa; color: #222; line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 32px 56px; background: #fff;
  border-left: 1px solid #e8e8e8; border-right: 1px solid #e8e8e8; min-height: 100vh; }
h1 { font-size: 1.7rem; margin: 0 0 4px; font-weight: 600; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 44px 0 6px; font-weight: 600; }
p { margin: 6px 0 12px; max-width: 84ch; }
.meta, .how, footer { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
table.summary { width: 100%; }
th, td { padding: 6px 8px; text-align: right; border-bottom: 1px solid #e6e6e6;
  vertical-align: top; }
th { font-weight: 600; color: #444; border-bottom: 1px solid #999; vertical-align: bottom; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.whole { white-space: nowrap; }
td.text { overflow-wrap: anywhere; min-width: 7em; }
td small { color: #777; font-size: inherit; white-space: nowrap; }
tr:last-child td { border-bottom: 1px solid #999; }
table.settings th, table.settings td { text-align: left; overflow-wrap: anywhere; }
.dot { display: inline-block; width: .72em; height: .72em; border-radius: 50%; margin-right: .5em; }
code, td.key { font-family: ui-monospace, "Liberation Mono", Menlo, monospace; font-size: .82rem; }
code { overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; margin: 4px 0 0; }
details { margin-top: 12px; } summary { cursor: pointer; color: #333; }
ul { margin: 6px 0; padding-left: 1.2em; } li { margin: 2px 0; }
footer { margin-top: 48px; padding-top: 12px; border-top: 1px solid #ddd; }
@media print { body { background: #fff; } main { border: 0; } h2, img { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Page:
    """What is shown: the runs with their rows and colours, and the pictures, in SECTIONS' names."""

    title: str
    runs: Sequence[Run]
    rows: Sequence[Row]
    colour: Mapping[str, str]
    pictures: Sequence[Picture]
    command: str
    time: datetime


def render(page: Page) -> str:
    """The page as one HTML document that needs nothing else."""
    pictures = {picture.name: picture for picture in page.pictures}
    parts = [
        f"<h1>{escape(page.title)}</h1>",
        f'<p class="meta">{_opening(page.runs)}</p>',
        _summary(page),
        _run_notes(page),
        *(_section(pictures[name]) for name in SECTIONS if name in pictures),
        _settings(page.runs),
        f"<footer>Made {page.time.strftime('%Y-%m-%d %H:%M:%S %Z')} by "
        f"<code>{escape(page.command)}</code></footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _opening(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return "One pretraining run. Losses are in nats per token."
    return (
        f"{len(runs)} pretraining runs; the reference is "
        f"<b>{escape(reference_run(runs).label)}</b>. Losses are in nats per token."
    )


def _summary(page: Page) -> str:
    """The table of the rows; columns that no run has a number for are left out."""
    rows = [_cells(row) for row in page.rows]
    kept = [h for h in rows[0] if h in ("run", "variant") or any(r[h] != "–" for r in rows)]
    if len(page.runs) == 1:
        kept = [heading for heading in kept if not heading.startswith("difference")]
    head = "".join(f"<th{' class=text' if h in ('run', 'variant') else ''}>{h}</th>" for h in kept)
    body = ""
    for row, cells in zip(page.rows, rows):
        dot = f'<span class="dot" style="background:{page.colour[row.run]}"></span>'
        whole = " whole" if len(row.run) <= _WHOLE_NAME else ""
        body += f'<tr><td class="text{whole}">{dot}{cells["run"]}</td>'
        body += f"<td class=text>{cells['variant']}</td>"
        body += "".join(f"<td{_PAIR * (h == _GAIN)}>{cells[h]}</td>" for h in kept[2:]) + "</tr>\n"
    return (
        f'<div class="scroll"><table class="summary"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n{_table_words(kept)}"
    )


def _cells(row: Row) -> dict[str, str]:
    """The row as HTML by heading."""
    connection = f" <small>({human(row.hc_parameters)} hc)</small>" if row.hc_parameters else ""
    ratio = ""
    if row.tokens_per_s_ratio is not None:
        ratio = f" <small>({row.tokens_per_s_ratio - 1:+.1%})</small>".replace("-", "−")
    utilisation = "–" if row.mfu_median is None else f"{row.mfu_median:.1%}"
    gains = f"{_gain(row.composite_forward_last)} / {_gain(row.composite_backward_last)}"
    has_gain = row.composite_forward_last is not None or row.composite_backward_last is not None
    return {
        "run": escape(row.run),
        "variant": escape("none (residual)" if row.variant == "none" else row.variant),
        "parameters": human(row.parameters) + connection,
        "tokens": human(row.tokens),
        "last train loss": _loss(row.last_train_loss),
        "difference, train": _signed(row.train_loss_difference),
        "best valid loss": _loss(row.best_valid_loss),
        "difference, valid": _signed(row.valid_loss_difference),
        "tokens/s, median": human(row.tokens_per_s_median) + ratio,
        "MFU, median": utilisation,
        "peak GiB": human(row.memory_gib_max),
        _GAIN: gains if has_gain else "–",
    }


def _table_words(headings: Sequence[str]) -> str:
    """What the less obvious columns mean, for those that are there."""
    words = {
        "parameters": "hc: the parameters of the hyper-connections, included in the number before.",
        "difference, train": "Difference, train: run minus reference, mean over the last tenth of "
        "the records that both have, matched by tokens.",
        "difference, valid": "Difference, valid: the run's best minus the reference's best.",
        _GAIN: "Composite gain: through all sublayers at the last "
        "measurement, 1 for a plain residual.",
    }
    said = " ".join(text for heading, text in words.items() if heading in headings)
    return f'<p class="how">{said}</p>' if said else ""


def _run_notes(page: Page) -> str:
    """Where each run comes from, and what its file had that a reader should know."""
    items = ""
    for run in page.runs:
        about = [f"<code>{escape(printable(run.folder))}</code>", *_machine(run)]
        notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
        items += f"<li><b>{escape(run.label)}</b>: {', '.join(about)}"
        items += f"<ul>{notes}</ul></li>\n" if notes else "</li>\n"
    return f'<ul class="meta">{items}</ul>'


def _machine(run: Run) -> list[str]:
    about = []
    if run.start.get("device"):
        ranks = run.number("world_size") or 1
        many = f"{ranks:g} × " if ranks > 1 else ""
        about.append(escape(f"{many}{printable(run.start['device'])}"))
    if len(run.train):
        about.append(f"{int(run.train.iteration[-1]):,} iterations")
    started = run.number("time")
    if started is not None and 0 < started < 2e11:
        when = datetime.fromtimestamp(started, UTC)
        about.append(f"started {when.strftime('%Y-%m-%d %H:%M UTC')}")
    return about


def _section(picture: Picture) -> str:
    title, how = SECTIONS[picture.name]
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<h2 id="{picture.name}">{title}</h2>\n<p class="how">{how}</p>\n'
        f'<img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}">'
    )


def _settings(runs: Sequence[Run]) -> str:
    """The keys that differ, and behind a click all of them."""
    table = all_settings(runs)
    if not table:
        return ""
    different = differing(table)
    body = '<h2 id="configuration">Configuration</h2>\n'
    if len(runs) > 1:
        words = "What differs between the runs:" if different else "All runs have the same."
        body += f'<p class="how">{words}</p>\n'
        body += _settings_table(runs, different) if different else ""
    return (
        f"{body}<details><summary>All {len(table)} settings</summary>\n"
        f"{_settings_table(runs, table)}</details>"
    )


def _settings_table(runs: Sequence[Run], table: Mapping[str, Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(run.label)}</th>" for run in runs)
    body = "".join(
        f'<tr><td class="key">{escape(key)}</td>'
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>\n"
        for key, values in table.items()
    )
    return (
        '<div class="scroll"><table class="settings"><thead><tr><th>setting</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}".replace("-", "−")


def _gain(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:,.0f}"
