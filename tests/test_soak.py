"""Runs that are killed again and again (tests/soak.py): twice, and 100 times in the slow test."""

import pytest
import soak
import torch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="checks the CPU mode"),
]


def check(folder, kills: int, ranks: int) -> None:
    result = soak.soak(folder, kills, ranks)
    assert sum(result.kills.values()) == kills
    assert result.left_behind == []
    assert soak.different(folder) == []
    assert len(soak.tensors(folder / "run")) > 40


@pytest.mark.slow
def test_two_kills(tmp_path):
    check(tmp_path, kills=2, ranks=1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills(tmp_path):
    check(tmp_path, kills=100, ranks=2)
