#!/usr/bin/env python3
"""Kill a small run at random moments, again and again, and see that nothing is lost by it.

    tests/soak.py --kills 100 --folder /tmp/soak

Trains once undisturbed and once under ``launch/supervise.py`` while one process after another is
killed with SIGKILL: a rank, torchrun, the supervisor itself, the writer of asynchronous saves;
while it starts, between steps, in the middle of a save. What was killed must leave no process
behind, the run must reach its end, and its last checkpoint must hold the same bits, weights and
optimizer, as the undisturbed run's, which saves synchronously. The same command goes on with a soak
that was broken off.

``--saves`` says how the disturbed run saves: ``sync``, ``async``, or ``both``: one or the other, by
chance, after each kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
for _path in (str(ROOT), str(ROOT / "kernels")):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from launch import supervise  # noqa: E402

CONFIG = """
num-layers: 2
hidden-size: 32
ffn-hidden-size: 64
num-attention-heads: 2
normalization: RMSNorm
swiglu: true
disable-bias-linear: true
position-embedding-type: rope
attention-dropout: 0.0
hidden-dropout: 0.1
tokenizer-type: NullTokenizer
vocab-size: 100
make-vocab-size-divisible-by: 1
mock-data: true
seq-length: 32
max-position-embeddings: 32
micro-batch-size: 1
global-batch-size: 4
lr: 1e-2
min-lr: 1e-3
lr-warmup-iters: 2
clip-grad: 1.0
log-interval: 1
eval-iters: 0
eval-interval: 1000000
num-workers: 0
distributed-timeout-minutes: 1
"""

#: Seconds that an attempt may take to reach the moment to kill at.
START_SECONDS = 1200.0
#: Seconds that what was killed may take to be gone with all it started; torchrun gives ranks 30, a
#: rank misses its writer at the next save.
GONE_SECONDS = 240.0


@dataclass
class Result:
    """What a soak did.

    Attributes:
        kills: target and moment -> how often.
        left_behind: command lines of processes that outlived what started them.
        resumed: iterations that attempts went on from.
        repeated: iterations that were trained again after a kill.
    """

    kills: Counter = field(default_factory=Counter)
    left_behind: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    repeated: int = 0
    seconds: float = 0.0


def command(config: Path, run: Path, ranks: int, iterations: int, interval: int) -> list[str]:
    """supervise.py with torchrun below it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(ROOT / "launch" / "supervise.py"), "--run-dir", str(run)]
    words += ["--attempts", "1000000", "--", sys.executable, "-m", "torch.distributed.run"]
    words += ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1"]
    words += ["--master-port", str(port), "launch/pretrain.py", "--config", str(config)]
    words += ["--run-dir", str(run), "--set", f"train-iters={iterations}"]
    return [*words, "--set", f"save-interval={interval}"]


def start(words: list[str], output: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    with open(output, "ab") as f:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=f, stderr=f)


def soak(
    folder: Path,
    kills: int,
    ranks: int = 2,
    seed: int = 0,
    per_kill: int = 6,
    saves: str = "both",
) -> Result:
    """Train ``per_kill * (kills + 2)`` iterations; see the module's text.

    What ``folder`` holds of an earlier call that was broken off is gone on from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "whole.yaml").write_text(CONFIG)
    iterations, interval = per_kill * (kills + 2), max(1, per_kill // 2)
    began = time.time()
    if supervise.checkpoint(folder / "whole") < iterations:
        whole = command(folder / "whole.yaml", folder / "whole", ranks, iterations, interval)
        process = start(whole, folder / "whole.out")
        if process.wait(timeout=3600):
            raise RuntimeError((folder / "whole.out").read_text()[-3000:])
    words = command(folder / "soak.yaml", folder / "run", ranks, iterations, interval)
    result = _disturb(words, folder, kills, random.Random(seed), per_kill, saves)
    result.seconds = time.time() - began
    _check_history(folder / "run", result)
    return result


def _disturb(
    words: list[str],
    folder: Path,
    kills: int,
    chance: random.Random,
    per_kill: int,
    saves: str,
) -> Result:
    result, run = Result(), folder / "run"
    result.kills.update(_killed_before(folder))
    _choose_saves(folder, chance, saves)
    process = start(words, folder / "run.out")
    while result.kills.total() < kills and process.poll() is None:
        moment = _wait_for_moment(run, process, chance, per_kill)
        if moment is None:
            break
        target, pid = _target(process.pid, chance)
        above = target in ("torchrun", "supervisor")
        below = _descendants(pid) if above else _descendants(process.pid)[1:]
        _choose_saves(folder, chance, saves)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        result.kills[f"{target}, {moment}"] += 1
        with open(folder / "kills", "a") as f:
            f.write(f"{target}, {moment}\n")
        if target == "supervisor":
            process.wait()
        result.left_behind += _still_there(below)
        if process.poll() is not None:
            process = start(words, folder / "run.out")
        print(f"{result.kills.total()}: {target}, {moment}", flush=True)
    if process.wait(timeout=1800):
        raise RuntimeError((folder / "run.out").read_text()[-3000:])
    return result


def _choose_saves(folder: Path, chance: random.Random, saves: str) -> None:
    """How the next attempt saves: the configuration is read at every start."""
    kind = chance.choice(["sync", "async"]) if saves == "both" else saves
    new = folder / "soak.yaml.new"
    new.write_text(CONFIG + f"async-save: {str(kind == 'async').lower()}\n")
    new.replace(folder / "soak.yaml")


def _killed_before(folder: Path) -> Counter:
    try:
        return Counter((folder / "kills").read_text().splitlines())
    except FileNotFoundError:
        return Counter()


def _wait_for_moment(
    run: Path, process: subprocess.Popen, chance: random.Random, per_kill: int
) -> str | None:
    """Wait for a moment to kill at; its name, None when the run ended before."""
    began, first = time.time(), _last_iteration(run)
    moment = chance.choices(["while starting", "between steps", "in a save"], [15, 45, 40])[0]
    if moment == "while starting":
        time.sleep(chance.uniform(0.0, 12.0))
        return moment if process.poll() is None else None
    steps = chance.randint(1, 2 * per_kill)
    while process.poll() is None and time.time() < began + START_SECONDS:
        time.sleep(0.004)
        now = _last_iteration(run)
        if now == first:
            continue
        if moment == "between steps" and now >= _resumed_at(run) + steps:
            time.sleep(chance.uniform(0.0, 0.2))
            return moment
        if moment == "in a save" and _is_saving(run) and chance.random() < 0.5:
            time.sleep(chance.uniform(0.0, 0.15))
            return moment
    if process.poll() is None:
        raise RuntimeError(f"no step within {START_SECONDS} s: see {run}.out")
    return None


def _target(supervisor: int, chance: random.Random) -> tuple[str, int]:
    kind = chance.choices(["rank", "torchrun", "supervisor", "writer"], [50, 20, 15, 15])[0]
    if kind != "supervisor":
        try:
            launchers = psutil.Process(supervisor).children()
            found = launchers
            if launchers and kind in ("rank", "writer"):
                found = [psutil.Process(pid) for pid in supervise.ranks(launchers[0].pid)]
            if kind == "writer":
                kind, found = ("writer", w) if (w := _writers(found)) else ("rank", found)
            if found:
                return kind, chance.choice(found).pid
        except psutil.NoSuchProcess:
            pass
    return "supervisor", supervisor


def _writers(ranks: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that write asynchronous saves: Megatron starts them from a fork server."""
    servers = [p for rank in ranks for p in rank.children() if "forkserver" in str(p.cmdline())]
    return [writer for server in servers for writer in server.children()]


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _still_there(processes: list[psutil.Process]) -> list[str]:
    _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    said = []
    for process in alive:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                said.append(" ".join(process.cmdline())[-200:])
                process.kill()
        except psutil.NoSuchProcess:
            continue
    return said


