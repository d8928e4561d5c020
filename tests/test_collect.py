"""tools/collect.py: our runs, the bench's reports and the logs of any Megatron run in one table."""

import csv
import json
import sys
from pathlib import Path

import pytest

from mhc_megatron.metrics import MetricsWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import collect  # noqa: E402
from collecting.compare import compare  # noqa: E402
from collecting.sources import find  # noqa: E402

CONFIG = {
    "num_layers": 30,
    "seq_length": 4096,
    "global_batch_size": 64,
    "pipeline_model_parallel_size": 4,
    "expert_model_parallel_size": 8,
}


def write_run(folder: Path, variant: str, seconds: float, gpus: int = 32, **config) -> Path:
    """Ten steps, the first three slow."""
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        metrics.start(
            name=folder.name, config=CONFIG | config, mhc={"variant": variant}, parameters=1,
            hc_parameters=0, device="NVIDIA H100", peak_tflops=1000.0, world_size=gpus,
        )  # fmt: skip
        batch = (CONFIG | config)["global_batch_size"] * 4096
        for step in range(1, 11):
            taken = seconds * (10 if step <= 3 else 1)
            metrics.train(
                iteration=step, consumed_tokens=step * batch, loss=5.0 - step / 10, grad_norm=1.0,
                lr=1e-3, step_time_s=taken, tokens_per_s=batch / taken, tflops=400.0 / taken,
                mfu=0.4 / taken, memory_gib=60.0 + step,
            )  # fmt: skip
    return folder


#: As megatron-core 0.19.2 prints it (training/training.py:2844, training/arguments.py:1916,
#: training/utils/common_utils.py:313, core/timers.py:346), and Megatron-LM for years before it.
LOG = """
------------------------ arguments ------------------------
  global_batch_size ............................... 64
  num_layers ...................................... 30
  pipeline_model_parallel_size .................... 4
  expert_model_parallel_size ...................... 8
  seq_length ...................................... 4096
  world_size ...................................... 32
-------------------- end of arguments ---------------------
[Rank 0] (after 2 iterations) memory (MB) | allocated: 1.00 | max allocated: 62464.00 | reserved: 1
{steps}
"""
STEP = (
    " [2026-11-23 10:00:00] iteration {:8d}/      30 | consumed samples:          320 | elapsed"
    " time per iteration (ms): {:.1f} | throughput per GPU (TFLOP/s/GPU): {:.1f} | learning rate:"
    " 1.0E-04 | global batch size:    64 | lm loss: {:.6E} | loss scale: 1.0 | grad norm: 1.000 |"
)
TIMES = """(min, max) time across ranks (ms):
    forward-backward ...............................: (900.00, 990.00)
    forward-compute ................................: (200.00, 250.00)
    backward-compute ...............................: (400.00, 500.00)
"""


def write_log(path: Path, milliseconds: float = 1000.0) -> Path:
    lines = []
    for step in range(1, 11):
        ms = milliseconds * (5 if step <= 3 else 1)
        lines += [STEP.format(step, ms, 400.0 * 1000 / ms, 5.0 - step / 10), TIMES]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(LOG.format(steps="\n".join(lines)))
    return path


def test_overhead_and_efficiency(tmp_path):
    write_run(tmp_path / "a-none", "none", 1.0)
    write_run(tmp_path / "b-mhc", "mhc", 1.1)
    write_run(tmp_path / "c-mhc-64", "mhc", 1.25, gpus=64, global_batch_size=128)
    write_run(tmp_path / "d-mhc-pp2", "mhc", 2.0, pipeline_model_parallel_size=2)
    plain, mhc, wide, other = compare(find([tmp_path]))
    assert plain.overhead is None and plain.layout == "PP4 EP8" and plain.steps == 10
    assert plain.step_ms == pytest.approx(1000) and plain.mfu == pytest.approx(0.4)
    assert plain.tokens_per_s == pytest.approx(64 * 4096 / 32) and plain.memory_gib == 70.0
    assert mhc.overhead == pytest.approx(0.1) and mhc.scaling == pytest.approx(1.0)
    # Twice the GPUs and twice the batch in 1.25 instead of 1.1 seconds.
    assert wide.scaling == pytest.approx(1.1 / 1.25) and wide.overhead is None
    assert other.layout == "PP2 EP8" and other.overhead is None and other.scaling is None


