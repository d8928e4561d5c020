"""Recompute of blocks, Eq. (20): what a block of L_r sublayers drops, and when it is made again.

A block keeps its first x, and y, H_pre, H_post and H_res of every sublayer (y and the last two are
kept for the connection's own backward anyway; H_pre is n more numbers). When its last write has
run, the memory of every later x_l, of every u_l = H_pre x_l and of every norm(u_l) is given back.
It is filled again in one launch before backward reads it, with the forward's arithmetic in the
forward's order, then each norm: gradients are the same to the bit.

Sublayers are counted, as the paper's layer functions F are: attention and feed-forward are two. A
block may begin between them; it never leaves a pipeline stage or a virtual chunk, as the
connections of each have a ``Recompute`` of their own.

How (as megatron-core 0.19.2, tensor_parallel/random.py:830, does for one module's output): the
*storage* is resized to nothing, so that whatever saved such a tensor for backward, whole or as a
view, sees it empty, and full again later, in the same tensor object with the same version.
A dropped storage is held weakly: what nobody saved (FP8 linears keep an 8-bit copy of their input)
is not made again.

When: the refill of a block starts when the gradient reaches the last sublayer of backward of the
block after it (its first one in forward), on a stream of its own, and the block's own backward
waits for it. Nothing comes after the last block of a chunk: ``Recompute.prefetch`` starts it, for
a schedule that is about to wait for the pipeline's gradient; else it starts as that arrives.
"""

from __future__ import annotations

import collections
import contextlib
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core import num_microbatches_calculator
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mhc_megatron.errors import UserError
from mhc_megatron.footprint import best_block, microbatches_in_flight

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mhc_megatron.config import MHCConfig
    from mhc_megatron.connection import HyperConnection, Write

#: Makes x_l and u_l: ``mhc_refill`` of mhc_kernels or of its reference.
Refill = Callable[..., object]


class Recompute:
    """The blocks of one chunk's connections, in the order in which data passes them.

    Args:
        n: residual streams.
        L_r: sublayers of a block, or ``auto``: the best for this chunk (``footprint.best_block``).
        in_flight: microbatches of the chunk that wait for their backward; asked once, at the first
            training forward, when Megatron knows how many microbatches a step has.
    """

    def __init__(self, n: int, L_r: int | str, in_flight: Callable[[], int]) -> None:
        self.n, self.chosen, self.in_flight = n, L_r, in_flight
        self.connections: list[HyperConnection] = []
        self._L_r = 0
        self._open: Block | None = None
        self._waiting: collections.deque[weakref.ref[Block]] = collections.deque()

    @property
    def L_r(self) -> int:
        """Sublayers of a block; the chunk's last one may be shorter."""
        if not self._L_r:
            L = len(self.connections)
            auto = self.chosen == "auto"
            self._L_r = best_block(self.n, L, self.in_flight())[0] if auto else min(self.chosen, L)
        return self._L_r

    def append(self, connection: HyperConnection) -> None:
        """The next connection of the chunk."""
        connection.recompute = self, len(self.connections)
        self.connections.append(connection)

    # ------------------------------------------------------------------ called by the connections

    def read(
        self, position: int, x: Tensor, u: Tensor, H_pre: Tensor, norm_weight: Tensor | None = None
    ) -> None:
        """The sublayer at ``position`` has read u [s, b, C] from x [s, b, n*C].

        norm_weight [C]: of the norm that the read made with u.
        """
        block, self._open = self._open, None
        if not torch.is_grad_enabled():
            return
        # Not in sequence: an exception ended the forward before, or a part of it runs alone.
        in_sequence = block is not None and block.end == position
        if position % self.L_r == 0:
            before = block if in_sequence and block.dropped else None
            self._open = Block(x, self.n, position, before)
        elif in_sequence and not block.closed:
            self._open = block
        if self._open is not None:
            weight = None if norm_weight is None else norm_weight.detach()
            self._open.sublayers.append(Sublayer(x.detach(), u.detach(), H_pre, weight))

    def normed(self, position: int, norm: nn.Module, out: Tensor) -> None:
        """The norm of the sublayer at ``position`` has made ``out`` of its u."""
        block = self._running(position)
        if block is not None:
            block.sublayers[-1].norm, block.sublayers[-1].normed = norm, out.detach()

    def wrote(self, position: int, write: Write, x: Tensor, refill: Refill) -> None:
        """The sublayer at ``position`` has written x [s, b, n*C]; its block may end with it.

        ``refill`` is ``mhc_refill`` of what made x: the kernels or their reference.
        """
        block = self._running(position)
        if block is None:
            return
        block.sublayers[-1].keep(write)
        last = position + 1 == len(self.connections)
        if last or (position + 1) % self.L_r == 0:
            block.close(x, refill)
        elif position == block.first:
            block.watch(x)
        if last:
            self._open = None
            if block.dropped:
                self.waiting()  # forgets those whose backward has begun
                self._waiting.append(weakref.ref(block))

    def _running(self, position: int) -> Block | None:
        """The open block, where the sublayer at ``position`` is the one that it has reached."""
        block = self._open
        return block if block and not block.closed and block.end == position + 1 else None

    # -------------------------------------------------------------------- called by the schedule

    def waiting(self) -> Block | None:
        """The last block of the oldest forward whose backward has not begun.

        Pipeline schedules run a chunk's backwards in the order of its forwards.
        """
        while self._waiting:
            block = self._waiting[0]()
            if block is not None and block.dropped:
                return block
            self._waiting.popleft()
        return None

    def prefetch(self) -> bool:
        """Start the refill that the chunk's next backward needs first; whether there was one.

        Its memory comes from the current stream, and it runs on a stream of its own after what the
        current one has been given so far.
        """
        block = self.waiting()
        if block is not None:
            block.refill()
        return block is not None


