"""Slots of a steady state: in each, the forward of one microbatch and the backward of another.

A middle stage of an interleaved pipeline, alone on its GPU. What it sends in a slot is needed two
slots later by a neighbour, whose warm-up is two microbatches shorter (schedules.py:
``get_pp_rank_microbatches``); as all stages do the same at the same time, its own receive ends when
its own send of two slots ago does. The four callbacks do what schedules.py's ``pp_pre_forward`` and
so on do, with an emulated wire in the place of NCCL.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_megatron.overlap import ChunkPlan, HyperConnectedGPTModel

from .wire import Transfer, Wire, host_time

#: Slots between a send and the use of its like.
SLACK = 2


@dataclass
class Times:
    """Of a slot, milliseconds: the GPU's, and the host's to issue it."""

    gpu: float
    host: float


class Steady:
    """The stage: ``slot`` runs one.

    Args:
        model: the chunk, without embedding and loss.
        example: x [s, b, n*C] of a microbatch.
        forward, backward: the two directions' wires.
        bytes: of a hop.
        in_flight: forwards ahead of the backward.
        overlapped: False: a forward, then a backward, and each transfer is waited for.
    """

    def __init__(
        self,
        model: HyperConnectedGPTModel,
        example: Tensor,
        forward: Wire,
        backward: Wire,
        bytes: int,
        in_flight: int = 2,
        overlapped: bool = True,
    ) -> None:
        self.model, self.example, self.bytes, self.overlapped = model, example, bytes, overlapped
        self.wires = {"forward": forward, "backward": backward}
        self.plans: deque[ChunkPlan] = deque()
        self.transfers: dict[str, deque[Transfer]] = {"forward": deque(), "backward": deque()}
        self.last: dict[str, Transfer | None] = {"forward": None, "backward": None}
        for _ in range(in_flight):
            self.plans.append(self._plan())
            ChunkPlan.run(self.plans[-1], None)

    def slot(self) -> None:
        """A forward and a backward, with their transfers."""
        f, b = self._plan(), self.plans.popleft()
        if self.overlapped:
            self._run(f, b)
        else:
            self._run(f, None)
            self._run(None, b)
            for direction in self.wires:
                self.last[direction].wait()
        self.plans.append(f)

    def close(self) -> None:
        """The backwards that are left."""
        while self.plans:
            ChunkPlan.run(None, self.plans.popleft(), b_grad=self.example.detach())

    def _plan(self) -> ChunkPlan:
        self.model.set_input_tensor(self.example.detach().requires_grad_())
        return self.model.build_schedule_plan(None, None, None)

    def _run(self, f: ChunkPlan | None, b: ChunkPlan | None) -> None:
        ChunkPlan.run(
            f,
            b,
            b_grad=None if b is None else self.example.detach(),
            pre_forward=lambda stage: self._receive("forward"),
            pre_backward=lambda stage: self._receive("backward"),
            post_forward=lambda x, stage: self._send("forward", keep=False),
            post_backward=lambda gradient, stage: self._send("backward", keep=True),
        )

    def _receive(self, direction: str) -> None:
        if len(self.transfers[direction]) >= SLACK:
            self.transfers[direction].popleft().wait()

    def _send(self, direction: str, keep: bool) -> None:
        """``keep``: what is sent stays; else the sender waits, to give its memory back."""
        before, self.last[direction] = self.last[direction], self.wires[direction].start(self.bytes)
        self.transfers[direction].append(self.last[direction])
        if before is not None:
            before.wait()
        if not keep:
            self.last[direction].wait()


def measure(steady: Steady, slots: int) -> Times:
    """The mean of ``slots`` slots, after two that are not counted."""
    for _ in range(2):
        steady.slot()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    host = host_time()
    begin.record()
    for _ in range(slots):
        steady.slot()
    host = host_time() - host
    # Everything that was issued, on whatever stream.
    for wire in steady.wires.values():
        wire.stream.record_event().wait()
    end.record()
    torch.cuda.synchronize()
    return Times(begin.elapsed_time(end) / slots, host / slots)
