"""An experiment: x travels between pipeline stages in FP8, half the bytes. Off by default.

``MHCConfig.wire: fp8`` sends x [s, b, n*C] as float8 e4m3 with a float32 scale for every 128
neighbouring channels: 1.03 bytes a value in the place of 2. What a stage receives differs from what
was sent by 2.6 % (relative Frobenius norm, values from a normal distribution; the next stage reads
that, and so the loss differs), and no later layer mends it: the streams carry x through all stages,
each hop adds its error. Gradients travel as they are; the rounding is not differentiated.

``BlockScaled`` takes the place of Megatron's P2PCommunicator (megatron-core 0.19.2,
pipeline_parallel/p2p_communication.py:140), which the schedules make themselves where none is
given (schedules.py:1025 and :2025); their name for it is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError

#: Channels that share a scale.
BLOCK = 128
_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max


def encode(x: Tensor) -> Tensor:
    """x [..., D] -> bytes [..., D + 4 D / 128]: values in e4m3, then the scales in float32."""
    blocks = x.detach().float().unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / _LARGEST
    # An empty block has scale 0; infinities and NaN go through as NaN.
    values = (blocks / scales.masked_fill(scales == 0, 1.0)).to(_FP8)
    return torch.cat(
        [values.flatten(-2).view(torch.uint8), scales.squeeze(-1).view(torch.uint8)], dim=-1
    )


def decode(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``encode``, to rounding."""
    D = packed.shape[-1] * BLOCK // (BLOCK + 4)
    values = packed[..., :D].contiguous().view(_FP8).float().unflatten(-1, (-1, BLOCK))
    scales = packed[..., D:].contiguous().view(torch.float32).unsqueeze(-1)
    return (values * scales).flatten(-2).to(dtype)


class Arrival:
    """The handle of a receive: ``wait`` lets the current stream wait, then decode."""

    def __init__(self, handle: Any, packed: Tensor, x: Tensor) -> None:
        self.handle, self.packed, self.x = handle, packed, x

    def wait(self) -> None:
        self.handle.wait()
        if self.packed is None:
            return
        stream = torch.cuda.current_stream()
        for tensor in (self.packed, self.x):
            tensor.record_stream(stream)
        self.x.data.copy_(decode(self.packed, self.x.dtype))
        self.packed = None


class Departure:
    """The handle of a send; keeps the bytes until its end."""

    def __init__(self, handle: Any, packed: Tensor) -> None:
        self.handle, self.packed = handle, packed

    def wait(self) -> None:
        self.handle.wait()
        self.packed = None


class BlockScaled(P2PCommunicator):
    """Megatron's communicator, whose forward direction is in FP8."""

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape,
        wait_on_reqs: bool = True,
    ):
        sent = None if tensor_send_next is None else encode(tensor_send_next)
        x = packed = gradient = None
        options = {"device": torch.cuda.current_device()}
        dtype = self.config.pipeline_dtype
        if recv_prev:
            *lead, D = tensor_shape
            packed = torch.empty((*lead, D + 4 * D // BLOCK), dtype=torch.uint8, **options)
            x = torch.empty(tensor_shape, dtype=dtype, requires_grad=True, **options)
        if recv_next:
            gradient = torch.empty(tensor_shape, dtype=dtype, requires_grad=True, **options)
        handles = _p2p_ops(
            tensor_send_prev=tensor_send_prev,
            tensor_recv_prev=packed,
            tensor_send_next=sent,
            tensor_recv_next=gradient,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        if packed is not None:
            handles["recv_prev"] = Arrival(handles["recv_prev"], packed, x)
        if sent is not None:
            handles["send_next"] = Departure(handles["send_next"], sent)
        if wait_on_reqs:
            for handle in handles.values():
                handle.wait()
            handles = None
        return x, gradient, handles


def choose(mhc: MHCConfig, config: Any) -> None:
    """Let the schedules of this process send as ``mhc.wire`` says; ``config`` is the model's.

    Raises:
        UserError: a setting that ``fp8`` excludes.
    """
    if mhc.wire == "model" or not mhc.enabled:
        schedules.P2PCommunicator = P2PCommunicator
        return
    excluded = {
        "batched p2p (set overlap-p2p-communication)": config.batch_p2p_comm,
        "variable-seq-lengths": config.variable_seq_lengths or config.mtp_standalone,
        "ring exchange": config.use_ring_exchange_p2p,
        f"n * C = {mhc.n * config.hidden_size}, not a multiple of {BLOCK}": (
            mhc.n * config.hidden_size % BLOCK
        ),
    }
    for what, holds in excluded.items():
        if holds:
            raise UserError(f"mhc: wire fp8 excludes {what}.")
    schedules.P2PCommunicator = BlockScaled