def recomputes(model: nn.Module) -> list[Recompute]:
    """Those of a model chunk, in the order in which data passes them; the last is needed first."""
    if model not in _recomputes:
        found: dict[int, Recompute] = {}
        for module in model.modules():
            recompute = getattr(module, "recompute", None)
            if isinstance(recompute, tuple) and isinstance(recompute[0], Recompute):
                found.setdefault(id(recompute[0]), recompute[0])
        _recomputes[model] = list(found.values())
    return _recomputes[model]


#: What ``recomputes`` found: a schedule asks for it once a microbatch.
_recomputes: weakref.WeakKeyDictionary[nn.Module, list[Recompute]] = weakref.WeakKeyDictionary()


def prefetch(model: nn.Module) -> bool:
    """``Recompute.prefetch`` of the part of a model chunk whose backward comes first.

    To be called before a schedule waits for the gradient of the chunk's output, so that
    communication hides the refill. False where there is nothing to refill.
    """
    found = recomputes(model)
    return bool(found) and found[-1].prefetch()


# -------------------------------------------------------------------------------------- one block


@dataclass
class Sublayer:
    """What a forward leaves of one sublayer, detached; x, u and normed until its block ends."""

    x: Tensor
    u: Tensor
    H_pre: Tensor
    norm_weight: Tensor | None = None
    norm: nn.Module | None = None
    normed: Tensor | None = None
    write: Write | None = None

    def keep(self, write: Write) -> None:
        """The write's operands, without their graph: it would hold the block that holds it."""
        self.write = type(write)(*(t if t is None else t.detach() for t in write))

    @property
    def droppable(self) -> bool:
        """That it ran whole, and that its tensors are what a refill writes."""
        whole = self.write is not None and self.u.numel() > 0
        return whole and self.x.is_contiguous() and self.u.is_contiguous()


