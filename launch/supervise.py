#!/usr/bin/env python3
"""Keep a run going: start it, look at how it ended, start it again or say why not.

    launch/supervise.py --run-dir runs/tiny -- torchrun --nproc-per-node 8 launch/pretrain.py ...
    launch/supervise.py --run-dir runs/27b -- srun --kill-on-bad-exit=1 bash task.sh ...

The command is that of ``launch/pretrain.py`` on every node; the run goes on from the newest whole
checkpoint each time. How an attempt ended is told by the exit code and by what the ranks noted in
``faults.jsonl``; every attempt is a line of ``supervisor.jsonl`` in the run's folder, so that a job
that takes over knows what was tried.

- complete: exit code 0;
- stopped by SIGUSR1 or SIGTERM (a time limit, a preemption): the ranks save; under Slurm with
  ``--requeue`` the job is put back into the queue; exit code 0;
- stopped by its own limit (``exit-duration-in-mins``, ``exit-interval``): the same;
- a fault of the machine (a rank killed, a hang, a lost peer): started again;
- bad input, a full disk: exit code 2 or 3 with the reason, because another attempt ends the same;
- ``--attempts`` attempts in a row without a newer checkpoint: exit code 3 with the last reason;
- a bad loss, twice at one iteration, where ``run.bad_loss`` (``run.loss_spike``) is ``skip``: that
  iteration is left out. A spike where ``run.loss_spike`` is ``stop``: exit code 3. Else as any
  other fault.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from mhc_megatron import faults  # noqa: E402
from mhc_megatron.errors import UserError  # noqa: E402
from mhc_megatron.files import append_line, read_records  # noqa: E402

LOG_FILE = "supervisor.jsonl"
TRACKER = "latest_checkpointed_iteration.txt"
#: Exit codes of the supervisor.
DONE, REFUSED, GAVE_UP = 0, 2, 3
#: Seconds between two attempts, times the number of attempts without progress.
PAUSE = 5.0
#: Seconds between two requests to stop.
_REPEAT = 5.0
#: Seconds that a rank's note may come after its launcher has ended.
_LATE = 0.5

COMPLETE, STOPPED, AGAIN, REFUSE, GIVE_UP = "complete", "stopped", "again", "refuse", "give up"


@dataclass(frozen=True)
class Attempt:
    """One start of the command, as ``supervisor.jsonl`` has it.

    Attributes:
        began: seconds since 1970.
        ended: the same.
        code: of the command; negative for a signal.
        checkpoint: the iteration that the tracker named at the end; -1 for none.
        verdict: what follows: complete, stopped, again, refuse, give up.
        reason: in words.
        bad_iteration: where a bad loss was met.
        job: Slurm's number of the job.
    """

    began: float
    ended: float
    code: int
    checkpoint: int
    verdict: str
    reason: str
    bad_iteration: int | None = None
    job: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        supervisor = Supervisor(options.run_dir, options.command, options.attempts)
        return supervisor.run(requeue if options.requeue else None)
    except UserError as error:
        say(f"{REFUSE}: {error}")
        return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run-dir", required=True, type=Path, help="the run's folder")
    parser.add_argument(
        "--attempts",
        type=int,
        default=3,
        metavar="N",
        help="give up after N attempts without a newer checkpoint (default 3)",
    )
    parser.add_argument(
        "--requeue", action="store_true", help="put the Slurm job back after a stop signal"
    )
    parser.add_argument("command", nargs="+", help="after --: what starts the run")
    return parser


@contextlib.contextmanager
def _or_refused() -> Iterator[None]:
    """No such command, or no folder for the run: UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


