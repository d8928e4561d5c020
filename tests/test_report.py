"""tools/report.py on synthetic runs: the page's numbers, resumes, damage, bad input."""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mhc_megatron.metrics import MetricsWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import report  # noqa: E402
from reporting import runs as reading  # noqa: E402
from reporting import style, summary  # noqa: E402

TOKENS = 1000  # an iteration


class Tables(HTMLParser):
    """Rows of cell texts of every table, and the pictures' sources."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.images: list[str] = []
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True
        elif tag == "img":
            self.images.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.tables[-1][-1][-1] += data


def write_run(
    folder: Path,
    name: str = "run",
    variant: str = "mhc",
    losses: list[float] | None = None,
    growth: float | None = None,
    speed: float = 1000.0,
    config: dict[str, Any] | None = None,
    sublayers: int = 4,
) -> Path:
    """A run of one record an iteration; ``growth`` is the composite gain it ends with."""
    losses = losses or [5.0 / (1 + i) for i in range(20)]
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        writer.start(
            name=name, config={"lr": 1e-3, "seed": 1} | (config or {}), mhc={"variant": variant},
            parameters=2_000_000, hc_parameters=0 if variant == "none" else 12_345,
            device="cpu", unigram_entropy=3.1234,
        )  # fmt: skip
        for i, loss in enumerate(losses, start=1):
            write_train(writer, i, loss, speed + i)
            if i % 5 == 0:
                writer.valid(iteration=i, consumed_tokens=i * TOKENS, loss=loss + 0.125)
            if growth is not None and i % 5 == 0:
                write_stability(writer, i, growth ** (i / len(losses)), sublayers)
        writer.exit(iteration=len(losses), reason="finished")
    return folder


def write_train(writer: MetricsWriter, iteration: int, loss: float, speed: float = 1000.0) -> None:
    writer.train(
        iteration=iteration, consumed_tokens=iteration * TOKENS, loss=loss, grad_norm=1.0 / loss,
        lr=1e-3, step_time_s=TOKENS / speed, tokens_per_s=speed,
    )  # fmt: skip


def write_stability(writer: MetricsWriter, iteration: int, gain: float, sublayers: int) -> None:
    """Gains that are the same in all sublayers and multiply to ``gain`` (backward: twice that)."""
    single = gain ** (1 / sublayers)
    composite = [single ** (k + 1) for k in range(sublayers)]
    writer.stability(
        iteration=iteration, consumed_tokens=iteration * TOKENS,
        sublayers=[f"{k // 2}.{('attn', 'mlp')[k % 2]}" for k in range(sublayers)],
        forward_max=[single] * sublayers, forward_min=[1 / single] * sublayers,
        backward_max=[single] * sublayers, backward_min=[1 / single] * sublayers,
        composite_forward_max=composite, composite_forward_min=[1 / c for c in composite],
        composite_backward_max=[2 * c for c in composite],
        composite_backward_min=[1 / c for c in composite],
        row_error=[0.0] * sublayers, column_error=[abs(single - 1)] * sublayers, seconds=0.01,
    )  # fmt: skip


def make(out: Path, *arguments: str | Path) -> Tables:
    """Run the tool, expect success, return the page's tables."""
    assert report.main([*map(str, arguments), "--out", str(out)]) == 0
    return Tables((out / "report.html").read_text())


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run the tool, expect exit code 2 and one sentence; returns it."""
    assert report.main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_page_tells_the_runs_numbers(tmp_path: Path) -> None:
    """Every number of the summary against one worked out here from the inputs."""
    base = [4.0 * 0.97**i + 0.1 * math.sin(3 * i) for i in range(40)]
    offset = [0.05 + 0.001 * i for i in range(40)]
    better = [b - o for b, o in zip(base, offset)]
    residual = write_run(tmp_path / "a", "residual", "none", base)
    mhc = write_run(tmp_path / "b", "mhc", "mhc", better, growth=1.5, speed=800.0)
    hc = write_run(tmp_path / "c", "hc", "hc", base, growth=3000.0)
    page = make(tmp_path / "out", mhc, residual, hc)
    head, *rows = page.tables[0]
    cells = {row[0]: dict(zip(head, row)) for row in rows}
    assert list(cells) == ["mhc", "residual", "hc"]
    assert cells["residual"]["variant"] == "none (residual)"
    assert cells["residual"]["parameters"] == "2M"
    assert cells["mhc"]["parameters"] == "2M (12.3k hc)"
    assert cells["mhc"]["tokens"] == "40k"
    assert cells["mhc"]["last train loss"] == f"{better[-1]:.4f}"
    assert cells["mhc"]["best valid loss"] == f"{min(better[4::5]) + 0.125:.4f}"
    # 40 records in common: the last tenth is four
    assert cells["mhc"]["difference, train"] == f"−{statistics.mean(offset[-4:]):.4f}"
    gap = min(base[4::5]) - min(better[4::5])
    assert cells["mhc"]["difference, valid"] == f"−{gap:.4f}"
    assert cells["hc"]["difference, train"] == "+0.0000"
    assert cells["residual"]["difference, train"] == "–"
    # medians of 801..840 and 1001..1040
    assert cells["mhc"]["tokens/s, median"] == f"820 (−{1 - 820.5 / 1020.5:.1%})"
    assert cells["mhc"]["composite gain, fwd / bwd"] == "1.500 / 3.000"
    assert cells["hc"]["composite gain, fwd / bwd"] == "3,000 / 6,000"
    assert cells["residual"]["composite gain, fwd / bwd"] == "–"


def test_the_page_stands_alone(tmp_path: Path) -> None:
    """All pictures are inside, equal to the files beside it, and nothing is loaded."""
    out = tmp_path / "out"
    write_run(tmp_path / "a", "residual", "none")
    write_run(tmp_path / "b", "mhc", "mhc", growth=1.2)
    page = make(out, tmp_path / "a", tmp_path / "b")
    html = (out / "report.html").read_text()
    assert not re.search(r"(?:src|href)=(?!\"data:image/png;base64,)", html)
    assert not re.search(r"https?:|@import|url\(|<script", html)
    inside = {
        base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in page.images
    }
    beside = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert inside == {png for name, png in beside.items() if name != "overview.png"}
    assert set(beside) == {
        f"{name}.png"
        for name in ("overview", "loss", "gap", "valid", "grad_norm", "gain_training",
                     "gain_depth", "sinkhorn", "throughput")
    }  # fmt: skip
    for png in beside.values():
        assert struct.unpack(">I", png[16:20])[0] >= 1400  # pixels wide
    assert sorted(p.name for p in out.iterdir()) == sorted([*beside, "report.html"])


def test_only_what_the_runs_have_is_drawn(tmp_path: Path) -> None:
    """A lone residual run: no gains, no differences, no column of either."""
    page = make(tmp_path / "out", write_run(tmp_path / "a", "residual", "none"))
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert names == {"overview", "loss", "valid", "grad_norm", "throughput"}
    headings = page.tables[0][0]
    assert not [h for h in headings if "difference" in h or "gain" in h or "MFU" in h]


def test_configurations(tmp_path: Path) -> None:
    """First the keys that differ, then all of them."""
    a = write_run(tmp_path / "a", "a", "none", config={"only-a": True, "name": "<x>"})
    b = write_run(tmp_path / "b", "b", "mhc", config={"lr": 2e-3, "name": "<x>"})
    page = make(tmp_path / "out", a, b)
    assert page.tables[1] == [
        ["setting", "a", "b"],
        ["lr", "0.001", "0.002"],
        ["mhc.variant", "none", "mhc"],
        ["only-a", "true", "–"],
    ]
    assert ["name", "<x>", "<x>"] in page.tables[2]
    assert len(page.tables[2]) == 1 + 5


def test_a_resumed_run_counts_its_last_records(tmp_path: Path) -> None:
    """Iterations 8 to 12 ran, were lost, and ran again: 8 and 9 anew, 10 to 12 not yet."""
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for i in range(1, 13):
            write_train(writer, i, 10.0 + i)
            if i % 4 == 0:
                writer.valid(iteration=i, consumed_tokens=i * TOKENS, loss=float(i))
                write_stability(writer, i, float(i), 2)
        writer.resume(iteration=7)
        for i in (8, 9):
            write_train(writer, i, 1.0 + i)
        write_stability(writer, 8, 80.0, 2)
    run = reading.read_run(tmp_path)
    assert run.train.iteration.tolist() == list(range(1, 10))
    assert run.train["loss"].tolist() == [11, 12, 13, 14, 15, 16, 17, 9, 10]
    assert run.valid.iteration.tolist() == [4]
    assert [r.iteration for r in run.stability] == [4, 8]
    assert summary.composite(run, "composite_forward_max")[-1] == pytest.approx(80.0)
    assert "Resumed after iteration 7." in run.notes
    assert any(note.startswith("9 records of iterations that were run again") for note in run.notes)


def test_repeated_iterations_without_a_resume_event(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for i, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 8.0)):
            write_train(writer, i, loss)
    run = reading.read_run(tmp_path)
    assert run.train.iteration.tolist() == [1, 2]
    assert run.train["loss"].tolist() == [5.0, 8.0]


def test_half_written_last_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    whole = reading.read_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event":"train","iteration":21,"lo')
    run = reading.read_run(folder)
    assert run.train.iteration.tolist() == whole.train.iteration.tolist()
    assert whole.notes == []
    assert len(run.notes) == 1
    make(tmp_path / "out", folder)
    assert "The last line is half-written" in (tmp_path / "out" / "report.html").read_text()


def test_corrupted_lines_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    damage = [
        b"\xff\xfe\x00garbage", b"[1, 2]", b'{"event":"train","iteration":3}', b"[" * 100_000,
        b'{"event":"train","iteration":true,"consumed_tokens":1,"loss":1}',
        b'{"event":"train","iteration":-1,"consumed_tokens":1,"loss":1}',
        b'{"event":"valid","iteration":3,"consumed_tokens":1' + b"0" * 400 + b',"loss":1}',
        b'{"event":"stability","iteration":3,"consumed_tokens":1,"sublayers":["a"],'
        b'"forward_max":[1,2]}',
    ]  # fmt: skip
    unknown = b'{"event":"something new","iteration":"x"}'
    path.write_bytes(b"\n".join([*lines[:3], *damage, unknown, b"", *lines[3:]]))
    run = reading.read_run(folder)
    assert run.train["loss"].tolist() == [5.0 / (1 + i) for i in range(20)]
    assert run.notes == [
        "8 corrupted lines of metrics.jsonl left out (line 4, 5, 6, 7, 8, 9, 10, 11)."
    ]


def test_a_diverged_run(tmp_path: Path) -> None:
    """Losses that are null or NaN do not stop the report; the page says where they begin."""
    folder = write_run(tmp_path / "a", losses=[3.0, 2.0, math.nan, math.inf], growth=1.1)
    other = write_run(tmp_path / "b", "none", "none", losses=[3.0, 2.5, 2.25, 2.0])
    page = make(tmp_path / "out", folder, other)
    html = (tmp_path / "out" / "report.html").read_text()
    assert "The loss is not finite in 2 records, first at iteration 3." in html
    row = dict(zip(page.tables[0][0], page.tables[0][1]))
    assert row["last train loss"] == "–"
    assert row["difference, train"] == "−0.5000"  # the only tenth that both have


def test_a_run_with_hardly_anything(tmp_path: Path) -> None:
    """No start record, one validation: it has a page."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text(
        '{"event":"valid","iteration":5,"consumed_tokens":10,"loss":2.5}\n'
    )
    page = make(tmp_path / "out", tmp_path / "a")
    assert page.tables[0][1][:2] == ["a", "?"]
    assert "No start record" in (tmp_path / "out" / "report.html").read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    """Markup, mathematics, control characters, a leading underscore: text like any other."""
    evil = "_<script>alert(1)</script>&\"' $\\frac{x$ \n\ud800 完"
    a = write_run(tmp_path / "a", evil, "<b>", growth=1.1, config={"<k>": "<v>", "k2": "\ud800"})
    b = write_run(tmp_path / "b", "x" * 300, "none")
    page = make(tmp_path / "out", a, b, "--title", "<i>")
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in html and "<i>" not in html and "<k>" not in html and "<v>" not in html
    assert page.tables[0][1][0] == reading.printable(evil)
    assert page.tables[0][1][1] == "<b>"


