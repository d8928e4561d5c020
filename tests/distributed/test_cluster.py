"""The harness itself: what is tried again and what is not."""

import os
import signal
from pathlib import Path

import pytest

from tests.distributed.cluster import RankError

pytestmark = pytest.mark.distributed

NAME = "tests.distributed.test_cluster"


def killed(job: dict) -> str:
    """Ends by a signal until it was tried ``job["times"]`` times."""
    tries = Path(job["tries"])
    count = len(tries.read_text()) if tries.exists() else 0
    tries.write_text("x" * (count + 1))
    if count < job["times"]:
        os.kill(os.getpid(), signal.SIGSEGV)
    return "answer"


def raises(job: dict) -> None:
    Path(job["tries"]).open("a").write("x")
    raise ValueError("wrong")


def test_a_killed_rank_is_tried_once_more(cluster, tmp_path) -> None:
    job = {"tries": str(tmp_path / "tries"), "times": 1}
    with pytest.warns(UserWarning, match="tried again"):
        assert cluster.run(f"{NAME}:killed", 1, job) == ["answer"]


def test_a_rank_that_is_killed_twice_is_an_error(cluster, tmp_path) -> None:
    job = {"tries": str(tmp_path / "tries"), "times": 2}
    with pytest.warns(UserWarning), pytest.raises(RankError, match="without an answer"):
        cluster.run(f"{NAME}:killed", 1, job)


def test_what_raises_is_not_tried_again(cluster, tmp_path) -> None:
    with pytest.raises(RankError, match="wrong"):
        cluster.run(f"{NAME}:raises", 1, {"tries": str(tmp_path / "tries")})
    assert (tmp_path / "tries").read_text() == "x"
