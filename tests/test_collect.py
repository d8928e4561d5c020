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


def test_lines_that_cannot_be_used_are_left_out_and_named(tmp_path, capsys):
    path = write_run(tmp_path / "run", "mhc", 1.0) / "metrics.jsonl"
    (whole,) = compare(find([tmp_path]))
    step = {"event": "train", "iteration": 11, "step_time_s": 1.0}
    bad = [[1], {"event": "resume"}, {"event": "train"}, step | {"step_time_s": 0},
           step | {"step_time_s": None}, step | {"iteration": "x"}, 3, None]  # fmt: skip
    lines = [json.dumps(line) for line in bad]
    # A step without loss, tokens and FLOPs is one, and so is the last line of a run that goes on.
    nulls = step | {"loss": None, "tflops": None, "tokens_per_s": None, "memory_gib": None}
    path.write_text(path.read_text() + "\n".join([*lines, json.dumps(nulls), '{"event": "tr']))
    assert collect.main([str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "9 corrupted lines left out (line 12, 13, 14," in said.err
    (row,) = json.loads(said.out)
    assert row["steps"] == 11 and row["step_ms"] == whole.step_ms and row["loss"] == whole.loss


def test_a_start_record_of_another_kind(tmp_path):
    path = write_run(tmp_path / "run", "mhc", 1.0) / "metrics.jsonl"
    start = {"event": "start", "config": [], "mhc": 3, "world_size": "x", "peak_tflops": 0}
    path.write_text(json.dumps(start) + "\n" + path.read_text().split("\n", 1)[1])
    (row,) = compare(find([tmp_path]))
    assert (row.variant, row.gpus, row.mfu, row.steps) == (None, None, None, 10)


def test_steps_of_a_log_without_a_time(tmp_path, capsys):
    path = write_log(tmp_path / "a.log")
    broken = [STEP.format(11, 0.0, 400.0, 9.0),
              STEP.format(12, 9.0, 400.0, 9.0).replace(": 9.0 |", ": 1.2.3 |")]  # fmt: skip
    path.write_text(path.read_text() + "\n".join(broken) + "\n")
    assert collect.main([str(path), "--json"]) == 0
    said = capsys.readouterr()
    assert "a.log: 2 corrupted lines left out" in said.err
    assert json.loads(said.out)[0]["steps"] == 10


@pytest.mark.parametrize("groups", [5, None, {"a": 1}])
def test_a_report_of_something_else(groups, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"groups": groups}))
    assert collect.main([str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.endswith("is not a report of tools/bench_training.py\n")


def test_columns_of_a_report_that_cannot_be_used(tmp_path, capsys):
    good = {"label": "mhc", "step_ms": {"median": 20.0}}
    columns = [good, 5, {"label": "x", "step_ms": 3}, {"step_ms": {"median": 1.0}}]
    columns += [{"label": "y", "step_ms": {"median": 0}}, {"label": "z", "step_ms": None}]
    report = {"groups": [5, {"columns": []}, {"precision": "bf16", "columns": columns}]}
    (tmp_path / "bench.json").write_text(json.dumps(report))
    assert collect.main([str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("left out") == said.err.count("\n") == 6
    assert [row["step_ms"] for row in json.loads(said.out)] == [20.0]


def test_unknown_gpu(tmp_path, capsys):
    assert collect.main([str(write_log(tmp_path / "a.log")), "--gpu", "Z9"]) == 2
    assert "its peak is not known" in capsys.readouterr().err