def test_the_log_of_any_megatron_run(tmp_path):
    (row,) = compare(find([write_log(tmp_path / "slurm-17.out")]), peak_tflops=1000.0)
    assert (row.name, row.variant, row.gpus, row.layout) == ("slurm-17", None, 32, "PP4 EP8")
    assert row.step_ms == pytest.approx(1000) and row.mfu == pytest.approx(0.4)
    assert row.tokens_per_s == pytest.approx(64 * 4096 / 32) and row.loss == pytest.approx(4.0)
    assert row.memory_gib == pytest.approx(61.0) and row.imbalance == pytest.approx(0.25)


def test_a_named_baseline(tmp_path):
    write_log(tmp_path / "main.log", 1000.0)
    write_log(tmp_path / "fork.log", 1250.0)
    found = find([tmp_path / "main.log", tmp_path / "fork.log"])
    assert [row.overhead for row in compare(found, baseline="main")] == [None, pytest.approx(0.25)]


def test_a_resumed_log_counts_a_step_once(tmp_path):
    path = write_log(tmp_path / "slurm.out")
    path.write_text(path.read_text() + STEP.format(8, 1000.0, 400.0, 9.0) + "\n")
    (source,) = find([path])
    assert [step[0] for step in source.steps] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_benchs_report(tmp_path):
    column = {
        "label": "mhc", "mhc": {"variant": "mhc"}, "step_ms": {"median": 20.0},
        "tokens_per_step": 16384, "model_tflops": 500.0, "peak_tflops": 1000.0,
        "step_peak_bytes": 2**36,
    }  # fmt: skip
    plain = column | {"label": "none", "mhc": {"variant": "none"}, "step_ms": {"median": 16.0}}
    report = {"layers": 4, "groups": [{"precision": "bf16", "columns": [plain, column]}]}
    (tmp_path / "bench.json").write_text(json.dumps(report))
    rows = compare(find([tmp_path]))
    assert [row.overhead for row in rows] == [None, pytest.approx(0.25)]
    assert rows[1].memory_gib == 64.0 and rows[1].tokens_per_s == pytest.approx(16384 / 0.02)


def test_table_csv_json_and_plot(tmp_path, capsys):
    write_run(tmp_path / "runs" / "none", "none", 1.0)
    write_run(tmp_path / "runs" / "mhc", "mhc", 1.1)
    out = tmp_path / "out"
    assert collect.main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "| mhc  | mhc     | 32   | PP4 EP8 | 1100.0   |" in said and "+10.0%" in said
    assert "imbalance" not in said  # nothing fills it
    assert (out / "collect.md").read_text() == said
    with open(out / "collect.csv") as f:
        assert [row["name"] for row in csv.DictReader(f)] == ["mhc", "none"]
    assert json.loads((out / "collect.json").read_text())[0]["overhead"] == pytest.approx(0.1)
    assert (out / "collect.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("x", "y"):
        write_run(tmp_path / parent / "run", "mhc", 1.0)
    assert [source.name for source in find([tmp_path])] == ["x/run", "y/run"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "no run with a step"),
        (lambda p: p.write_text("nothing\n"), "no run with a step"),
    ],
)
def test_nothing_to_collect(make, sentence, tmp_path, capsys):
    make(tmp_path / "x")
    assert collect.main([str(tmp_path / "x")]) == 2
    assert sentence in capsys.readouterr().err


def test_unknown_gpu(tmp_path, capsys):
    assert collect.main([str(write_log(tmp_path / "a.log")), "--gpu", "Z9"]) == 2
    assert "its peak is not known" in capsys.readouterr().err
