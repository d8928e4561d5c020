"""One run of launch/pretrain.py, in a child of a process that has imported Megatron and no more."""

import os
import signal
import sys

import megatron.core.tokenizers.text  # noqa: F401  and with it transformers
import megatron.training.arguments  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import launch.pretrain
import mhc_megatron.observer  # noqa: F401
import mhc_megatron.training  # noqa: F401  imported here, once for all children


def run(argv: list[str], output: str) -> None:
    """Run with ``argv``, standard output and error to the file ``output``; ends the process."""
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["launch/pretrain.py"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(launch.pretrain.main(argv))


def settings_without_transformer_engine(config: str) -> None:
    """Megatron takes the settings of a GPU machine that has nothing but what is locked."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    from launch.settings import load, parse
    from mhc_megatron import cpu

    cpu.enable()  # Megatron's checks ask for a GPU; the settings below are not the CPU's
    settings = load(config)
    args = parse(launch.pretrain._defaults(settings) | settings.megatron)
    core_transformer_config_from_args(args)
