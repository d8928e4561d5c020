"""MetricsWriter: what it writes reads back, whatever the process before it left behind."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhc_megatron import metrics
from mhc_megatron.metrics import MetricsWriter, is_validated, read_records

TRAIN: dict[str, Any] = {
    "iteration": 10,
    "consumed_tokens": 40960,
    "loss": 5.25,
    "grad_norm": 1.5,
    "lr": 1e-3,
    "step_time_s": 0.25,
    "tokens_per_s": 16384.0,
}
LISTS = (
    "forward_max", "forward_min", "backward_max", "backward_min",
    "composite_forward_max", "composite_forward_min",
    "composite_backward_max", "composite_backward_min", "row_error", "column_error",
)  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    """The file's records, read strictly: every line whole, no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def start(writer: MetricsWriter, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "name": "mhc",
        "config": {"lr": 1e-3},
        "mhc": {"variant": "mhc", "n": 4},
        "parameters": 100,
        "hc_parameters": 10,
        "device": "cpu",
    }
    writer.start(**(fields | changes))


def test_every_event_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        start(writer, unigram_entropy=3.25)
        writer.train(**TRAIN, mfu=0.4)
        writer.valid(iteration=10, consumed_tokens=40960, loss=5.5)
        gains = {name: [1.0 + k, 2.0 + k] for k, name in enumerate(LISTS)}
        writer.stability(
            iteration=10, consumed_tokens=40960, sublayers=["0.attn", "0.mlp"], seconds=0.1, **gains
        )
        writer.save(iteration=10, path="ckpt")
        writer.resume(iteration=10)
        writer.exit(iteration=10, reason="SIGTERM")
    records = lines(path)
    assert [r["event"] for r in records] == [
        "start", "train", "valid", "stability", "save", "resume", "exit"
    ]  # fmt: skip
    assert records[0]["unigram_entropy"] == 3.25
    assert records[0]["mhc"] == {"variant": "mhc", "n": 4}
    assert records[1] == {"event": "train", **TRAIN, "tflops": None, "mfu": 0.4, "memory_gib": None}
    assert records[3]["column_error"] == [10.0, 11.0]
    assert records[6]["reason"] == "SIGTERM"


def test_values_json_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        config = {"path": Path("a/b"), "betas": (0.9, math.inf), "array": np.float32([0.5, np.nan])}
        start(writer, config=config, parameters=np.int64(7))
        writer.train(**(TRAIN | {"loss": math.nan, "grad_norm": math.inf, "lr": np.float32(0.5)}))
    first, second = lines(path)
    assert first["config"] == {"path": "a/b", "betas": [0.9, None], "array": [0.5, None]}
    assert first["parameters"] == 7
    assert (second["loss"], second["grad_norm"], second["lr"]) == (None, None, 0.5)


@pytest.mark.parametrize(
    ("left", "kept", "removed"),
    [
        (b'{"event":"a"}\n', b'{"event":"a"}\n', 0),
        (b'{"event":"a"}\n{"event":"tr', b'{"event":"a"}\n', 12),
        (b'{"event":"a"}\n{"event":"b"}', b'{"event":"a"}\n{"event":"b"}\n', 0),
        (b'{"event":"a"}\n12', b'{"event":"a"}\n', 2),
        (b'{"ev', b"", 4),
        (b'{"event":"a"}\n' + bytes(200_000), b'{"event":"a"}\n', 200_000),
        (b'{"event":"a"}\n' + b"[" * 100_000, b'{"event":"a"}\n', 100_000),
        (b"", b"", 0),
    ],
)
def test_a_cut_last_line_is_repaired(
    tmp_path: Path, left: bytes, kept: bytes, removed: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(left)
    with MetricsWriter(path) as writer:
        assert writer.repaired_bytes == removed
        assert path.read_bytes() == kept
        writer.resume(iteration=5)
    assert lines(path)[-1]["iteration"] == 5
    assert path.read_bytes().startswith(kept)


def test_one_write_a_line_and_fsync_where_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    write, sync = os.write, os.fsync
    monkeypatch.setattr(metrics.os, "write", lambda f, d: (calls.append("write"), write(f, d))[1])
    monkeypatch.setattr(metrics.os, "fsync", lambda f: (calls.append("fsync"), sync(f))[1])
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.train(**TRAIN)
        writer.save(iteration=10)
        writer.valid(iteration=10, consumed_tokens=1, loss=1.0)
        writer.exit(iteration=10, reason="finished")
    assert calls == ["write", "write", "fsync", "write", "write", "fsync"]


def test_a_full_disk_leaves_no_part_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    write = os.write
    with MetricsWriter(path) as writer:
        writer.train(**TRAIN)
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(metrics.os, "write", lambda f, d: write(f, d[:9]))
            with pytest.raises(OSError) as failure:
                writer.train(**TRAIN)
        assert failure.value.errno == errno.ENOSPC
        assert path.read_bytes() == before
        writer.train(**TRAIN)
    assert len(lines(path)) == 2


def test_a_killed_process_leaves_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, sys; from mhc_megatron.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for i in range(5): writer.valid(iteration=i, consumed_tokens=i, loss=1.0)\n"
        "os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    killed = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False)
    assert killed.returncode == -9
    assert [r["iteration"] for r in lines(path)] == list(range(5))


def test_stability_lists_must_match(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    gains: dict[str, Any] = {name: [1.0] for name in LISTS} | {"row_error": [0.0, 0.0]}
    with MetricsWriter(path) as writer, pytest.raises(ValueError, match="row_error has 2 entries"):
        writer.stability(iteration=1, consumed_tokens=1, sublayers=["0.attn"], seconds=0.0, **gains)
    assert path.read_bytes() == b""


def test_closing_twice(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.close()
    writer.close()
    with pytest.raises(OSError):
        writer.save(iteration=1)


def test_reading_leaves_out_what_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'[1]\n\xff\xff\n\n{"event":"a"}\n' + b"[" * 100_000 + b'\n{"event":"b"}\n{"e')
    assert list(read_records(path)) == [{"event": "a"}, {"event": "b"}]


@pytest.mark.parametrize(
    ("after", "still"),
    [
        ([], True),
        ([("resume", 10), ("train", 11), ("valid", 11)], True),
        ([("save", 5), ("valid", None), ("train", "5")], True),
        ([("resume", 9)], False),
        ([("train", 1)], False),  # from the beginning: there is no resume record
        ([("train", 10)], False),
        ([("valid", 5)], False),
        ([("resume", 9), ("valid", 10)], True),
    ],
)
def test_what_makes_an_evaluation_void(
    after: list[tuple[str, Any]], still: bool, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [("train", 10), ("valid", 10), *after]
    path.write_text("".join(json.dumps({"event": e, "iteration": i}) + "\n" for e, i in records))
    assert is_validated(path, 10) is still
    assert not is_validated(path, 12)
