"""The learning rate in steps: the paper's recipe, through Megatron's own scheduler."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from mhc_megatron.errors import UserError
from mhc_megatron.schedule import check_steps, decay_in_steps, factor, step_scheduler

PAPER = {0.8: 0.316, 0.9: 0.1}


def scheduler(steps: dict[float, float], **changes):
    """A scheduler of 100 steps after 10 of warmup, on one parameter of learning rate 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    options = {
        "init_lr": 0.0, "max_lr": 1.0, "min_lr": 0.0, "lr_warmup_steps": 10,
        "lr_decay_steps": 100, "lr_decay_style": "constant", "start_wd": 0.1, "end_wd": 0.1,
        "wd_incr_steps": 100, "wd_incr_style": "constant",
    }  # fmt: skip
    schedule = step_scheduler()(optimizer, steps=steps, **(options | changes))
    return schedule, optimizer.param_groups[0]


def test_warmup_then_steps() -> None:
    schedule, group = scheduler(PAPER)
    seen = {}
    for done in range(1, 101):
        schedule.step(1)
        seen[done] = group["lr"]
    assert [seen[done] for done in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert {seen[done] for done in range(10, 81)} == {1.0}
    assert {seen[done] for done in range(81, 91)} == {0.316}
    assert {seen[done] for done in range(91, 101)} == {0.1}


def test_groups_keep_their_own_rate() -> None:
    schedule, group = scheduler(PAPER)
    group["max_lr"] = 0.5
    schedule.step(85)
    assert group["lr"] == pytest.approx(0.5 * 0.316)
    assert group["weight_decay"] == pytest.approx(0.1)


def test_resumes_in_the_middle() -> None:
    first, _ = scheduler(PAPER)
    first.step(85)
    second, group = scheduler(PAPER)
    second.load_state_dict(first.state_dict())
    assert group["lr"] == pytest.approx(0.316)


def test_order_and_absence_of_steps() -> None:
    assert factor({0.9: 0.1, 0.8: 0.316}, 0.95) == 0.1
    assert factor({}, 0.95) == 1.0


@pytest.mark.parametrize("steps", [{0: 0.5}, {1: 0.5}, {"a": 0.5}, {True: 0.5}, {0.5: -1},
                                   {0.5: "half"}, {0.5: float("nan")}])  # fmt: skip
def test_wrong_steps(steps: dict) -> None:
    with pytest.raises(UserError, match="lr_steps"):
        check_steps(steps)


def test_another_decay_as_well() -> None:
    decay_in_steps({}, Namespace(lr_decay_style="cosine"))
    with pytest.raises(UserError, match="lr-decay-style: constant, not cosine"):
        decay_in_steps(PAPER, Namespace(lr_decay_style="cosine"))


TRAINER = """
from argparse import Namespace
from mhc_megatron import cpu
cpu.enable()
import torch
from megatron.training import global_vars, training
from mhc_megatron.schedule import decay_in_steps
args = Namespace(
    train_iters=10, lr_decay_iters=None, global_batch_size=4, lr_wsd_decay_iters=None,
    lr_warmup_fraction=None, lr_warmup_iters=2, lr_warmup_init=0.0, lr=1.0, min_lr=0.0,
    lr_decay_style="constant", start_weight_decay=0.1, end_weight_decay=0.1,
    weight_decay_incr_style="constant", use_checkpoint_opt_param_scheduler=False,
    override_opt_param_scheduler=False, lr_wsd_decay_style="exponential")
decay_in_steps({0.5: 0.25}, args)
global_vars._GLOBAL_ARGS = args
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
schedule = training.get_optimizer_param_scheduler(optimizer)
rates = []
for _ in range(10):
    schedule.step(4)
    rates.append(optimizer.param_groups[0]["lr"])
print(rates)
"""


def test_megatrons_trainer_takes_it() -> None:
    """Fails when training/training.py makes its scheduler otherwise than we lean on."""
    root = Path(__file__).resolve().parents[1]
    path = f"{root}:{root / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAINER],
        capture_output=True, text=True, timeout=120, env={"PYTHONPATH": path, "HOME": "/tmp"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == [str([0.5, *[1.0] * 4, *[0.25] * 5])], done.stderr
