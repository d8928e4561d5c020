#!/usr/bin/env python3
"""Pretrain a model: the one entry for a laptop, a GPU and a cluster.

    launch/pretrain.py --config configs/tiny.yaml --set train-iters=200 --set mhc.variant=hc
    torchrun --nproc-per-node 8 launch/pretrain.py --config configs/mhc-3b.yaml

Without a GPU it runs on the CPU (gloo). Ctrl-C, SIGTERM or SIGUSR1 saves and ends with exit code 0;
the same command goes on from there. SIGUSR2 prints the stacks of all threads. Why a rank ended in
another way is noted in the run's faults.jsonl; launch/supervise.py starts it again.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import sys
import tempfile
import time
import traceback
from typing import Any, TextIO

# OpenMP's threads spin while they wait for each other: on a busy machine that costs up to ten
# times the work itself. To be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from mhc_megatron import faults  # noqa: E402

if __name__ == "__main__":  # before torch, whose threads inherit what is set here
    faults.die_with_launcher()
    faults.hold_stop_signal()

from launch.environment import (  # noqa: E402
    check_resiliency,
    fusions,
    load_own_scales,
    redirect_output,
    single_process,
)
from launch.settings import Settings, load, parse  # noqa: E402
from mhc_megatron.errors import UserError  # noqa: E402
from mhc_megatron.spikes import LossSpike  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    # In the run's folder, where there is one, a supervisor reads what was wrong.
    console, run_dir, settings = sys.stdout, options.run_dir or "", None
    try:
        settings = load(options.config, options.set)
        settings.run.dir = options.run_dir or settings.run.dir
        run_dir = settings.run.dir
        console = _prepare_output(run_dir, options.verbose)
        _run(settings, console)
        return 0
    except UserError as error:
        _say(console, f"error: {error}")
        return _ended(run_dir, 2, str(error))
    except SystemExit as error:
        code = int(error.code or 0)
        reason = _MEGATRON_EXITS.get(code, f"exit code {code}")
        return _ended(run_dir, code, reason, bad_result=code in _MEGATRON_EXITS)
    except LossSpike as error:
        _say(console, f"error: {error}")
        policy = settings.run.loss_spike  # stop or skip
        return _ended(run_dir, 1, str(error), bad_result=True, **{policy: True})
    except KeyboardInterrupt:
        _say(console, "interrupted before a checkpoint could be saved")
        return 130
    except BaseException as error:  # torch's CheckpointException is no Exception
        with contextlib.suppress(OSError):  # the disk of the log may be what is full
            traceback.print_exc()  # to the log; one line to the terminal
        said = f"{type(error).__name__}: {error}"
        _say(console, f"error: {said.splitlines()[0]} (see {_log_path(run_dir)})")
        full = faults.is_full_disk(error) or faults.cannot_write(_checkpoints())
        bad = "Unexpected result" in said
        skip = bad and settings.run.bad_loss == "skip"
        return _ended(run_dir, 1, said, bad_result=bad, skip=skip, full_disk=full)


_MEGATRON_EXITS = {
    faults.EXIT_RERUN_ELSEWHERE: "a bad result came twice on this GPU: to be tried on another one",
    faults.EXIT_BAD_RESULT: "a bad result: the rerun machine's verdict is in the rank's log",
}


def _ended(run_dir: str, code: int, reason: str, **more: Any) -> int:
    """Note why this rank ends with ``code`` where it was not asked to; returns ``code``."""
    if code and os.path.isdir(run_dir):
        faults.note(run_dir, code, reason, _iteration(), **more)
    return code


def _iteration() -> int | None:
    """The iteration that was being trained; None before the first."""
    current = getattr(_megatron_args(), "curr_iteration", None)
    return None if current is None else current + 1


def _checkpoints() -> str | None:
    """The folder that the run saves into."""
    return getattr(_megatron_args(), "save", None)


def _megatron_args() -> argparse.Namespace | None:
    """Megatron's arguments, where the run came that far."""
    if "megatron.training" not in sys.modules:
        return None
    from megatron.training import global_vars

    return global_vars._GLOBAL_ARGS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML with Megatron's argument names")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting, e.g. train-iters=200 or mhc.variant=hc; may be repeated",
    )
    parser.add_argument("--run-dir", help="the run's folder (run.dir)")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="Megatron's own output on the terminal, not in a file",
    )
    return parser


def _run(settings: Settings, console: TextIO | None) -> None:
    """Parse as Megatron does, then train."""
    check_resiliency()
    import torch

    from mhc_megatron import cpu

    single_process()
    faults.dump_stacks_when_asked()
    values = _defaults(settings) | settings.megatron
    values |= _bad_results(settings)
    if cpu.enabled() or not torch.cuda.is_available():
        cpu.enable()
        values |= cpu.ARGUMENTS
    for line in _own_checkpoints_first(values):
        _say(console, line)
    args = parse(values)
    args.mhc = settings.mhc.to_mapping()  # travels in the checkpoint, to be compared on loading
    args.spiky_loss_ends_run = settings.run.loss_spike == "stop"

    from mhc_megatron.observer import Observer
    from mhc_megatron.schedule import decay_in_steps
    from mhc_megatron.training import check_arguments, pretrain

    check_arguments(args)
    load_own_scales(args)
    decay_in_steps(settings.run.lr_steps, args)
    if settings.run.data_loader == "dali":
        from mhc_megatron import dali

        dali.install()
    faults.stop_when_asked()
    faults.end_workers_at_exit()
    faults.guard_checkpoint_writers()
    seen = console if args.rank == args.world_size - 1 else None
    observer = Observer(settings.run, settings.mhc, seen)
    observer.attach()
    pretrain(args, settings.mhc, say=observer.say)
    observer.exit()


