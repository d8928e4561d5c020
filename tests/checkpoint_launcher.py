"""Runs launch/pretrain.py in forked ranks, for tests; a process of its own.

Imports Megatron once, then takes one JSON line for each run ({argv, output, world}) and answers
with the ranks' exit codes. Forking is safe here: this process has started no threads.
"""

from __future__ import annotations

import json
import multiprocessing.util
import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def main() -> None:
    import torch

    import mhc_megatron.training  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        pids = [_fork(job, rank, port) for rank in range(job["world"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def _fork(job: dict, rank: int, port: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    handle = os.open(f"{job['output']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.argv = ["launch/pretrain.py"]
    import launch.pretrain

    code = 1
    try:
        code = launch.pretrain.main([*job["argv"], "--verbose"])
        multiprocessing.util._exit_function()  # Megatron's writers have a manager process
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
