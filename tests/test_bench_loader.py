"""tools/bench_loader.py: what it measures, and that it says what it lacks."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mhc_megatron import dali

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench_loader  # noqa: E402

WORDS = ["--seq-length", "64", "--batches", "5", "--rounds", "2", "--workers", "0"]


def run(tmp_path, *words: str) -> int:
    return bench_loader.main([*WORDS, "--folder", str(tmp_path), *words])


@pytest.mark.parametrize("cold", [[], ["--cold"]])
def test_the_default_loader(cold, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["--tokens", "5000", "--step-ms", "0,10", "--loaders", "megatron", *cold]
    assert run(tmp_path, *words, "--json", str(out)) == 0
    rounds = json.loads(out.read_text())["rounds"]
    assert [(r["loader"], r["step_ms"]) for r in rounds] == [("megatron", 0)] * 2 + [
        ("megatron", 10)
    ] * 2
    # Five steps of 10 ms are not waiting.
    assert all(r["seconds"] - r["waited"] >= 0.05 for r in rounds[2:])
    assert all(0 < r["waited"] <= r["seconds"] and r["cpu"] >= 0 for r in rounds)
    assert capsys.readouterr().out.count("| megatron |") == 2
    assert list(tmp_path.iterdir()) == [out]  # no corpus, no index is left


@pytest.mark.skipif(not dali.is_installed(), reason="nvidia-dali is not installed")
def test_both_loaders_read_the_same(tmp_path):
    prefix = str(tmp_path / "random")
    bench_loader.write_random(prefix, 5000)
    dataset = bench_loader.make_dataset(prefix, 64, 26, str(tmp_path))
    ours, theirs = (make(dataset, 2, 0) for make in bench_loader._LOADERS.values())
    count = 0
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)
        count += 1
    assert count >= 13


@pytest.mark.skipif(dali.is_installed(), reason="nvidia-dali is installed")
def test_without_dali_it_says_so(tmp_path, capsys):
    assert run(tmp_path, "--tokens", "5000") == 2
    assert "nvidia-dali is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "no/such"], "no/such.bin does not exist"),
        (["--tokens", "60", "--loaders", "megatron"], "60 tokens, fewer than one sequence of 64"),
    ],
)
def test_bad_corpora(words, sentence, tmp_path, capsys):
    assert run(tmp_path, *words, "--loaders", "megatron") == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--tokens", "0"], ["--tokens", "9", "--workers", "-1"], []])
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_loader.main(words)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("bench_loader: ")