def test_equal_names_are_told_apart_by_folder(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "x" / "seed1", "mhc"),
        write_run(tmp_path / "y" / "seed1", "mhc"),
        write_run(tmp_path / "other", "other"),
    ]
    read = reading.read_runs([*folders, folders[0]])
    assert [run.label for run in read] == ["mhc (x/seed1)", "mhc (y/seed1)", "other"]
    page = make(tmp_path / "out", *folders)
    assert [row[0] for row in page.tables[0][1:]] == ["mhc (x/seed1)", "mhc (y/seed1)", "other"]


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary alone; the page only if --out is given."""
    base = [3.0, 2.0, 1.0]
    write_run(tmp_path / "runs" / "a", "residual", "none", base)
    write_run(tmp_path / "runs" / "b", "hc", "hc", [x + 0.25 for x in base] * 2, growth=3000.0)
    arguments = [str(tmp_path / "runs" / name) for name in ("b", "a")]
    assert report.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["a", "b"]
    assert result["reference"] == "residual"
    hc, residual = result["runs"]
    assert hc["parameters"] == 2_000_000 and hc["iterations"] == 6 and hc["tokens"] == 6000
    assert hc["train_loss_difference"] == pytest.approx(0.25)
    assert hc["composite_forward_worst"] == pytest.approx(3000.0 ** (5 / 6))
    assert residual["composite_forward_last"] is None
    assert report.main([*arguments, "--json", "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert (tmp_path / "out" / "report.html").exists()


def test_the_default_output_is_beside_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "a")
    assert report.main([str(tmp_path / "runs" / "a")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'runs' / 'report' / 'report.html'}\n"


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    for name, content in {
        "nothing": "", "started": '{"event":"start","name":"x"}\n', "garbage": "not json\n" * 3
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(content)
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    out = tmp_path / "out"
    for run, words in {
        tmp_path / "missing": "missing does not exist",
        good / "metrics.jsonl": "is not a folder",
        tmp_path / "empty": "has no metrics.jsonl",
        tmp_path / "nothing": "has no usable record",
        tmp_path / "started": "has no usable record",
        tmp_path / "garbage": "has no usable record",
        tmp_path / "folder": "cannot be read: Is a directory",
    }.items():
        assert words in fails(capsys, good, run, "--out", out)
    assert not out.exists()
    with pytest.raises(SystemExit) as stop:
        report.main([])
    assert stop.value.code == 2


def test_unwritable_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was there is changed, and nothing is left behind."""
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(reading.ReportError, match="cannot be written"):
            report._write(out, {"report.html": b"new"})
    assert (tmp_path / "file").read_text() == "mine"
    out = tmp_path / "out"
    (out / "loss.png").mkdir(parents=True)
    (out / "report.html").write_text("old")
    assert "loss.png is a folder" in fails(capsys, run, "--out", out)
    (out / "loss.png").rmdir()

    def full(folder: Path, data: bytes) -> Path:
        if data.startswith(b"<!DOCTYPE"):
            raise OSError(28, "No space left on device")
        return temporary(folder, data)

    temporary = report._temporary
    monkeypatch.setattr(report, "_temporary", full)
    assert "No space left on device" in fails(capsys, run, "--out", out)
    assert [p.name for p in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "old"


def test_smoothing_follows_a_line_and_keeps_short_runs() -> None:
    short = np.array([3.0, 1.0, 2.0])
    assert summary.smooth(short) is short
    line = np.linspace(5.0, 1.0, 1000)
    smoothed = summary.smooth(line)
    np.testing.assert_allclose(smoothed[:-10], line[:-10], rtol=1e-12)
    rng = np.random.default_rng(0)
    noisy = rng.normal(size=1000)
    noisy[500] = np.nan
    for i in (0, 4, 300, 500, 505, 995, 999):
        behind = min(10, i)
        ahead = min(behind, 999 - i)
        window = [x for x in noisy[i - behind : i + ahead + 1] if not math.isnan(x)]
        assert summary.smooth(noisy)[i] == pytest.approx(statistics.mean(window), abs=1e-12)


def test_a_colour_a_run(tmp_path: Path) -> None:
    """Colours differ for any number of runs, and the residual is grey wherever it stands."""
    for count in (1, 7, 12):
        read = [
            reading.read_run(
                write_run(tmp_path / f"{count}-{i}", f"r{i}", "none" if i == count - 1 else "mhc")
            )
            for i in range(count)
        ]
        colours = style.colours(read)
        assert len(set(colours.values())) == count
        assert colours[f"r{count - 1}"] == style.RESIDUAL


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (999.0, "999"), (999.9, "1k"), (1000.0, "1k"), (12345.0, "12.3k"),
     (999_960.0, "1M"), (2.62e11, "262B"), (3e12, "3T"), (math.nan, "–")],
)  # fmt: skip
def test_human(value: float | None, text: str) -> None:
    assert style.human(value) == text


def test_the_composite_gain_is_the_stacks() -> None:
    """Prediction layers come last; their products are their own."""
    lists = {"composite_forward_max": np.array([2.0, 4.0, 1.5])}
    record = SimpleNamespace(sublayers=("0.attn", "0.mlp", "mtp0.attn"), lists=lists)
    run = SimpleNamespace(stability=[record])
    assert summary.composite(run, "composite_forward_max").tolist() == [4.0]
