"""Processes that run jobs, one on each GPU, and who works on what.

A job takes as many free workers as it has ranks. A worker that fails, hangs or dies is ended with
the others of its job; another, which has imported everything meanwhile, takes its GPU.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tests.distributed import cluster

_WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Task:
    """A job and what must be there before it.

    Attributes:
        name: unique.
        world: ranks.
        job: its dictionary.
        after: name of a task whose failure is this one's too; empty for none.
    """

    name: str
    world: int
    job: dict[str, Any]
    after: str = ""


@dataclass
class Outcome:
    """What became of a task: ``value`` of every rank, or why there is none."""

    value: list[Any] | None = None
    error: str = ""
    seconds: float = 0.0


class Worker:
    """A process; ``used`` once it was given a job."""

    def __init__(self, gpu: int, device: str, port: int, log: BinaryIO) -> None:
        self.gpu, self.used = gpu, False
        command = [sys.executable, str(_WORKER), "--gpu", str(gpu), "--device", device]
        environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
        if device == "cpu":
            environment["TORCHDYNAMO_DISABLE"] = "1"
        if device == "cuda":
            # Equal bits of equal products, which rows of tolerance 0 ask for.
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            # Megatron's trainer asks for it with fine-grained offload (arguments.py:1858): without
            # it weights in FP8 are moved too.
            environment["NVTE_CPU_OFFLOAD_V1"] = "1"
        self.process = subprocess.Popen(
            [*command, "--store-port", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # its children end with it
        )

    def send(self, message: Any) -> None:
        """Raises OSError where the process has ended."""
        self.used = True
        cluster._send(self.process.stdin, message)

    def answer(self) -> tuple[bool, Any]:
        """(failed, value); what a dead process says is that it failed."""
        try:
            return cluster._receive(self.process.stdout)
        except Exception as error:
            return True, f"the process on GPU {self.gpu} ended: {error}"

    def end(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@dataclass
class _Running:
    task: Task
    workers: list[Worker]
    began: float
    deadline: float
    answers: dict[int, Any] = field(default_factory=dict)


class Crew:
    """Workers of ``gpus`` GPUs. Use it as a context manager.

    Args:
        gpus: how many.
        device: cuda or cpu.
        log: file for what the workers print.
        seconds: that a job may take.
        first: what a worker's first job may take more: it imports, and the crew's first compiles.
        spare: whether a second process a GPU waits for the first one's end.
    """

    def __init__(
        self, gpus: int, device: str, log: Path, seconds: float, first: float, spare: bool
    ) -> None:
        import torch.distributed as dist

        self.device, self.seconds, self.first = device, seconds, first
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._log = log.open("ab")
        self._free = [self._start(gpu) for gpu in range(gpus)]
        self._spares = [self._start(gpu) for gpu in range(gpus)] if spare else []
        self._running: list[_Running] = []
        self._count, self._compiled = 0, False

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; more than once does no harm."""
        for run in self._running:
            self._free += run.workers
        for worker in self._free + self._spares:
            worker.end()
        self._free, self._spares, self._running = [], [], []
        self._log.close()

    def run(
        self, tasks: list[Task], until: float, done: Callable[[Task, Outcome], None]
    ) -> dict[str, Outcome]:
        """Run ``tasks`` in their order, as GPUs come free, until the clock says ``until``.

        ``done`` hears of each. A task that was not begun in time has no outcome; one that is at
        work then is ended.
        """
        found: dict[str, Outcome] = {}

        def tell(task: Task, outcome: Outcome) -> None:
            found[task.name] = outcome
            done(task, outcome)

        waiting = list(tasks)
        while waiting or self._running:
            now = time.monotonic()
            if now > until:
                for run in list(self._running):
                    self._break(run)
                    tell(run.task, Outcome(error="the time was up", seconds=now - run.began))
                break
            self._begin(waiting, found, until, tell)
            for run, outcome in self._finished(0.5):
                tell(run.task, outcome)
        return found

    def _begin(self, waiting: list[Task], found: dict[str, Outcome], until: float, tell) -> None:
        """Give free workers their jobs. Tasks keep their order but for those that must wait."""
        for task in list(waiting):
            if task.after and task.after not in found:
                continue
            if task.after and found[task.after].value is None:
                waiting.remove(task)
                tell(task, Outcome(error=f"no reference: {found[task.after].error}"))
                continue
            if task.world > len(self._free):
                return
            waiting.remove(task)
            self._give(task, until)

    def _give(self, task: Task, until: float) -> None:
        self._free = [self._alive(worker) for worker in self._free]
        self._free.sort(key=lambda worker: worker.gpu)
        workers, self._free = self._free[: task.world], self._free[task.world :]
        self._count += 1
        limit = self.seconds
        if any(not worker.used for worker in workers):
            limit += min(self.first, 30) if self._compiled else self.first
        now = time.monotonic()
        run = _Running(task, workers, now, min(until, now + limit))
        self._running.append(run)
        for rank, worker in enumerate(workers):
            try:
                worker.send((f"job-{self._count}", rank, task.world, task.job))
            except OSError:
                pass  # its answer says so

    def _finished(self, wait: float) -> list[tuple[_Running, Outcome]]:
        """Jobs that have ended, well or not; waits that many seconds for an answer."""
        with selectors.DefaultSelector() as selector:
            for run in self._running:
                for rank, worker in enumerate(run.workers):
                    if rank not in run.answers:
                        selector.register(worker.process.stdout, selectors.EVENT_READ, (run, rank))
            for key, _ in selector.select(wait):
                run, rank = key.data
                run.answers[rank] = run.workers[rank].answer()
        return [
            (run, outcome)
            for run in list(self._running)
            if (outcome := self._outcome(run)) is not None
        ]

    def _outcome(self, run: _Running) -> Outcome | None:
        """None while it is at work."""
        seconds = time.monotonic() - run.began
        errors = {r: value for r, (failed, value) in run.answers.items() if failed}
        if errors:
            self._break(run)
            rank, error = min(errors.items())
            return Outcome(error=f"rank {rank}: {error.strip()}", seconds=seconds)
        if len(run.answers) == len(run.workers):
            self._running.remove(run)
            self._free += run.workers
            self._compiled = True
            return Outcome([run.answers[r][1] for r in range(len(run.workers))], "", seconds)
        if time.monotonic() > run.deadline:
            self._break(run)
            silent = [r for r in range(len(run.workers)) if r not in run.answers]
            return Outcome(error=f"no answer of rank {silent} in {seconds:.0f} s", seconds=seconds)
        return None

    def _break(self, run: _Running) -> None:
        """End the job's processes and put others in their place."""
        self._running.remove(run)
        self._free += [self._instead(worker) for worker in run.workers]

    def _alive(self, worker: Worker) -> Worker:
        return worker if worker.process.poll() is None else self._instead(worker)

    def _instead(self, worker: Worker) -> Worker:
        worker.end()
        spare = next((other for other in self._spares if other.gpu == worker.gpu), None)
        if spare is None:
            return self._start(worker.gpu)
        self._spares.remove(spare)
        self._spares.append(self._start(worker.gpu))
        return spare

    def _start(self, gpu: int) -> Worker:
        return Worker(gpu, self.device, self._store.port, self._log)
