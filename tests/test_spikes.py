"""What SpikeWatch takes for usual, whatever metrics.jsonl holds and the losses are."""

import json
from itertools import permutations
from pathlib import Path

import pytest

from mhc_megatron.metrics import MetricsWriter
from mhc_megatron.spikes import SpikeWatch

LINES = [
    json.dumps({"event": "train", "iteration": i, "loss": float(i)}).encode() for i in range(1, 7)
]


@pytest.mark.parametrize(
    "odd",
    [
        b"[1]",
        b"7",
        b"\xff\xff",
        b"\x00" * 40,
        b"[" * 100_000,
        b'{"event": "train", "loss": 9.0}',
        b'{"event": "train", "iteration": "2", "loss": 9.0}',
        b'{"event": "train", "iteration": 0, "loss": "low"}',
        b'{"event": "train", "iteration": 0, "loss": [9.0]}',
        b'{"event": "train", "iteration": 0, "loss": 1' + b"0" * 400 + b"}",
    ],
    ids=lambda line: line[:50].decode("ascii", "replace"),
)
def test_an_odd_line_does_not_block_a_resume(odd: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*LINES[:3], odd, *LINES[3:]]) + b"\n")
    watch = SpikeWatch(2.0)
    watch.resume(path, 5)
    assert watch.usual == 3.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_losses_that_are_not_finite_are_left_out(bad: float, tmp_path: Path) -> None:
    seen = set()
    for losses in permutations((1.0, 2.0, 3.0, 4.0, 5.0, bad)):
        watch = SpikeWatch(2.0)
        for loss in losses:
            watch.record(loss)
        seen.add(watch.usual)
    assert seen == {3.0}
    # The same iteration once more, as MetricsWriter writes such a loss: 4.0 is no longer its loss.
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    with MetricsWriter(path) as writer:
        writer.train(
            iteration=4, consumed_tokens=4, loss=bad, grad_norm=None, lr=None, step_time_s=1.0,
            tokens_per_s=1.0,
        )  # fmt: skip
    watch = SpikeWatch(2.0)
    watch.resume(path, 6)
    assert watch.usual == 3.0  # of 1, 2, 3, 5, 6