class Block:
    """One block of one forward: open while its sublayers run, then dropped, then refilled.

    The graph holds it, by the hook on its last x; a forward whose backward never comes takes its
    blocks with it.

    Args:
        x: what its first sublayer read; kept.
        n: residual streams.
        first: position of the first sublayer in its chunk.
        before: the block before in the same forward, if that one dropped anything.
    """

    def __init__(self, x: Tensor, n: int, first: int, before: Block | None) -> None:
        self.x, self.n, self.first = x.detach(), n, first
        self.sublayers: list[Sublayer] = []
        self.closed = self.dropped = False
        self._before = before
        self._targets: list[Targets] = []
        #: From the refill until the block's backward: scratch memory is in use on another stream.
        self._memory: list[Filled] = []
        self._make: Refill | None = None
        self._filled: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        #: Where its memory is from and goes back to: a schedule may write, and so close and refill
        #: it, on another stream than the one that reads.
        self._home = _current_stream(x)
        self._end: int | None = None

    @property
    def end(self) -> int:
        """Position after its last sublayer so far."""
        return self.first + len(self.sublayers) if self._end is None else self._end

    def watch(self, x: Tensor) -> None:
        """When the gradient of x, of the block's first write, is there: refill the block before.

        All but one sublayer of this block's memory is free again by then, and the backward of that
        one hides the refill.
        """
        before, self._before = self._before, None
        if before is not None and x.requires_grad:
            x.register_hook(lambda gradient: before.refill())

    def close(self, x: Tensor, make: Refill) -> None:
        """The last write has made x: drop, and refill when its gradient comes.

        Nothing is dropped before its refill is sure to come: an exception on the way leaves memory
        and graph as they are without recompute.
        """
        self._end, self.closed = self.end, True
        if not (x.requires_grad and all(sublayer.droppable for sublayer in self.sublayers)):
            self.sublayers, self._before = [], None
            return
        self._make, self._stream = make, _current_stream(x)
        self._targets = [
            Targets.of(sublayer, keep_x=sublayer is self.sublayers[0])
            for sublayer in self.sublayers
        ]
        x.register_hook(lambda gradient: self._before_backward())
        if len(self.sublayers) == 1:
            self.watch(x)
        for sublayer, target in zip(self.sublayers, self._targets, strict=True):
            sublayer.x = sublayer.u = sublayer.normed = None
            target.drop()
        self._before, self.dropped = None, True

    def refill(self) -> None:
        """Fill what was dropped, on a stream of its own; nothing where that was done before."""
        if not self.dropped:
            return
        self.dropped = False
        with torch.cuda.stream(self._home) if self._home else contextlib.nullcontext():
            self._memory = [target.allocate() for target in self._targets]
        with _beside(self.x, self._home) as self._filled:
            self._fill(self._memory)

    def _before_backward(self) -> None:
        """The gradient of the block's last x is complete; what is upstream of it runs next."""
        self.refill()
        if self._filled is not None:
            now = _current_stream(self.x)
            if now != self._stream or now != self._home:
                # What the refill reads, and writes for itself, goes back to streams that have not
                # waited for it: they learn of it here.
                for tensor in self._inputs() + self._filled_tensors():
                    tensor.record_stream(side_stream(tensor.device))
            now.wait_event(self._filled)
        self.sublayers, self._targets, self._memory, self._filled = [], [], [], None
        self.x = self.x.new_empty(0)

    def _fill(self, filled: list[Filled]) -> None:
        x = self.x.unflatten(-1, (self.n, -1))
        writes = [sublayer.write for sublayer in self.sublayers[:-1]]
        reads = [of.u for of in filled]
        self._make(
            x,
            [write.y for write in writes],
            [write.H_post for write in writes],
            [write.H_res for write in writes],
            [sublayer.H_pre for sublayer in self.sublayers],
            y_bias=[write.y_bias for write in writes],
            norm_weight=[sublayer.norm_weight for sublayer in self.sublayers],
            out=([of.x.view(x.shape) for of in filled[1:]], reads),
        )
        for sublayer, of, u in zip(self.sublayers, filled, reads, strict=True):
            if of.normed is not None:
                # With gradients on, as in the forward: the same kernels, whatever the norm is.
                # Its class's own forward: the instance's would read the streams again.
                with torch.enable_grad():
                    made = type(sublayer.norm).forward(sublayer.norm, u.requires_grad_())
                of.normed.copy_(made.detach())

    def _filled_tensors(self) -> list[Tensor]:
        memory = [(of.x, of.u, of.normed) for of in self._memory]
        return [tensor for of in memory for tensor in of if tensor is not None]

    def _inputs(self) -> list[Tensor]:
        tensors = [self.x]
        for sublayer in self.sublayers:
            tensors += [sublayer.H_pre, *(t for t in sublayer.write if t is not None)]
        return tensors


# ----------------------------------------------------------------------------------------- memory