class Supervisor:
    """Starts ``command`` until the run in ``run_dir`` is complete or cannot go on."""

    def __init__(self, run_dir: Path, command: Sequence[str], attempts: int = 3) -> None:
        self.run_dir, self.command, self.attempts = Path(run_dir), list(command), attempts
        self.process: subprocess.Popen | None = None
        self.asked_to_stop: str | None = None
        with _or_refused():
            self.run_dir.mkdir(parents=True, exist_ok=True)

    def run(self, requeue: Callable[[], None] | None = None) -> int:
        """The supervisor's exit code; ``requeue`` is called when the run was stopped to go on."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while True:
            attempt = self._attempt()
            append(self.run_dir, attempt)
            say(f"{attempt.verdict}: {attempt.reason}")
            if attempt.verdict == AGAIN:
                self._pause()
                if self.asked_to_stop is None:
                    continue
            if attempt.verdict in (STOPPED, AGAIN) and requeue is not None:
                requeue()
            return {REFUSE: REFUSED, GIVE_UP: GAVE_UP}.get(attempt.verdict, DONE)

    def _attempt(self) -> Attempt:
        began = time.time()
        name = f"{socket.gethostname()}-{os.getpid()}-{began}"
        if self.asked_to_stop is None:
            self._start(name)
            code = self._wait()
        else:
            code = 0
        ended = time.time()
        if code:
            time.sleep(_LATE)
        return judge(began, ended, code, self.run_dir, self.attempts, self.asked_to_stop, name)

    def _start(self, name: str) -> None:
        """The command, in a session of its own: a terminal's Ctrl-C comes from here alone."""
        with _or_refused():
            self.process = subprocess.Popen(
                self.command,
                start_new_session=True,
                preexec_fn=_end_with_supervisor,
                env=os.environ | {faults.ATTEMPT: name},
            )
        if self.asked_to_stop is not None:  # the signal came while it was being started
            self._forward()

    def _wait(self) -> int:
        """The command's exit code. A rank that only starts does not hear: it is asked again."""
        while True:
            try:
                return self.process.wait(timeout=_REPEAT)
            except subprocess.TimeoutExpired:
                if self.asked_to_stop is not None:
                    self._forward()

    def _stop(self, number: int, frame: object) -> None:
        if self.asked_to_stop is None:
            self.asked_to_stop = signal.Signals(number).name
            say(f"{self.asked_to_stop}: the ranks are asked to save and end")
        self._forward()

    def _forward(self) -> None:
        """SIGUSR1 to the ranks: srun passes it on; torchrun does not, so they are looked for."""
        if self.process is None or self.process.poll() is not None:
            return
        if os.path.basename(self.command[0]) == "srun":
            self.process.send_signal(signal.SIGUSR1)
            return
        for pid in ranks(self.process.pid):
            try:
                os.kill(pid, signal.SIGUSR1)
            except ProcessLookupError:
                pass

    def _pause(self) -> None:
        fruitless = len(_without_progress(history(self.run_dir)))
        until = time.time() + PAUSE * max(0, fruitless - 1)
        while time.time() < until and self.asked_to_stop is None:
            time.sleep(0.1)


def _end_with_supervisor() -> None:
    """In the child before exec: to end when the supervisor does, and not of a SIGUSR1.

    An ignored signal stays ignored in torchrun; the ranks take it back (``faults``).
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(faults._PR_SET_PDEATHSIG, signal.SIGKILL)


def ranks(launcher: int) -> list[int]:
    """The processes of launch/pretrain.py below (or at) this one: none of what they started."""
    import psutil

    found = []
    waiting = [psutil.Process(launcher)]
    while waiting:
        process = waiting.pop()
        try:
            words = process.cmdline()
            runs = any(word.endswith("pretrain.py") for word in words[:3])
            if runs and "torchrun" not in " ".join(words[:2]):
                found.append(process.pid)
            else:
                waiting += process.children()
        except psutil.NoSuchProcess:
            continue
    return found


# -------------------------------------------------------------------------------------- verdicts


def judge(
    began: float,
    ended: float,
    code: int,
    run_dir: Path,
    attempts: int,
    asked_to_stop: str | None,
    name: str | None = None,
) -> Attempt:
    """What the end of an attempt means, from its exit code, the ranks' notes and the history.

    Notes of another attempt than ``name`` are of somebody who tried to start in the same folder.
    """
    noted = faults.read(str(run_dir), since=began)
    noted = [record for record in noted if record.get("attempt", name) == name]
    verdict, reason, bad = _verdict(code, noted, run_dir, began, asked_to_stop)
    if verdict == AGAIN and faults.cannot_write(str(run_dir)):
        # Neither a rank's note nor the count of attempts can be kept.
        verdict, reason = GIVE_UP, f"the disk of the run's folder is full ({reason})"
    job = os.environ.get("SLURM_JOB_ID")
    result = Attempt(began, ended, code, checkpoint(run_dir), verdict, reason, bad, job)
    if verdict != AGAIN:
        return result
    before = history(run_dir)
    fruitless = len(_without_progress([*before, result]))
    same = [a for a in before if bad is not None and a.bad_iteration == bad]
    skip = any(record.get("skip") for record in noted)
    if skip and same and bad not in faults.skipped_iterations(str(run_dir)):
        faults.skip_iterations(str(run_dir), [*faults.skipped_iterations(str(run_dir)), bad])
        return _with(result, AGAIN, f"iteration {bad} was bad twice: it is left out ({reason})")
    if fruitless >= attempts:
        return _with(result, GIVE_UP, f"{fruitless} attempts without a newer checkpoint; {reason}")
    return result


def _with(attempt: Attempt, verdict: str, reason: str) -> Attempt:
    return Attempt(**(asdict(attempt) | {"verdict": verdict, "reason": reason}))


def _verdict(
    code: int,
    noted: Sequence[Mapping[str, Any]],
    run_dir: Path,
    began: float,
    asked_to_stop: str | None,
) -> tuple[str, str, int | None]:
    """(verdict, reason, iteration of a bad loss) of one attempt, without its history."""
    for record in noted:
        where = f"rank {record['rank']} on {record['node']}"
        if record.get("code") == 2:
            return REFUSE, record["reason"], None
        if record.get("full_disk"):
            return GIVE_UP, f"{where}: the disk is full ({record['reason']})", None
    bad = next((record for record in noted if record.get("bad_result")), None)
    if bad is not None:
        said = f"rank {bad['rank']} on {bad['node']}, iteration {bad['iteration']}: {bad['reason']}"
        return GIVE_UP if bad.get("stop") else AGAIN, said, bad["iteration"]
    if code == 0:
        last = _last_exit(run_dir, began)
        if last is None and asked_to_stop is None:
            return AGAIN, "the command ended, but the run did not say how", None
        if last is not None and last.get("reason") == "complete":
            return COMPLETE, f"iteration {last['iteration']}", None
        if last is None:
            return STOPPED, f"{asked_to_stop} before the first step", None
        return STOPPED, f"{last['reason']} at iteration {last['iteration']}", None
    if asked_to_stop is not None and not noted:
        return STOPPED, f"{asked_to_stop}; the ranks ended with code {code}", None
    return AGAIN, _reason(code, noted, run_dir, began), None


def _reason(
    code: int, noted: Sequence[Mapping[str, Any]], run_dir: Path, began: float
) -> str:
    """Why it failed, in words: a rank's dump on a hang, a rank's note, or the code alone."""
    hung = [path.stem for path in logs_since(run_dir, began) if _hangs(path, began)]
    if hung:
        return f"{', '.join(hung)} made no progress; the stacks are in the log"
    if noted:
        first = noted[0]
        return f"rank {first['rank']} on {first['node']}: {first['reason']}"
    if code < 0:
        return f"the launcher was killed ({signal.Signals(-code).name})"
    return f"exit code {code}, and no rank said why: one was killed, or its node is gone"


def logs_since(run_dir: Path, began: float) -> list[Path]:
    """The ranks' logs that were written to since ``began``."""
    return sorted(p for p in run_dir.glob("logs/rank-*.log") if p.stat().st_mtime >= began - 1)


