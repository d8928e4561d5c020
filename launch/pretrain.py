#!/usr/bin/env python3
"""Pretrain a model: the one entry for a laptop, a GPU and a cluster.

    launch/pretrain.py --config configs/tiny.yaml --set train-iters=200 --set mhc.variant=hc
    torchrun --nproc-per-node 8 launch/pretrain.py --config configs/mhc-3b.yaml

Without a GPU it runs on the CPU (gloo). Ctrl-C or SIGTERM saves and ends with exit code 0; the
same command goes on from there.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import traceback
from typing import Any, TextIO

# OpenMP's threads spin while they wait for each other: on a busy machine that costs up to ten
# times the work itself. To be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from launch.environment import fusions, redirect_output, single_process  # noqa: E402
from launch.settings import Settings, load, parse  # noqa: E402
from mhc_megatron.errors import UserError  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    console = sys.stdout
    try:
        settings = load(options.config, options.set)
        if options.run_dir:
            settings.run.dir = options.run_dir
        console = _prepare_output(settings.run.dir, options.verbose)
        _run(settings, console)
        return 0
    except UserError as error:
        _say(console, f"error: {error}")
        return 2
    except SystemExit as error:
        return int(error.code or 0)
    except KeyboardInterrupt:
        _say(console, "interrupted before a checkpoint could be saved")
        return 130
    except Exception as error:  # the traceback goes to the log, one line to the terminal
        traceback.print_exc()
        _say(console, f"error: {type(error).__name__}: {error} (see {_log_path(settings.run.dir)})")
        return 1


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
    import torch

    from mhc_megatron import cpu

    single_process()
    values = _defaults(settings) | settings.megatron
    if cpu.enabled() or not torch.cuda.is_available():
        cpu.enable()
        values |= cpu.ARGUMENTS
    args = parse(values)
    args.mhc = settings.mhc.to_mapping()  # travels in the checkpoint, to be compared on loading

    from mhc_megatron.observer import Observer
    from mhc_megatron.schedule import decay_in_steps
    from mhc_megatron.training import check_arguments, pretrain

    check_arguments(args)
    decay_in_steps(settings.run.lr_steps, args)
    _save_on_interrupt()
    seen = console if args.rank == args.world_size - 1 else None
    observer = Observer(
        settings.run.dir, settings.run.name, settings.mhc, settings.run.stability_interval, seen
    )
    observer.attach()
    pretrain(args, settings.mhc)
    observer.exit()


def _defaults(settings: Settings) -> dict[str, Any]:
    """Arguments that a configuration need not repeat; any of them may still be set in it."""
    run = settings.run.dir
    checkpoints = os.path.join(run, "checkpoints")
    values: dict[str, Any] = {
        "save": checkpoints,
        "load": checkpoints,
        "tensorboard-dir": os.path.join(run, "tensorboard"),
        "data-cache-path": os.path.join(run, "data-cache"),
        "save-interval": 1000,
        "eval-interval": 1000,
        "exit-signal-handler": True,
        "no-one-logger": True,
    }
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
        if verbose:
            return sys.stdout
        return redirect_output(_log_path(run_dir))
    except OSError as error:
        raise UserError(f"cannot write to the run's folder {run_dir}: {error.strerror}.") from error


def _log_path(run_dir: str) -> str:
    return os.path.join(run_dir, "logs", f"rank-{os.environ.get('RANK', '0')}.log")


def _save_on_interrupt() -> None:
    """Ctrl-C asks for what SIGTERM asks for: save and end. A second one ends at once."""

    def interrupt(signum, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, interrupt)


def _say(console: TextIO, line: str) -> None:
    out = sys.stderr if console is sys.stdout else console
    out.write(line + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
