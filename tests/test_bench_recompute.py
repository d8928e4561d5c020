"""tools/bench_recompute.py without a GPU: that it measures what it says, its table, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools import bench_recompute as bench

SMALL = (
    "--layers 2 --hidden 32 --ffn 32 --expert-ffn 16 --heads 2 --sequence 16 --microbatches 2 "
    "--rounds 1 --L-r 1 3"
).split()


def options(*more: str):
    return bench._parser().parse_args([*SMALL, *more])


class _Clock:
    """An event of a device that is not there."""

    def __init__(self, **kwargs) -> None:
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, end) -> float:
        return 4.0


@pytest.fixture
def no_device(megatron_cpu, monkeypatch):
    """The CPU in the place of a GPU whose memory grows by a kilobyte a question."""
    from megatron.core.transformer import transformer_config

    asked = iter(range(10**6))
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1024 * next(asked))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", _Clock)
    plain = transformer_config.TransformerConfig

    def on_cpu(**settings):
        return plain(**settings, use_cpu_initialization=True)

    monkeypatch.setattr(transformer_config, "TransformerConfig", on_cpu)


@pytest.mark.parametrize("model", list(bench.MODELS))
def test_every_row_is_measured(no_device, model: str) -> None:
    chosen = {"none": 0, "off": 0, "auto": 2, "1": 1, "3": 3}
    rows = [bench.measure(options(), model, recompute) for recompute in chosen]
    assert [row.error for row in rows] == [""] * len(rows)
    assert [row.L_r for row in rows] == list(chosen.values())
    assert {(row.held, row.peak, row.ms) for row in rows} == {(1024, 2048, 2.0)}


def test_a_row_that_fails_leaves_the_others(no_device) -> None:
    row = bench.measure(options(), "dense", "banana")
    assert "recompute must be auto, off" in row.error
    text = bench.table(options(), [bench.Row("dense", "none"), row])
    assert text.splitlines()[-1].split()[:3] == ["dense", "banana", "failed:"]


def test_the_table_compares_with_the_formula(monkeypatch) -> None:
    """Rows that hold exactly what the formula says have ratios of one."""
    monkeypatch.setattr(bench, "has_transformer_engine", lambda: False)
    chosen, width = options(), 16 * 32 * 2
    L, m = 4, 2
    none = bench.Row("dense", "none", held=9 * width, peak=10 * width, ms=1.0)
    rows = [none]
    for L_r, kept in ((0, 6 * L), (1, 4 * 4 + L), (3, 2 * 4 + L)):
        held, peak = kept * m * width, (kept * m + 6 * L_r) * width
        own = 2 * L * m * width  # the residual model's x and norm(x)
        row = bench.Row("dense", str(L_r or "off"), L_r, none.held + held - own,
                        none.peak + peak - own, 2.0)  # fmt: skip
        rows.append(row)
    for line in bench.table(chosen, rows).splitlines()[3:]:
        cells = line.split()
        assert (cells[4], cells[7], cells[9]) == ("1.000", "1.000", "1.000"), line


def test_without_a_gpu_it_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert capsys.readouterr().err == "bench_recompute.py: needs a CUDA device.\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "0"], "argument --layers: must be a whole number, at least 1, not '0'"),
        (["--models", "x"], "invalid choice: 'x'"),
        (["--json", "no/such/out.json"], "argument --json: there is no folder "),
        (["--json", "."], "argument --json: cannot write to ."),
    ],
)
def test_bad_arguments(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("bench_recompute.py: ") and said in err and err.count("\n") == 1


@pytest.fixture
def measured(monkeypatch) -> None:
    """A device whose rows are there at once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(bench, "_one_rank", lambda: None)
    monkeypatch.setattr(bench, "measure", lambda options, *names: bench.Row(*names, held=1))


def test_rows_in_a_file(measured, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert bench.main(["--models", "dense", "--L-r", "2", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert [row["recompute"] for row in record["rows"]] == ["none", "off", "auto", "2"]
    assert record["gpu"] == "a device" and record["options"]["layers"] == 8


def test_the_table_is_printed_though_the_file_cannot_be_written(
    measured, monkeypatch, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.setattr(bench, "_one_rank", folder.rmdir)
    with pytest.raises(FileNotFoundError):
        bench.main(["--models", "dense", "--json", str(folder / "out.json")])
    assert "Eq.20" in capsys.readouterr().out