def _hangs(path: Path, began: float) -> bool:
    """Whether this attempt's part of a rank's log has faulthandler's dump."""
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - (1 << 18)))
        tail = f.read().decode("utf-8", "replace")
    return faults.HUNG in tail.rpartition("\n=== ")[2]


def _last_exit(run_dir: Path, began: float) -> Mapping[str, Any] | None:
    """The ``exit`` record that this attempt wrote, if it did."""
    record = _newest(run_dir, "exit")
    return record if record is not None and record.get("time", 0) >= began else None


def _newest(run_dir: Path, event: str) -> Mapping[str, Any] | None:
    """The last record of an event in metrics.jsonl; lines that are cut are passed over."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if f'"{event}"'.encode() in line:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("event") == event:
                return record
    return None


def checkpoint(run_dir: Path) -> int:
    """The iteration of the run's newest checkpoint; -1 where there is none.

    The tracker's; where ``save`` is another folder, that of the last save which the run recorded.
    """
    try:
        return int((run_dir / "checkpoints" / TRACKER).read_text())
    except (OSError, ValueError):
        iteration = (_newest(run_dir, "save") or {}).get("iteration")
        return iteration if isinstance(iteration, int) else -1


# --------------------------------------------------------------------------------------- history


def append(run_dir: Path, attempt: Attempt) -> None:
    """One more line of ``supervisor.jsonl``; a full disk is no reason to die here."""
    try:
        append_line(run_dir / LOG_FILE, json.dumps(asdict(attempt)))
    except OSError as error:
        say(f"{run_dir / LOG_FILE}: {error.strerror}")


def history(run_dir: Path) -> list[Attempt]:
    """The attempts so far, oldest first; a line that was cut short is left out."""
    try:
        records = list(read_records(run_dir / LOG_FILE))
    except OSError:
        return []
    found = []
    for record in records:
        with contextlib.suppress(TypeError):  # of another version
            found.append(Attempt(**record))
    return found


def _without_progress(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The failed attempts at the end that brought no newer checkpoint.

    The first of a row is counted when it saved nothing itself: what the attempt before it had
    reached is what counts. A stop on request or a new start by hand ends a row.
    """
    row: list[Attempt] = []
    for i in range(len(attempts) - 1, -1, -1):
        attempt = attempts[i]
        if attempt.verdict != AGAIN:
            break
        before = attempts[i - 1].checkpoint if i else -1
        if attempt.checkpoint > before:
            break
        row.append(attempt)
    return row


def requeue() -> None:
    """Put this Slurm job back into the queue."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        say("not under Slurm: start it again to go on")
        return
    result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if result.returncode:
        say(f"scontrol requeue {job}: {result.stderr.strip()}")


def say(line: str) -> None:
    """To standard output, in one call: a signal's handler may say something too."""
    os.write(1, f"{time.strftime('%H:%M:%S')} supervise: {line}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