def records(run: Path) -> list[dict]:
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _tail(run: Path) -> list[dict]:
    """The last records of the metrics, read without the rest."""
    try:
        with open(run / "metrics.jsonl", "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - 20_000))
            lines = f.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _last_iteration(run: Path) -> tuple[int, int] | int:
    """Of the last step recorded; -1 where there is none."""
    steps = [r["iteration"] for r in _tail(run) if r["event"] == "train"]
    return steps[-1] if steps else -1


def _resumed_at(run: Path) -> int:
    at = [r["iteration"] for r in _tail(run) if r["event"] == "resume"]
    return at[-1] if at else 0


def _is_saving(run: Path) -> bool:
    """Whether there is a checkpoint's folder that the tracker does not name yet."""
    named = supervise.checkpoint(run)
    try:
        newest = max(int(p.name[5:]) for p in (run / "checkpoints").glob("iter_*"))
    except ValueError:
        return False
    return newest > named


def _check_history(run: Path, result: Result) -> None:
    """Iterations run on without a gap; those of a resume are what was saved last."""
    last = 0
    for record in records(run):
        if record["event"] == "resume":
            result.resumed.append(record["iteration"])
            result.repeated += max(0, last - record["iteration"])
            last = record["iteration"]
        elif record["event"] == "start":
            last_before_start = last
            last = 0 if not last_before_start else last
        elif record["event"] == "train":
            if record["iteration"] != last + 1 and record["iteration"] != 1:
                raise AssertionError(f"iteration {record['iteration']} follows {last}")
            last = record["iteration"]


def tensors(run: Path) -> dict:
    """Everything in the last checkpoint of a run."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = run / "checkpoints" / f"iter_{supervise.checkpoint(run):07d}"
    reader = FileSystemReader(folder)
    state = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype)
        for key, meta in reader.read_metadata().state_dict_metadata.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def different(folder: Path) -> list[str]:
    """Names of the tensors that differ between the two runs' last checkpoints."""
    import torch

    ours, theirs = tensors(folder / "run"), tensors(folder / "whole")
    if ours.keys() != theirs.keys():
        return sorted(ours.keys() ^ theirs.keys())
    return [key for key in ours if not torch.equal(ours[key], theirs[key])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--saves", choices=("sync", "async", "both"), default="both")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    result = soak(
        options.folder, options.kills, options.ranks, options.seed, saves=options.saves
    )
    for what, count in sorted(result.kills.items()):
        print(f"{count:4}  {what}")
    wrong = different(options.folder)
    print(
        f"{result.kills.total()} kills in {result.seconds:.0f} s, {len(result.resumed)} "
        f"resumes, {result.repeated} iterations trained again, {len(result.left_behind)} processes "
        f"left behind, {len(wrong)} of {len(tensors(options.folder / 'run'))} tensors differ"
    )
    for line in [*result.left_behind, *wrong]:
        print(" ", line)
    return int(bool(wrong or result.left_behind))


if __name__ == "__main__":
    sys.exit(main())
