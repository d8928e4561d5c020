"""One command as the ranks of a job on this host, as torchrun starts them, within a time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

#: What is said of a command that had to be ended.
LATE = "not done in {:.0f} s"


def run(command: list[str], world: int, seconds: float, log: Path, **variables: str) -> str:
    """Run ``command`` (words after the interpreter) on ``world`` ranks; returns why it failed.

    All output is appended to ``log``. Empty where every rank ended with 0. When one fails, the
    others have five seconds.
    """
    environment = os.environ | variables
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if world > 1:
        environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(_free_port())}  # fmt: skip
    deadline = time.monotonic() + seconds
    with log.open("ab") as f:
        f.write(f"\n=== {world} x {' '.join(command)}\n".encode())
        f.flush()
        ranks = [
            subprocess.Popen(
                [sys.executable, *command],
                env=environment | ({"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {}),
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=f,
                start_new_session=True,
            )
            for r in range(world)
        ]
        try:
            return _wait(ranks, deadline, seconds)
        finally:
            for rank in ranks:
                try:
                    os.killpg(rank.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                rank.wait()


def _wait(ranks: list[subprocess.Popen], deadline: float, seconds: float) -> str:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(r, code) for r, code in enumerate(codes) if code]
        if failed:
            deadline = min(deadline, time.monotonic() + 5)
        if all(code is not None for code in codes) or time.monotonic() > deadline:
            if failed:
                return f"rank {failed[0][0]} ended with {failed[0][1]}"
            return "" if None not in codes else LATE.format(seconds)
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
