"""DeepEP's interface on CPU processes, for Megatron's flex dispatcher.

DeepEP (github.com/deepseek-ai/DeepEP) moves tokens between experts with kernels for NVLink and
RDMA. What Megatron calls of it stands here, on gloo: ``Buffer`` (backend ``deepep``) sends a token
once to every rank that has one of its experts, ``HybridEPBuffer`` (``hybridep``) once to every
expert. Nothing is fast, everything is where DeepEP would have put it.

Leans on core/transformer/moe/fused_a2a.py of megatron-core 0.19.2, which calls it.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def install() -> None:
    """Let Megatron find this as ``deep_ep``, in this process, before it builds a model."""
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    package, utils = types.ModuleType("deep_ep"), types.ModuleType("deep_ep.utils")
    package.Buffer, package.HybridEPBuffer = Buffer, HybridEPBuffer
    utils.EventHandle, utils.EventOverlap = EventHandle, EventOverlap
    package.utils = utils
    sys.modules |= {"deep_ep": package, "deep_ep.utils": utils}
    importlib.reload(fused_a2a)
    for name in (
        "fused_dispatch",
        "fused_combine",
        "set_deepep_num_sms",
        "hybrid_ep_dispatch",
        "hybrid_ep_combine",
    ):
        setattr(token_dispatcher, name, getattr(fused_a2a, name))


class EventHandle:
    """A moment on a stream."""


class EventOverlap:
    """What a call returns that runs beside others; here it has ended."""

    def __init__(self, event: EventHandle | None = None) -> None:
        pass

    def current_stream_wait(self) -> None:
        pass


class Config:
    """Sizes of buffers, which gloo does not need."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return 0


class Sent(NamedTuple):
    """Rows that went out: their tokens, in order, how many to each rank and from each."""

    tokens: Tensor
    to: list[int]
    of: list[int]
    count: int


def _sent(is_in_rank: Tensor, group: dist.ProcessGroup) -> Sent:
    """``is_in_rank`` [T, ranks]: which tokens each rank gets."""
    tokens = torch.cat([rank.nonzero().flatten() for rank in is_in_rank.t()])
    to = is_in_rank.sum(0)
    of = torch.empty_like(to)
    dist.all_to_all_single(of, to, group=group)
    return Sent(tokens, to.tolist(), of.tolist(), len(is_in_rank))


def _out(rows: Tensor, sent: Sent, group: dist.ProcessGroup) -> Tensor:
    """Rows [T, ...] of this rank's tokens -> those that the other ranks sent here."""
    arrived = rows.new_empty(sum(sent.of), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows[sent.tokens].contiguous(), sent.of, sent.to, group=group)
    return arrived


def _back(rows: Tensor, sent: Sent, group: dist.ProcessGroup) -> Tensor:
    """The way back of ``_out``: [T, ...], the sum of what the ranks say of a token."""
    arrived = rows.new_empty(len(sent.tokens), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), sent.to, sent.of, group=group)
    whole = rows.new_zeros(sent.count, *rows.shape[1:])
    return whole.index_add_(0, sent.tokens, arrived)


class Buffer:
    """deep_ep.Buffer: a token goes once to a rank, with the experts that it wants there."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(count: int) -> None:
        pass

    @staticmethod
    def get_dispatch_config(ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **options: Any) -> tuple:
        """Tokens for each rank, None, for each expert [experts], and [T, ranks] of which ones."""
        wanted = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.bool)
        wanted[torch.arange(len(topk_idx))[:, None], topk_idx] = True  # -1 is the last column
        wanted = wanted[:, :-1]
        in_rank = wanted.unflatten(1, (self.group.size(), -1)).any(-1)
        return in_rank.sum(0), None, wanted.sum(0), in_rank, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        handle: Sent | None = None,
        **options: Any,
    ) -> tuple:
        """x [T, C] -> the rows that arrive, their experts here (-1: not one of ours) and weights.

        With ``handle``, of an earlier call, the same rows go the same way.
        """
        if handle is not None:
            return _out(x, handle, self.group), None, None, None, None, EventOverlap()
        sent = _sent(is_token_in_rank, self.group)
        experts = len(num_tokens_per_expert) // self.group.size()
        index = _out(topk_idx, sent, self.group) - experts * self.group.rank()
        elsewhere = (index < 0) | (index >= experts)
        index = index.masked_fill(elsewhere, -1)
        weights = _out(topk_weights, sent, self.group).masked_fill(elsewhere, 0.0)
        counts = [int((index == expert).sum()) for expert in range(experts)]
        return _out(x, sent, self.group), index, weights, counts, sent, EventOverlap()

    def combine(
        self, x: Tensor, handle: Sent, topk_weights: Tensor | None = None, **options: Any
    ) -> tuple:
        """Rows of ``dispatch`` -> [T, C], and their weights [T, topk] likewise."""
        if topk_weights is not None:
            topk_weights = _back(topk_weights, handle, self.group)
        return _back(x, handle, self.group), topk_weights, EventOverlap()


class Permuted(NamedTuple):
    """Of HybridEP: the way between ranks, and the rows for each expert behind it."""

    sent: Sent
    rows: Tensor
    experts: Tensor


class HybridEPBuffer:
    """deep_ep.HybridEPBuffer: tokens arrive in the order of the experts, once for each."""

    def __init__(self, group: dist.ProcessGroup, num_local_experts: int, **options: Any) -> None:
        self.group, self.experts = group, num_local_experts

    def dispatch_with_permute(
        self,
        hidden: Tensor,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        handle: Permuted | None = None,
        **options: Any,
    ) -> tuple:
        """hidden [T, C] -> rows by expert, probs of the rows, None, tokens of each expert."""
        if handle is not None:
            return _out(hidden, handle.sent, self.group)[handle.rows], None, None, None, handle
        sent = _sent(routing_map.unflatten(1, (self.group.size(), -1)).any(-1), self.group)
        mine = slice(self.experts * self.group.rank(), self.experts * (self.group.rank() + 1))
        wanted = _out(routing_map.long(), sent, self.group)[:, mine]
        experts, rows = wanted.t().nonzero(as_tuple=True)
        handle = Permuted(sent, rows, experts)
        weights = _out(probs, sent, self.group)[:, mine][rows, experts]
        arrived = _out(hidden, sent, self.group)[rows]
        return arrived, weights, None, wanted.sum(0), handle

    def combine_with_unpermute(
        self, hidden: Tensor, handle: Permuted, probs: Tensor | None = None, **options: Any
    ) -> tuple:
        """Rows by expert -> [T, C], the sum over experts; probs [T, experts of all ranks]."""
        count = sum(handle.sent.of)
        whole = hidden.new_zeros(count, hidden.shape[-1]).index_add_(0, handle.rows, hidden)
        if probs is not None:
            mine = self.experts * self.group.rank()
            spread = probs.new_zeros(count, self.experts * self.group.size())
            spread[handle.rows, handle.experts + mine] = probs
            probs = _back(spread, handle.sent, self.group)
        return _back(whole, handle.sent, self.group), probs
