#!/usr/bin/env python3
"""Run one command over many settings, one after the other: a throughput or MFU sweep.

    launch/sweep.py launch/slurm/sweep.example.yaml --out runs/sweep --world 16 -- srun ...
    launch/sweep.py sweep.yaml --out runs/sweep --list

The YAML names a command, points with settings of their own, and a grid that multiplies them. Every
run gets a folder under --out with what it was (point.json), its output (out.log) and what it wrote.
A run that succeeded is not repeated, one that failed leaves its log and the sweep goes on. The
words after -- come before the command: a launcher. tools/collect.py --out makes table and plot.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from launch.settings import read_yaml  # noqa: E402
from mhc_megatron.errors import UserError, quiet_pipe  # noqa: E402

#: Written last into a point's folder: what it was and how it ended.
POINT_FILE = "point.json"

#: Signals that end a sweep and the run that it waits for.
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Stopped(Exception):
    """A signal asks the sweep to end."""


@dataclass
class Sweep:
    """A sweep's YAML.

    Attributes:
        name: of the sweep and of its job.
        command: words; ``{out}`` is the point's folder, ``{name}`` its name, ``{set}`` (a word of
            its own) becomes ``--set key=value`` for each of its settings.
        set: settings of all points.
        points: name -> settings.
        grid: setting -> values; every point is run with every combination.
        minutes: that one run may take.
    """

    name: str
    command: list[str]
    set: dict[str, Any] = field(default_factory=dict)
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    minutes: float = 30.0

    def runs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, settings) of every run."""
        for name, point in (self.points or {"": {}}).items():
            for values in itertools.product(*self.grid.values()):
                cell = dict(zip(self.grid, values))
                label = [name, *(f"{key.rpartition('.')[2]}={v}" for key, v in cell.items())]
                yield "-".join(filter(None, label)) or "run", {**self.set, **point, **cell}


def read(path: str) -> Sweep:
    """The sweep of a YAML file.

    Raises:
        UserError: unreadable, malformed, an unknown key, two runs of one name.
    """
    values = read_yaml(path, "sweep")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values.")
    unknown = values.keys() - Sweep.__dataclass_fields__.keys()
    if unknown:
        raise UserError(f"{path}: unknown key {min(map(str, unknown))!r}.")
    command = values.get("command")
    if not isinstance(command, list) or not command:
        raise UserError(f"{path}: command must be a list of words.")
    for key in ("set", "points", "grid"):
        if not isinstance(values.get(key) or {}, Mapping):
            raise UserError(f"{path}: {key} must hold keys and values.")
        values[key] = values.get(key) or {}
    if not all(isinstance(v, list) and v for v in values["grid"].values()):
        raise UserError(f"{path}: grid must hold a list of values for each key.")
    values["points"] = {str(name): point or {} for name, point in values["points"].items()}
    if not all(isinstance(point, Mapping) for point in values["points"].values()):
        raise UserError(f"{path}: every point must hold keys and values.")
    minutes = values.setdefault("minutes", 30.0)
    if type(minutes) not in (int, float) or not 0 < minutes < 1e9:
        raise UserError(f"{path}: minutes must be a number above 0, not {minutes!r}.")
    name = str(values.get("name") or Path(path).stem)
    sweep = Sweep(**{**values, "name": name, "command": [str(word) for word in command]})
    names = [label for label, _ in sweep.runs()]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two runs have the same name.")
    return sweep


@quiet_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sweep", help="the sweep's YAML")
    parser.add_argument("--out", type=Path, help="folder of all runs")
    parser.add_argument("--world", type=int, default=1, help="ranks, noted in point.json")
    parser.add_argument("--list", action="store_true", help="print the runs, start none")
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, launcher = parser.parse_args(words[:end]), words[end + 1 :]
    try:
        sweep = read(options.sweep)
        if options.list:
            for name, settings in sweep.runs():
                print(name, json.dumps(settings))
            return 0
        out = options.out or Path("runs") / sweep.name
        return _run_all(sweep, out, options.world, launcher)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run_all(sweep: Sweep, out: Path, world: int, launcher: Sequence[str]) -> int:
    """Exit code: 0 if every run succeeded, 1 if one failed, 128 + the signal that stopped it."""
    failed = 0
    for name, settings in sweep.runs():
        folder = out / re.sub(r"[^\w.=+-]", "_", name)
        if _succeeded(folder):
            print(f"{name}: measured already", flush=True)
            continue
        try:
            code, seconds = _run(sweep, name, settings, folder, world, launcher)
        except _Stopped as stop:
            with contextlib.suppress(OSError):  # a terminal that hung up
                print(f"{name}: stopped; the next job goes on from here", flush=True)
            return 128 + stop.args[0]
        failed += bool(code)
        said = "done" if code == 0 else f"failed with code {code}: see {folder / 'out.log'}"
        print(f"{name}: {said} ({seconds:.0f} s)", flush=True)
    return int(failed > 0)


def _succeeded(folder: Path) -> bool:
    try:
        return json.loads((folder / POINT_FILE).read_text(encoding="utf-8"))["code"] == 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _run(
    sweep: Sweep,
    name: str,
    settings: Mapping[str, Any],
    folder: Path,
    world: int,
    launcher: Sequence[str],
) -> tuple[int, float]:
    """One run: (exit code, seconds); 124 where it took longer than it may.

    Raises:
        _Stopped: a signal asked the sweep to end; the run has ended.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}.") from error
    words = [*launcher, *_command(sweep.command, name, settings, folder)]
    began = time.time()
    stopped: list[int] = []
    # A session of its own gets no signal of the terminal: whatever ends the sweep ends the run.
    # Set before there is a run, so that none is left over; further signals wait for its end.
    handlers = {
        number: signal.signal(number, lambda number, _: stopped.append(number))
        for number in _STOPS
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup
    }
    try:
        with open(folder / "out.log", "wb") as log:
            process = _start(words, log)
            code = _wait(process, 60 * sweep.minutes, stopped)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped:
        raise _Stopped(stopped[0])
    record = {"name": name, "settings": dict(settings), "world": world, "command": words}
    record |= {"code": code, "began": began, "seconds": time.time() - began}
    (folder / POINT_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return code, record["seconds"]


def _start(words: Sequence[str], log: IO[bytes]) -> subprocess.Popen:
    try:
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    except OSError as error:
        raise UserError(f"cannot start {words[0]}: {error.strerror}.") from error


def _wait(process: subprocess.Popen, seconds: float, stopped: Sequence[int]) -> int:
    """Exit code of the run; it is ended when its time is over (124) or a signal has come."""
    until = time.monotonic() + seconds
    while not stopped and time.monotonic() < until:
        try:
            return process.wait(timeout=min(0.2, max(until - time.monotonic(), 0.0)))
        except subprocess.TimeoutExpired:
            continue
    _end(process)
    process.wait()
    return 124


def _command(
    words: Sequence[str], name: str, settings: Mapping[str, Any], folder: Path
) -> list[str]:
    filled: list[str] = []
    for word in words:
        if word == "{set}":
            for key, value in settings.items():
                filled += ["--set", f"{key}={json.dumps(value)}"]
        else:
            filled.append(word.replace("{out}", str(folder)).replace("{name}", name))
    return filled


def _end(process: subprocess.Popen) -> None:
    """SIGTERM to the run's session, SIGKILL to what is left of it after 30 seconds."""
    for number, seconds in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        until = time.time() + seconds
        while time.time() < until and process.poll() is None:
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
