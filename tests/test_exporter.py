"""What a run tells Prometheus, and the alarm on the composite gain."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_pretrain import CONFIG, arguments, corpus, launch, records  # noqa: F401

from mhc_megatron.errors import UserError
from mhc_megatron.exporter import METRICS, Exporter

ROOT = Path(__file__).resolve().parent.parent

#: A sample of Prometheus' text format.
SAMPLE = re.compile(r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)+)\} (\S+)')


def read(text: str) -> dict[str, float]:
    """Metric with its labels -> value; fails on a line that Prometheus would not read."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            found[f"{match[1]}{{{match[2]}}}"] = float(match[3])
    return found


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="prometheus: .*/file/in: Not a directory"):
        Exporter(str(tmp_path / "file" / "in"), "a run")


def test_the_text_format(tmp_path):
    exporter = Exporter(str(tmp_path / "new"), 'a "run"\\')
    exporter.set("mhc_composite_gain", 1.5, direction="forward", side="max")
    exporter.write({"mhc_iteration": 3, "mhc_mfu_ratio": None, "mhc_loss_nats": float("nan")})
    text = open(exporter.path).read()
    label = r'run="a \"run\"\\"'
    assert read(text) == {
        f"mhc_iteration{{{label}}}": 3.0,
        f'mhc_composite_gain{{{label},direction="forward",side="max"}}': 1.5,
    }
    assert text.count("# TYPE mhc_iteration counter\n") == 1 and text.endswith("\n")
    exporter.write({"mhc_iteration": float("inf")})
    assert "mhc_iteration" not in open(exporter.path).read()


def test_a_folder_that_cannot_be_written_does_not_stop_a_run(tmp_path, capsys):
    exporter = Exporter(str(tmp_path), "run")
    (tmp_path / "mhc_run.prom.new").mkdir()
    exporter.write({"mhc_iteration": 1})
    assert "mhc_run.prom" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the CPU mode")
@pytest.mark.filterwarnings("ignore")
def test_a_run_exports_its_numbers_and_sounds_the_alarm(corpus, tmp_path):  # noqa: F811
    """The composite gain of the first step is 1 within rounding: a threshold below it is passed."""
    path, run = tmp_path / "small.yaml", tmp_path / "run"
    path.write_text(CONFIG.format(data=corpus))
    changes = ["train-iters=5", "save-interval=5", f"run.prometheus={tmp_path}"]
    words = arguments(str(path), run, *changes, "run.alarm_gain=0.5", "run.name=it")
    assert launch(words, tmp_path / "out") == 0, (tmp_path / "out").read_text()
    found = read((tmp_path / "mhc_it.prom").read_text())
    last = records(run, "train")[-1]
    assert found['mhc_iteration{run="it"}'] == 5.0 == found['mhc_checkpoint_iteration{run="it"}']
    assert found['mhc_loss_nats{run="it"}'] == pytest.approx(last["loss"])
    assert found['mhc_step_time_seconds{run="it"}'] == pytest.approx(last["step_time_s"])
    gains = records(run, "stability")[-1]
    key = 'mhc_composite_gain{run="it",direction="backward",side="max"}'
    assert found[key] == pytest.approx(gains["composite_backward_max"][-1])
    assert found['mhc_gain_alarm{run="it"}'] == 1.0
    names = {key.partition("{")[0] for key in found}
    # No GPU: no peak, no memory.
    assert METRICS.keys() - names == {"mhc_mfu_ratio", "mhc_memory_peak_gib"}
    # Once when it is passed, not at every measurement.
    (alarm,) = records(run, "alarm")
    assert alarm["iteration"] == 1 and alarm["threshold"] == 0.5
    assert (tmp_path / "out").read_text().count("ALARM: iteration 1: the composite gain is") == 1
    assert json.dumps(alarm)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the CPU mode")
@pytest.mark.filterwarnings("ignore")
def test_wandb_works_without_a_network(corpus, tmp_path):  # noqa: F811
    """launch/env.sh's WANDB_MODE; `wandb sync` takes what is left behind."""
    path, run = tmp_path / "small.yaml", tmp_path / "run"
    path.write_text(CONFIG.format(data=corpus))
    changes = ["train-iters=5", "wandb-project=p", "wandb-exp-name=e", "save-interval=5"]
    changes.append("tensorboard-log-interval=1")
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py")]
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    result = subprocess.run(
        [*command, *arguments(str(path), run, *changes)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (kept,) = (run / "wandb").glob("wandb/offline-run-*/run-*.wandb")
    assert b"lm loss" in kept.read_bytes()
