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
    others have five seconds. Those that have not ended then say in ``log`` where they are.
    """
    environment = os.environ | variables
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    environment["PYTHONFAULTHANDLER"] = "1"  # stacks of what had to be ended
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
            found = _wait(ranks, deadline, seconds)
            if found:
                _print_stacks(ranks)
            return found
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


def _print_stacks(ranks: list[subprocess.Popen]) -> None:
    """Those still at work end with the stacks of their threads in the log."""
    alive = [rank for rank in ranks if rank.poll() is None]
    for rank in alive:
        rank.send_signal(signal.SIGABRT)
    deadline = time.monotonic() + 3
    while any(rank.poll() is None for rank in alive) and time.monotonic() < deadline:
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
