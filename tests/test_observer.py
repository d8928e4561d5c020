"""Which evaluations the observer records, over the processes of one run."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mhc_megatron import observer
from mhc_megatron.config import MHCConfig
from mhc_megatron.files import read_records


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function of an iteration: the observer of a new process that goes on from there."""
    run = SimpleNamespace(
        dir=str(tmp_path), name="run", stability_interval=0, hang_minutes=0, prometheus=None,
        alarm_gain=0.0, loss_spike="log", spike_factor=0.0,
    )  # fmt: skip
    args = Namespace(
        iteration=0, fp8=None, data_path=None, world_size=1, load=None, consumed_train_samples=1,
        seq_length=8,
    )  # fmt: skip
    monkeypatch.setattr(observer, "get_args", lambda: args)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "cpu")

    def process(iteration: int) -> observer.Observer:
        args.iteration = iteration
        made = observer.Observer(run, MHCConfig(), None)
        made.iteration = iteration
        made._start(1, 0)
        return made

    return process


def evaluate(process: observer.Observer, iteration: int, loss: float) -> None:
    process.iteration = iteration
    process._evaluate(lambda: ({"lm loss": torch.tensor(loss)}, None, False))


def valid(folder: Path) -> list[tuple[int, float]]:
    found = read_records(folder / "metrics.jsonl")
    return [(r["iteration"], r["loss"]) for r in found if r["event"] == "valid"]


def test_a_complete_run_started_again_records_no_other_evaluation(start, tmp_path: Path) -> None:
    process = start(0)
    for iteration, loss in ((6, 3.0), (12, 2.0), (12, 1.0)):
        evaluate(process, iteration, loss)
    evaluate(start(12), 12, 1.0)
    evaluate(start(12), 12, 1.0)
    assert valid(tmp_path) == [(6, 3.0), (12, 2.0)]


def test_what_an_earlier_process_could_not_record_is_recorded(start, tmp_path: Path) -> None:
    evaluate(start(0), 6, 3.0)
    evaluate(start(12), 12, 2.0)
    # Back to 6, and on to 12 once more: what stands there of 12 is another training's.
    evaluate(start(6), 12, 1.5)
    start(6)
    evaluate(start(12), 12, 1.25)
    # From the beginning in the same folder, without a resume record.
    evaluate(start(0), 6, 2.5)
    evaluate(start(12), 12, 1.0)
    assert valid(tmp_path) == [(6, 3.0), (12, 2.0), (12, 1.5), (12, 1.25), (6, 2.5), (12, 1.0)]
