"""The paper's learning rate: warmup, then constant with a few steps down.

megatron-core 0.19.2 decays by a straight line, a cosine, an inverse square root or WSD
(core/optimizer_param_scheduler.py, ``get_lr``), never in steps. Its ``constant`` style multiplied
by the step's factor is the step decay; weight decay, checkpoints and the learning rates of
parameter groups stay Megatron's.
"""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mhc_megatron.errors import UserError

if TYPE_CHECKING:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

#: Share of the run at which a step comes -> what the learning rate is multiplied by from there on.
#: The paper's: {0.8: 0.316, 0.9: 0.1}.
Steps = Mapping[float, float]


def factor(steps: Steps, done: float) -> float:
    """What the learning rate is multiplied by after the share ``done`` (0 to 1) of the run."""
    reached = [share for share in steps if done > share]
    return steps[max(reached)] if reached else 1.0


def check_steps(steps: Mapping[Any, Any]) -> None:
    """That ``steps`` is what ``Steps`` says.

    Raises:
        UserError: a share outside 0 to 1, a factor that is negative or no number.
    """
    for share, value in steps.items():
        if not _is_number(share) or not 0 < share < 1:
            raise UserError(
                f"run: lr_steps: {share!r} must be the share of the run at which a step comes, "
                "between 0 and 1."
            )
        if not _is_number(value) or not 0 <= value < math.inf:
            raise UserError(
                f"run: lr_steps: the factor at {share} must be a number, at least 0, not {value!r}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def decay_in_steps(steps: Steps, args: Namespace) -> None:
    """Let Megatron's trainer decay the learning rate by ``steps``; nothing where there are none.

    The shares are of ``lr-decay-iters`` (or ``lr-decay-samples``), which are the whole run where
    not set. Puts a subclass in the place of the scheduler class that training/training.py:1941
    builds. Once a process.

    Raises:
        UserError: another decay is asked for as well.
    """
    if not steps:
        return
    if args.lr_decay_style != "constant":
        raise UserError(
            "run: lr_steps multiplies a constant learning rate; set lr-decay-style: constant, not "
            f"{args.lr_decay_style}."
        )
    from megatron.training import training

    training.OptimizerParamScheduler = functools.partial(step_scheduler(), steps=dict(steps))


@functools.cache
def step_scheduler() -> type[OptimizerParamScheduler]:
    """Megatron's scheduler with the keyword ``steps``; a function, as Megatron loads slowly."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    class StepScheduler(OptimizerParamScheduler):
        def __init__(self, *args: Any, steps: Steps, **kwargs: Any) -> None:
            self.steps = steps
            super().__init__(*args, **kwargs)

        def get_lr(self, param_group: dict) -> float:
            return super().get_lr(param_group) * factor(
                self.steps, self.num_steps / self.lr_decay_steps
            )

    return StepScheduler