def _own_checkpoints_first(values: dict[str, Any]) -> list[str]:
    """A run that has saved goes on from there, also where ``load`` names what it began with.

    Changes ``values``; returns what there is to say.

    Raises:
        UserError: ``save`` cannot be written to; ``load`` has no checkpoint.
    """
    from mhc_megatron.checkpoint.torch_dist import TRACKER

    save, load = values.get("save"), values.get("load")
    if save:
        _check_writable(save)
    if not load or (save and os.path.realpath(save) == os.path.realpath(load)):
        return []
    if save and os.path.exists(os.path.join(save, TRACKER)):
        values["load"] = save
        for key in ("finetune", "no-load-optim", "no-load-rng", "ckpt-step"):
            values.pop(key, None)
        return [f"going on from {save}; the run began with {load}"]
    if not os.path.exists(os.path.join(load, TRACKER)) and values.get("ckpt-step") is None:
        raise UserError(f"load: there is no checkpoint in {load}.")
    return []


def _check_writable(folder: str) -> None:
    """A folder that cannot be saved into shows before the first step; nothing is made there."""
    there = os.path.abspath(folder)
    try:
        while not os.path.isdir(there):
            if os.path.lexists(there):  # a file, or a link to nothing
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            there = os.path.dirname(there)
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"save: cannot write to {folder}: {error.strerror}.") from error


def _bad_results(settings: Settings) -> dict[str, Any]:
    """Megatron's arguments for the run's policy on a NaN in the loss or the gradient."""
    skipped = faults.skipped_iterations(settings.run.dir)
    if settings.run.bad_loss != "skip" and not skipped:
        return {}
    given = settings.megatron.get("iterations-to-skip") or []
    # The rerun machine's own checkpoint would bring the bad iteration back.
    return {"rerun-mode": "disabled", "iterations-to-skip": [*given, *skipped] or None}


def _defaults(settings: Settings) -> dict[str, Any]:
    """Arguments that a configuration need not repeat; any of them may still be set in it."""
    run = settings.run.dir
    checkpoints = os.path.join(run, "checkpoints")
    values: dict[str, Any] = {
        "save": checkpoints,
        "load": checkpoints,
        "tensorboard-dir": os.path.join(run, "tensorboard"),
        "data-cache-path": os.path.join(run, "data-cache"),
        "wandb-save-dir": os.path.join(run, "wandb"),
        "save-interval": 1000,
        "eval-interval": 1000,
        "exit-signal-handler": True,
        "no-one-logger": True,
    }
    if settings.megatron.get("async-save"):
        # Megatron switches the key off without the first; the second needs no further package.
        values |= {"use-persistent-ckpt-worker": True, "async-strategy": "mcore"}
    if settings.megatron.get("bf16") or settings.megatron.get("fp16"):
        # Shards its state over the data-parallel ranks. The other one works too.
        values["use-distributed-optimizer"] = True
    return values | fusions(settings.megatron)


def _prepare_output(run_dir: str, verbose: bool) -> TextIO:
    """The terminal to write to, after everything else was sent to the run's log."""
    try:
        os.makedirs(os.path.join(run_dir, "logs"), exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if os.environ.get("RANK", "0") == "0":
            _lock(run_dir)
        if verbose:
            return sys.stdout
        return redirect_output(_log_path(run_dir))
    except OSError as error:
        raise UserError(f"cannot write to the run's folder {run_dir}: {error.strerror}.") from error


#: Seconds in which a run that was killed may still end.
_LOCK_WAIT = 20.0
_locked: TextIO | None = None


def _lock(run_dir: str) -> None:
    """One run in a folder, for as long as this process lives; its children do not inherit it.

    Raises:
        UserError: another process has the folder.
    """
    global _locked
    _locked = open(os.path.join(run_dir, "lock"), "a", encoding="utf-8")
    until = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            fcntl.lockf(_locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks
        if time.monotonic() > until:
            raise UserError(
                f"another process is training in {run_dir}; give this run a folder of its own."
            )
        time.sleep(0.2)


def _log_path(run_dir: str) -> str:
    return os.path.join(run_dir, "logs", f"rank-{os.environ.get('RANK', '0')}.log")


def _say(console: TextIO, line: str) -> None:
    out = sys.stderr if console is sys.stdout else console
    with contextlib.suppress(OSError):  # a terminal, or a pipe's reader, that has gone
        out.write(line + "\n")
        out.flush()


if __name__ == "__main__":
    sys.exit(main())
