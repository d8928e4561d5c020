"""Processes of a parallel layout on one machine, for tests.

``Cluster`` starts one server process that imports torch and Megatron once. For every job the server
forks a process for each rank; they meet over gloo, run the job's function and send its result back.
A fork takes milliseconds where an import takes seconds, and no job can leave anything behind for
the next one.

    with Cluster() as cluster:
        results = cluster.run("tests.distributed.job:train", world=4, job={...})    # one per rank
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
from typing import Any, BinaryIO

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

#: Seconds that a job may take before its processes are ended.
JOB_SECONDS = 180

#: What a training run imports while it starts, seconds of each rank's time.
_LATE_IMPORTS = ("megatron.core.tokenizers.text", "torch.utils.tensorboard")

#: What is said of a rank whose process is gone.
_KILLED = "ended without an answer"


class RankError(Exception):
    """A rank raised; the message is its traceback."""


class Cluster:
    """A server that runs jobs on forked ranks. Use it as a context manager."""

    def __enter__(self) -> Cluster:
        path = os.pathsep.join([_ROOT, os.path.join(_ROOT, "kernels")])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.cluster"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env=environment,
        )
        return self

    def run(self, function: str, world: int, job: dict[str, Any]) -> list[Any]:
        """Results of ``module:function(job)`` on ranks 0..world-1.

        A rank that a signal killed is tried once more, with a warning: gloo's own thread was seen
        to crash once (pt_gloo_runloop, a segmentation fault inside libc), cause unknown. What
        raises, hangs or differs is not tried again.

        Raises:
            RankError: the first rank that failed, with its traceback; the others were ended.
        """
        for attempt in (1, 2):
            _send(self._server.stdin, (function, world, job))
            failed, value = _receive(self._server.stdout)
            if not failed:
                return value
            if attempt == 2 or not value.endswith(_KILLED):
                raise RankError(value)
            warnings.warn(f"{function} {job.get('layout')}: {value}; tried again", stacklevel=2)
            for key in ("save", "save_initial"):
                shutil.rmtree(job.get(key) or "", ignore_errors=True)

    def __exit__(self, *error: object) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()


def _send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        raise RankError("the cluster's server has ended")
    return pickle.loads(stream.read(struct.unpack("<Q", header)[0]))


# ------------------------------------------------------------------------------------- the server


def _serve() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to stderr
    _import_everything()
    gc.collect()
    gc.freeze()  # no collection in a rank looks at what was imported here
    while True:
        try:
            function, world, job = _receive(requests)
        except RankError:
            return
        _send(answers, _run(function, world, job))


def _import_everything() -> None:
    import torch

    from mhc_megatron import cpu, faults

    torch.set_num_threads(1)
    cpu.enable()
    faults.guard_checkpoint_writers()  # as launch/pretrain.py; for the seconds that it saves
    for name in ("tests.distributed.job", "mhc_megatron.training", *_LATE_IMPORTS):
        importlib.import_module(name)


def _run(function: str, world: int, job: dict[str, Any]) -> tuple[bool, Any]:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=_rank, args=(function, rank, world, folder, job, pipe[1]))
            for rank, pipe in enumerate(pipes)
        ]
        for process, (_, writer) in zip(ranks, pipes, strict=True):
            process.start()
            writer.close()
        try:
            return _collect([reader for reader, _ in pipes])
        finally:
            for process in ranks:
                process.join(timeout=0.2)
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                process.join()


def _collect(readers: list) -> tuple[bool, Any]:
    """(False, results) or (True, the first traceback)."""
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = [reader for i, reader in enumerate(readers) if i not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=JOB_SECONDS)
        if not ready:
            return True, f"no rank answered within {JOB_SECONDS} s"
        for reader in ready:
            rank = readers.index(reader)
            try:
                failed, value = reader.recv()
            except EOFError:
                return True, f"rank {rank} {_KILLED}"
            if failed:
                return True, f"rank {rank}:\n{value}"
            results[rank] = value
    return False, [results[rank] for rank in range(len(readers))]


def _rank(function: str, rank: int, world: int, folder: str, job: dict[str, Any], pipe) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    if not job.get("verbose"):
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        module, name = function.split(":")
        pipe.send((False, getattr(importlib.import_module(module), name)(job)))
        dist.barrier()
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    pipe.close()
    # A saved checkpoint leaves the server of Megatron's results queue (core/dist_checkpointing/
    # strategies/filesystem_async.py:53), 300 MB each: without this it would outlive the rank.
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    os._exit(0)


if __name__ == "__main__":
    # Under its own name, so that what is pickled here is found there.
    importlib.import_module("tests.distributed.cluster")._serve()
