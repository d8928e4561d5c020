"""A run of launch/pretrain.py in which something goes wrong at one iteration, for tests."""

import os
import time
from collections.abc import Mapping

import pretrain_job
import torch


def run(
    argv: list[str],
    output: str,
    fault: str | None,
    iteration: int,
    environment: Mapping[str, str] | None = None,
) -> None:
    """As ``pretrain_job.run``, with ``fault`` (``nan``, ``spike``, ``hang``) at ``iteration``."""
    from mhc_megatron import training

    os.environ |= environment or {}

    plain = training.loss_func

    def loss_func(loss_mask, logits):
        from megatron.training import get_args

        if fault is not None and get_args().curr_iteration + 1 == iteration:
            if fault == "hang":
                wait_for_ever()
            logits = logits * {"nan": torch.nan, "spike": 9.0}[fault]
        return plain(loss_mask, logits)

    training.loss_func = loss_func
    pretrain_job.run(argv, output)


def wait_for_ever() -> None:
    while True:
        time.sleep(1)
