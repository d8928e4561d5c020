"""What a rank does about faults: it notes why it ends, leaves nothing behind, and never just hangs.

- ``stop_when_asked``: SIGUSR1 means "save and end", as SIGTERM and Ctrl-C do. It is the signal for
  a whole job step: processes that a rank starts (writers of checkpoints, loaders) do not die of it.
- ``die_with_launcher``: a rank whose launcher was killed ends at once; otherwise it would train on,
  and write into the same folder as the run that replaces it.
- ``guard_checkpoint_writers``: the processes that Megatron starts for its saves end with their
  rank, and a rank whose writer has died ends too, where it would wait for it for ever.
- ``Watchdog``: a rank that makes no progress prints the stacks of all its threads and ends.
- ``note``: one line in the run's ``faults.jsonl`` on why a rank ends; ``launch/supervise.py`` reads
  it and decides how to go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import functools
import json
import multiprocessing
import multiprocessing.managers
import multiprocessing.util
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mhc_megatron.files import append_line, read_records, replacing

#: In the run's folder: one JSON object a line, appended by any rank.
FAULTS_FILE = "faults.jsonl"
#: In the environment of what launch/supervise.py starts: which attempt it is.
ATTEMPT = "MHC_ATTEMPT"
#: In the run's folder: iterations that are not trained, a JSON list.
SKIP_FILE = "skip-iterations.json"

#: Megatron's rerun machine (core/rerun_state_machine.py:37, 40) ends a process with these.
EXIT_RERUN_ELSEWHERE, EXIT_BAD_RESULT = 16, 17

_PR_SET_PDEATHSIG = 1
#: faulthandler's own first words in a dump made by ``Watchdog``.
HUNG = "Timeout ("


def hold_stop_signal() -> None:
    """Block SIGUSR1 until ``stop_when_asked``. To be called before any thread is there.

    Threads and children inherit the mask, children also through exec: a signal to a whole job step
    reaches the ranks and leaves what they started alone.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def stop_when_asked() -> None:
    """SIGINT and SIGUSR1 ask for what SIGTERM asks for: save and end. A second SIGINT ends at once.

    SIGUSR1 stays blocked (``hold_stop_signal``); a thread waits for it.
    """
    rank = os.getpid()

    def interrupt(signum, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    def forward() -> None:
        while True:
            signal.sigwait({signal.SIGUSR1})
            os.kill(rank, signal.SIGTERM)

    signal.signal(signal.SIGINT, interrupt)
    hold_stop_signal()
    threading.Thread(target=forward, name="stop-signal", daemon=True).start()


def dump_stacks_when_asked() -> None:
    """SIGUSR2 prints the stacks of all threads to standard error; the process goes on."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def die_with_launcher() -> None:
    """End this process (SIGKILL) when the process that started it ends.

    Only under torchrun or Slurm: a process started from a shell outlives it where the user wants.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_workers_at_exit() -> None:
    """Kill the data loader's workers that are left when this process exits.

    They are sent SIGTERM then and waited for, but Megatron gives them a handler that takes it for
    a request to the rank (training/datasets/data_samplers.py:95): a run that ended with an error
    would never go.
    """

    def kill() -> None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    multiprocessing.util.Finalize(None, kill, exitpriority=5)


def guard_checkpoint_writers() -> None:
    """Tie the processes that Megatron starts for its saves to their rank.

    Under core/dist_checkpointing/strategies: a manager (filesystem_async.py:53, ``ctx.Manager()``)
    and, with ``async-save``, a writer (async_utils.py:380). Either serves for ever and takes
    300 MB or more. Here they begin with ``_end_with_parent``, and the manager stays small.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async as module

    def get_write_results_queue(mp_mode: str = "spawn"):
        if module._results_queue is None:
            # Its class, not the function of that name: only it takes an initializer.
            manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(initializer=_end_with_parent)
            module._results_queue = _PackedQueue(manager.Queue())
            module._results_queue.manager = manager  # the process ends with the last reference
        return module._results_queue

    module.get_write_results_queue = get_write_results_queue
    _guard_asynchronous_writer()


class _PackedQueue:
    """A manager's queue that is given bytes.

    The manager unpickles what it keeps. A save's results as they are make it import torch, which
    takes the first save some 3 s and the node 500 MB a rank.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def __reduce__(self):
        return _PackedQueue, (self._queue,)  # for a writer: without the manager itself

    def put(self, item: Any) -> None:
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def _guard_asynchronous_writer() -> None:
    """A rank notices that its writer has died; the writer goes when the rank ends without a close.

    ``PersistentAsyncCaller`` asks a queue whether a save is done, never whether anybody is left to
    do it: that save would stay unfinished, and the next one would wait for ever.
    """
    import torch
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    schedule = PersistentAsyncCaller.schedule_async_call
    done = PersistentAsyncCaller.is_current_async_call_done

    def schedule_async_call(self, async_req):
        if async_req.async_fn is not None:
            process = self._get_process(torch.distributed.get_rank())
            _need_alive(process)
            staged = self._persistent_preload_q
            if "join" not in vars(staged):
                staged.join = functools.partial(_join_while_alive, process, staged.join)
        return schedule(self, async_req)

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        while self.process and self.cur_item is None and self._persistent_comp_q.empty():
            _need_alive(self.process)
            if not blocking:
                break
            time.sleep(0.1)
        return done(self, blocking, no_dist)

    def kill() -> None:
        if PersistentAsyncCaller._persistent_process is not None:
            PersistentAsyncCaller._persistent_process.kill()

    PersistentAsyncCaller.schedule_async_call = schedule_async_call
    PersistentAsyncCaller.is_current_async_call_done = is_current_async_call_done
    PersistentAsyncCaller.async_loop = staticmethod(_write_checkpoints)
    # multiprocessing's own end of its children, SIGTERM and a wait, comes after its finalizers.
    multiprocessing.util.Finalize(None, kill, exitpriority=10)


def _need_alive(process: multiprocessing.Process) -> None:
    if not process.is_alive():
        raise RuntimeError(f"the writer of checkpoints has died (exit code {process.exitcode})")


def _join_while_alive(process: multiprocessing.Process, join: Callable[[], None]) -> None:
    """Wait for the writer to have taken what it is to save, as long as there is a writer."""
    waiting = threading.Thread(target=join, daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(0.2)
        if waiting.is_alive():
            _need_alive(process)


def _write_checkpoints(*args: Any) -> None:
    """``PersistentAsyncCaller.async_loop`` in the writer's process, where nothing is replaced."""
    _end_with_parent()
    import torch

    if not torch.cuda.is_available():
        from mhc_megatron import cpu

        cpu.stand_in_for_cuda()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)


def _end_with_parent() -> None:
    """Leave stop signals to the rank; end when it has ended."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Watchdog:
    """Ends a process that makes no progress, after printing where each of its threads is.

    The timer is faulthandler's: it runs without the interpreter, so that a call that never returns
    cannot keep it from its work. It starts with the first ``progress``.

    Args:
        minutes: without progress; 0 for no watchdog.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60.0 * minutes

    def progress(self) -> None:
        """Say that the process is alive."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True)

    def stop(self) -> None:
        """No more progress is expected."""
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()


def note(run_dir: str, code: int, reason: str, iteration: int | None, **more: Any) -> None:
    """Append why this rank ends to the run's ``faults.jsonl``; a full disk does not stop it."""
    record = {
        "time": time.time(),
        "rank": int(os.environ.get("RANK", "0")),
        "node": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "code": code,
        "reason": " ".join(reason.split())[:600],
        "iteration": iteration,
        "attempt": os.environ.get(ATTEMPT),
        **more,
    }
    with contextlib.suppress(OSError):
        line = json.dumps(record, separators=(",", ":"))
        append_line(os.path.join(run_dir, FAULTS_FILE), line)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether ``error``, or what it was raised from, says that the disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def cannot_write(folder: str | None, size: int = 1 << 24) -> bool:
    """Whether ``folder`` has no room for ``size`` bytes more.

    Asked after a save failed: Megatron's writer keeps the class of an error in one of its threads,
    not its number (core/dist_checkpointing/strategies/filesystem_async.py:325).
    """
    if not folder or not os.path.isdir(folder):
        return False
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".room-") as f:
            f.write(bytes(size))
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        return error.errno in _FULL
    return False


def skipped_iterations(run_dir: str) -> list[int]:
    """The iterations of the run's ``skip-iterations.json``; none where there is no such file."""
    try:
        with open(os.path.join(run_dir, SKIP_FILE), encoding="utf-8") as f:
            found = json.load(f)
    except FileNotFoundError:
        return []
    return sorted({int(iteration) for iteration in found})


def skip_iterations(run_dir: str, iterations: list[int]) -> None:
    """Write the run's ``skip-iterations.json``, whole or not at all."""
    with replacing(os.path.join(run_dir, SKIP_FILE)) as f:
        json.dump(sorted(set(iterations)), f)


def read(run_dir: str, since: float = 0.0) -> list[Mapping[str, Any]]:
    """The faults noted at or after ``since`` (seconds since 1970), oldest first."""
    try:
        records = list(read_records(os.path.join(run_dir, FAULTS_FILE)))
    except FileNotFoundError:
        return []
    found = [record for record in records if record.get("time", 0) >= since]
    return sorted(found, key=lambda record: record["time"])
