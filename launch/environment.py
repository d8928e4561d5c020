"""A run's surroundings: packages that Megatron fuses with, torchrun's variables, the terminal."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, TextIO

from mhc_megatron.apex import can_fuse_weight_gradients
from mhc_megatron.errors import UserError

#: The oldest nvidia-resiliency-ext beside which Megatron 0.19.2 can be imported at all
#: (core/dist_checkpointing/strategies/nvrx.py:15, asked at import).
RESILIENCY = (0, 6)


def fusions(megatron: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for what Megatron fuses by default and has no package or kernel for here.

    ``megatron``: the run's own arguments.
    """
    values: dict[str, Any] = {}
    if importlib.util.find_spec("transformer_engine") is None:
        values |= {
            "transformer-impl": "local",
            "no-persist-layer-norm": True,
            "no-masked-softmax-fusion": True,
            "no-rope-fusion": True,
        }
    if megatron.get("multi-latent-attention") and megatron.get("rope-type", "yarn") != "yarn":
        values["no-rope-fusion"] = True  # transformer_config.py:2966
    if not can_fuse_weight_gradients():
        values["no-gradient-accumulation-fusion"] = True
    return values


def check_resiliency() -> None:
    """Before Megatron is imported: an old nvidia-resiliency-ext keeps it from it.

    Raises:
        UserError: it is older than ``RESILIENCY``.
    """
    try:
        found = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return
    if tuple(int(part) for part in found.split(".")[:2]) < RESILIENCY:
        raise UserError(
            f"nvidia-resiliency-ext {found} is installed, and Megatron cannot be imported beside "
            "it: it needs 0.6 or newer (0.7.0 wants glibc 2.39), or none (pip uninstall)."
        )


def single_process() -> None:
    """What torchrun would set, for one process started without it.

    The store takes a free port when it opens: one that was looked for now may be another's by then,
    half a minute of imports later.
    """
    if "WORLD_SIZE" in os.environ:
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def load_own_scales(args: Namespace) -> None:
    """Let a run with delayed scaling have the scales back that it saved itself.

    Transformer Engine pickles them and refuses to load a pickle, which could run anything, unless
    it is told that the checkpoint is trusted (pytorch/_extra_state.py). The run's own is. For
    another run's, whose owner only the user knows, the variable is the user's to set.
    """
    own = args.load and args.save and os.path.realpath(args.load) == os.path.realpath(args.save)
    if args.fp8 and args.fp8_recipe == "delayed" and own:
        os.environ.setdefault("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")


def redirect_output(path: str) -> TextIO:
    """Send this process's standard output and error to ``path``; returns the old standard output.

    Megatron prints some hundred lines before the first step; a terminal is for the live line.
    """
    console = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(log, f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n".encode())
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    return console