class Dropped:
    """A tensor's place in a storage that is empty for now."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storage, self.bytes = StorageWeakRef(storage), storage.nbytes()
        self._place = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device
        self.tensor: Tensor | None = tensor

    def drop(self) -> None:
        """Give the memory back; streams that still use it are the current one or known to it."""
        tensor, self.tensor = self.tensor, None
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        tensor.untyped_storage().resize_(0)

    @property
    def kept(self) -> bool:
        """Whether something saved it for backward."""
        return not self._storage.expired()

    def allocate(self) -> Tensor:
        """The tensor with its memory, as large as before; memory of its own if it is not kept."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return torch.empty_strided(*self._place[1:], dtype=self._dtype, device=self._device)
        storage.resize_(self.bytes)
        return torch.empty(0, dtype=self._dtype, device=self._device).set_(storage, *self._place)


@dataclass
class Filled:
    """Memory to fill for one sublayer. x: None for the block's first; normed: None if not kept."""

    x: Tensor | None
    u: Tensor
    normed: Tensor | None


@dataclass
class Targets:
    """What of one sublayer is dropped."""

    x: Dropped | None
    u: Dropped
    normed: Dropped | None

    @classmethod
    def of(cls, sublayer: Sublayer, keep_x: bool) -> Targets:
        """norm(u) is u itself where the linear that follows norms (Transformer Engine)."""
        normed = None
        if sublayer.normed is not None and not _same_storage(sublayer.normed, sublayer.u):
            normed = Dropped(sublayer.normed)
        return cls(None if keep_x else Dropped(sublayer.x), Dropped(sublayer.u), normed)

    def drop(self) -> None:
        for dropped in (self.x, self.u, self.normed):
            if dropped is not None:
                dropped.drop()

    def allocate(self) -> Filled:
        """Memory again. x and u are on the way to what follows, whether kept or not."""
        normed = self.normed if self.normed is not None and self.normed.kept else None
        return Filled(self.x and self.x.allocate(), self.u.allocate(), normed and normed.allocate())


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


# ---------------------------------------------------------------------------------------- streams

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that refills run on, one a device."""
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]


@contextlib.contextmanager
def _beside(x: Tensor, home: torch.cuda.Stream | None):
    """Run on the refill's stream after all that the current one and ``home`` were given.

    Yields the event of its end.

    None, on the current stream, for what is not on a GPU.
    """
    if not x.is_cuda:
        yield None
        return
    side, done = side_stream(x.device), torch.cuda.Event()
    side.wait_stream(torch.cuda.current_stream(x.device))
    side.wait_stream(home)
    with torch.cuda.stream(side):
        yield done
        done.record(side)


def _current_stream(x: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


# --------------------------------------------------------------------------------------- settings


def recompute_of(mhc: MHCConfig, config: TransformerConfig, rank: int) -> Recompute | None:
    """The ``Recompute`` of a new chunk on pipeline rank ``rank``; None where it is off."""
    if not (mhc.enabled and mhc.recompute):
        return None

    def in_flight() -> int:
        calculator = num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR
        return microbatches_in_flight(
            config.pipeline_model_parallel_size,
            rank,
            config.virtual_pipeline_model_parallel_size or 1,
            config.microbatch_group_size_per_vp_stage,
            calculator and calculator.get(),
        )

    return Recompute(mhc.n, mhc.recompute, in_flight)


def check_recompute(config: TransformerConfig | Namespace, mhc: MHCConfig) -> None:
    """Settings of a model (or of a run: Megatron's arguments) that exclude recompute of blocks.

    Raises:
        UserError: with what to change.
    """
    if not (mhc.enabled and mhc.recompute):
        return
    offloads = getattr(config, "fine_grained_activation_offloading", False)
    graphs = getattr(config, "cuda_graph_impl", None) or "none"
    refused = {
        "recompute-granularity full makes whole layers again": config.recompute_granularity
        == "full",
        f"cuda-graph-impl {graphs} captures memory that a block gives back": graphs != "none",
        "fine-grained-activation-offloading moves what a block drops": offloads,
        "cpu-offloading moves what a block drops": getattr(config, "cpu_offloading", False),
        "FSDP has no weights for the norms that backward makes again": getattr(
            config, "use_megatron_fsdp", False
        )
        or getattr(config, "use_torch_fsdp2", False),
    }
    for why, holds in refused.items():
        if holds:
            raise UserError(f"mhc: recompute {mhc.recompute}: {why}; use one of the two.")
