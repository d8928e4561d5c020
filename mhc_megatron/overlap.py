"""The combined 1F1B schedule with n streams: F_post,res and transfers behind other microbatches.

Megatron's ``overlap_moe_expert_parallel_comm`` runs the forward of one microbatch and the backward
of another layer by layer, as nodes on two streams: attention and experts on the compute stream, the
all-to-all of the experts on the communication stream. This file is the same schedule for layers
with hyper-connections, built on Megatron's own nodes (megatron-core 0.19.2,
models/common/model_chunk_schedule_plan.py and models/gpt/fine_grained_callables.py):

- ``LayerPlan``: the five slots of a layer. Megatron would write the MLP's output to the residual
  inside the combine, on the communication stream; here the combine ends with y, and F_post,res is
  the fifth slot, a node on a high-priority stream of its own. Its x, H_post and H_res come from the
  first slot and wait in the layer's state: one per microbatch, where the connection keeps one.
- ``ChunkPlan``: the streams begin in the pre-process node and end in the post-process node; the
  wait for the pipeline's gradient and the sends have streams of their own (``run``).
- ``HyperConnectedGPTModel``: GPTModel that plans with these.

Host order of a layer, f the forward's node and b the other microbatch's backward (Megatron's own,
``TransformerLayerSchedulePlan.run``; docs/overlap.md draws it)::

    b.mix.B  b.combine.B  f.attention.F  b.mlp.B  f.dispatch.F  b.mlp.dW  b.dispatch.B
    f.mlp.F  f.combine.F  b.attention.B  f.mix.F  b.attention.dW

Rules that the nodes keep, as tests/test_overlap.py checks: whatever one stream made and another
reads is recorded there (``record_stream``) before its last reference goes; no gradient of a
parameter is accumulated on the mixing stream; what the mixing's backward needs is never freed by
name (``should_free_input``).

What a run can leave out, by ``MHCConfig.overlap_without``:

- ``mixing_stream``: F_post,res runs on the communication stream, as Megatron's write would.
- ``gradient_wait``: the compute stream waits for the pipeline's gradient, and the other
  microbatch's attention with it.
- ``hop_streams``: sends leave from Megatron's streams; the communication stream then waits for
  each send to end (schedules.py: ``send_next_wait_handle.wait()``), n times as long as without mHC.
- ``open_end``: the compute stream waits for a chunk's last F_post,res though only a send needs it.
- ``early_refill``: a recomputed block is refilled when the gradient is there, not before.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.model_chunk_schedule_plan import (
    TransformerLayerSchedulePlan,
    TransformerModelChunkSchedulePlan,
)
from megatron.core.models.common.utils import (
    PostProcessNode,
    PreProcessNode,
    TransformerLayerNode,
    weak_method,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    NoopScheduleNode,
    ScheduleNode,
    get_comm_stream,
    get_comp_stream,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import nvtx_range_pop, nvtx_range_push
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.connection import Read, Write
from mhc_megatron.errors import UserError
from mhc_megatron.recompute import prefetch
from mhc_megatron.streams import enter

#: The mixing node's name. ``should_free_input`` (models/common/utils.py:96) frees the inputs of
#: nodes that it knows by name, and this node's y is needed in backward: the name must be its own.
MIXING = "mhc_post"


class Mixing(NamedTuple):
    """What F_post,res needs besides y; from the first slot of a layer to its last.

    H_pre, of a dense layer, is for the recompute of blocks.
    """

    x: Tensor
    H_post: Tensor
    H_res: Tensor | None
    y_bias: Tensor | None = None
    H_pre: Tensor | None = None


# ---------------------------------------------------------------------------------------- streams


@functools.cache
def mixing_stream() -> torch.cuda.Stream:
    """The stream of F_post,res: its blocks take SMs as they come free, before other streams'."""
    _, most_urgent = torch.cuda.Stream.priority_range()
    return torch.cuda.Stream(priority=most_urgent)


@functools.cache
def hop_stream(direction: str) -> torch.cuda.Stream:
    """The stream from which one ``direction``'s sends to another stage leave.

    A send and the wait for its end are all that is on it, so that neither delays anything else.
    """
    return torch.cuda.Stream()


def shared(stream: torch.cuda.Stream, *tensors: Tensor | None) -> None:
    """Say that ``stream`` uses ``tensors`` that another one may have made."""
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)


# ------------------------------------------------------------------------------------------ layers

_planning = False


def planning() -> bool:
    """Whether ``LayerPlan`` is what asks a layer for its parts, not Megatron's own plan."""
    return _planning


@contextlib.contextmanager
def _as_planned() -> Iterator[None]:
    global _planning
    _planning = True
    try:
        yield
    finally:
        _planning = False


class LayerPlan(TransformerLayerSchedulePlan):
    """A transformer or MTP layer's nodes: Megatron's, with F_post,res in the fifth slot."""

    def _build_callable_nodes(self, event, comp_stream, comm_stream, extra_args) -> None:
        check_plan(self.layer.config)
        is_mtp = isinstance(self.layer, MultiTokenPredictionLayer)
        layer = self.layer.mtp_model_layer if is_mtp else self.layer
        layer.planned = True
        with _as_planned():
            super()._build_callable_nodes(event, comp_stream, comm_stream, extra_args)
        self._wrap(self.pre_dispatch_computation, _before_mlp, layer)
        if isinstance(layer.mlp, MoELayer):
            self._wrap(self.mlp, _experts, layer)
            self._wrap(self.moe_combine, _combine, layer)
            if layer.config.expert_model_parallel_size == 1:
                # An all-to-all of one rank returns its input (tensor_parallel/mappings.py:435),
                # which then must not be freed. Megatron has no such run, tests on one GPU do.
                for node in (self.moe_dispatch, self.mlp, self.moe_combine):
                    node.free_input = False
        else:
            self._wrap(self.mlp, _dense_mlp, layer)
        mixing = TransformerLayerNode(
            mixing_stream if layer.mhc.overlaps("mixing_stream") else comm_stream,
            event,
            self.layer_state,
            self.chunk_state,
            functools.partial(_mix, layer),
            name=MIXING,
            extra_args=extra_args,
        )
        if is_mtp:
            self._wrap(self.mtp_post_process, _after_mtp, layer)
            self.mtp_post_process = InTurn(mixing, self.mtp_post_process)
        else:
            self.mtp_post_process = mixing

    @staticmethod
    def _wrap(node: TransformerLayerNode, ours: Callable, layer: torch.nn.Module) -> None:
        node.submodule = functools.partial(ours, layer, node.submodule)


class InTurn:
    """Two nodes in one slot."""

    def __init__(self, first: ScheduleNode, second: ScheduleNode) -> None:
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second.forward(self.first.forward(x))

    def backward(self, gradient: Tensor) -> Tensor:
        return self.first.backward(self.second.backward(gradient))


def check_plan(config: TransformerConfig) -> None:
    """Settings that Megatron's overlap takes and this one cannot.

    Raises:
        UserError: with what to change.
    """
    if config.cuda_graph_impl != "none":
        raise UserError("mhc: overlap-moe-expert-parallel-comm excludes CUDA graphs.")
    if config.moe_ncclep_zero_copy:
        # The combine's result lies in a buffer that the next microbatch overwrites.
        raise UserError(
            "mhc: overlap-moe-expert-parallel-comm: the backward of a connection needs the "
            "experts' output, which moe-ncclep-zero-copy does not keep; turn that off."
        )


def _before_mlp(layer, megatrons: Callable, node: TransformerLayerNode, *inputs: Tensor):
    """First slot: attention, its write, the MLP's read; with experts also norm and router.

    What the mixing needs is detached, as Megatron does with the residual: its gradients come back
    to this node's backward (``TransformerLayerNode.backward_impl``).
    """
    out, connection, state = megatrons(node, *inputs), layer.mlp_hc, node.layer_state
    H_pre = None
    if isinstance(layer.mlp, MoELayer):
        H_post, H_res = connection.take_coefficients()
        x = state.residual  # detached already; Megatron's combine forgets it
        # The norm's output is dropped after the experts, by which time another microbatch may have
        # gone through this layer.
        state.norm_checkpoint, connection.norm_checkpoint = connection.norm_checkpoint, None
    else:
        x = node.detach(out)
        out, H_post, H_res, H_pre = connection.read_of(out)
        H_pre = H_pre.detach()
    state.mixing = Mixing(x, *(_detached(node, h) for h in (H_post, H_res)), H_pre=H_pre)
    return out


def _detached(node: TransformerLayerNode, tensor: Tensor | None) -> Tensor | None:
    # A tensor without a gradient (frozen) has no place among the roots of a backward.
    return node.detach(tensor) if tensor is not None and tensor.requires_grad else tensor


def _experts(layer, megatrons: Callable, node: TransformerLayerNode, *inputs: Tensor) -> Tensor:
    """Third slot of an MoE layer."""
    out = megatrons(node, *inputs)
    checkpoint, node.layer_state.norm_checkpoint = node.layer_state.norm_checkpoint, None
    if checkpoint is not None:
        # Where fine_grained_callables.py:205 does it for Megatron's own.
        checkpoint.discard_output_and_register_recompute(out)
    return out


def _combine(layer, megatrons: Callable, node: TransformerLayerNode, out: Tensor) -> Tensor:
    """Fourth slot of an MoE layer: the combine and what belongs to the experts; returns y."""
    with layer.mlp_hc.deferring():
        y = megatrons(node, out)
    if y.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        y = y.clone()  # the node frees its input's memory, and y is needed in backward
    return y


def _dense_mlp(layer, megatrons: Callable, node: TransformerLayerNode, u: Tensor) -> Tensor:
    """Third slot of a dense layer: norm and MLP of u [s, b, C]; returns y."""
    connection, state = layer.mlp_hc, node.layer_state
    mixing = state.mixing
    connection.expect(Read(mixing.x, u, mixing.H_post, mixing.H_res, mixing.H_pre))
    with connection.deferring() as biases:
        y = megatrons(node, mixing.x)
    connection.take_coefficients()
    state.mixing = mixing._replace(y_bias=_detached(node, biases[0]))
    return y


def _mix(layer, node: TransformerLayerNode, y: Tensor) -> Tensor:
    """Fifth slot: F_post,res. Reads no parameter; the bias of the MLP comes detached."""
    mixing, node.layer_state.mixing = node.layer_state.mixing, None
    shared(torch.cuda.current_stream(), y, *mixing)
    fork = contextlib.nullcontext()
    if node.is_mtp and layer.config.sequence_parallel:
        # As common/fine_grained_callables.py:134 does for an MTP layer's other parts.
        fork = tensor_parallel.get_cuda_rng_tracker().fork()
    with fork:
        x = layer.mlp_hc.mix(
            mixing.x,
            Write(y, mixing.y_bias, mixing.H_post, mixing.H_res),
            layer.training,
            layer.hidden_dropout,
        )
    shared(node.chunk_state.compute_stream, x)
    return x


def _after_mtp(layer, megatrons: Callable, node: TransformerLayerNode, x: Tensor) -> Tensor:
    """Fifth slot of an MTP layer, on the compute stream: the streams end, then Megatron's norm."""
    return megatrons(node, layer.exit(x))


# ------------------------------------------------------------------------------------------ chunks


def has_mtp(model: GPTModel) -> bool:
    """Whether this chunk holds MTP layers."""
    return getattr(model, "mtp", None) is not None


class PreProcess(PreProcessNode):
    """Embedding, and the streams begin."""

    def forward_impl(self) -> Tensor:
        x = super().forward_impl()
        if self.model.pre_process:
            return enter(x, self.model.mhc.n)
        # Received on the stream of the send that it came with.
        shared(torch.cuda.current_stream(), x)
        return x


class PostProcess(PostProcessNode):
    """The streams end, final norm, output layer, loss."""

    def forward_impl(self, hidden_states: Tensor) -> Tensor:
        decoder = self.model.decoder
        # Megatron's node has the norm of a chunk without layers; before MTP it is in ``Leave``.
        if len(decoder.layers) > 0 and decoder.final_layernorm and not has_mtp(self.model):
            hidden_states = decoder.final_layernorm(hidden_states)
        return super().forward_impl(hidden_states)


class Leave(ScheduleNode):
    """After the decoder's last layer: the streams end, and the final norm, on the compute stream.

    For a chunk that goes on with MTP layers or sends its output to a stage that does; n*C wide for
    the hop.
    """

    def __init__(self, model: GPTModel, event, stream) -> None:
        super().__init__(weak_method(self.forward_impl), stream, event, name="leave")
        self.model = model

    def forward_impl(self, x: Tensor) -> Tensor:
        x = self.model.decoder.final_layernorm(x)
        return x if has_mtp(self.model) else enter(x, self.model.mhc.n)


class Arrive(ScheduleNode):
    """Before a chunk of MTP layers alone: what ``Leave`` made n-fold for the hop, once."""

    def __init__(self, model: GPTModel, event, stream) -> None:
        super().__init__(weak_method(self.forward_impl), stream, event, name="arrive")
        self.C = model.decoder.config.hidden_size

    def forward_impl(self, x: Tensor) -> Tensor:
        return x[..., : self.C].contiguous()


class ChunkPlan(TransformerModelChunkSchedulePlan):
    """One microbatch's way through one chunk of a model.

    Takes what ``TransformerModelChunkSchedulePlan`` takes; ``model`` is a HyperConnectedGPTModel.
    """

    LAYER_SCHEDULE_PLAN_CLASS = LayerPlan
    PRE_PROCESS_NODE_CLASS = PreProcess
    POST_PROCESS_NODE_CLASS = PostProcess

    def __init__(self, model: GPTModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.mhc: MHCConfig = model.mhc
        self.state.compute_stream = torch.cuda.current_stream()
        self.arrive: Arrive | NoopScheduleNode = NoopScheduleNode()
        decoder = model.decoder
        if len(decoder.layers) == 0 and has_mtp(model) and not model.pre_process:
            self.arrive = Arrive(model, self.event, get_comp_stream)
        elif decoder.final_layernorm and (has_mtp(model) or not model.post_process):
            last = self.get_layer(len(decoder.layers) - 1)
            last.mtp_post_process = InTurn(
                last.mtp_post_process, Leave(model, self.event, get_comp_stream)
            )

    def _extra_args_for_layer(self, module, layer_idx: int, num_layers: int) -> dict[str, Any]:
        extra = super()._extra_args_for_layer(module, layer_idx, num_layers)
        if module is self.state.model.decoder:
            # The last layer's combine would run the final norm (fine_grained_callables.py:264):
            # here that comes after F_post,res, and not on the communication stream.
            extra["is_last_layer"] = False
        return extra

    @staticmethod
    def run(
        f_schedule_plan: ChunkPlan | None,
        b_schedule_plan: ChunkPlan | None,
        b_grad: Tensor | None = None,
        pre_forward: Callable | None = None,
        pre_backward: Callable | None = None,
        post_forward: Callable | None = None,
        post_backward: Callable | None = None,
    ) -> Tensor | None:
        """The forward of one plan and the backward of another, interleaved.

        As ``TransformerModelChunkSchedulePlan.run``, which it replaces: the same arguments, the
        same order of nodes. The callbacks wait for and start the pipeline's transfers
        (pipeline_parallel/schedules.py, ``pp_pre_forward`` and so on). Returns the output of the
        forward.
        """
        f, b, out = f_schedule_plan, b_schedule_plan, None
        if f is not None:
            if pre_forward is not None:
                pre_forward(f.vp_stage)
            f.record_current_stream()
            out = f.arrive.forward(f.pre_process.forward())
        if b is not None:
            b_grad = b._begin_backward(b_grad, pre_backward)
        out, b_grad, last_layer = _run_layers(f, b, out, b_grad)
        if f is not None and post_forward is not None:
            f._send(out, post_forward, "forward", get_comm_stream())
        if b is not None and post_backward is not None:
            b._send(b_grad, post_backward, "backward", torch.cuda.current_stream())
        if last_layer is not None:
            # The weight gradient of the first layer's attention, behind the gradient's send.
            last_layer.pre_dispatch_computation.backward_dw()
            last_layer.release_state()
        if f is not None and f.post_process is not None:
            out = f.post_process.forward(out)
        if b is not None:
            b.pre_process.backward(b_grad)
        if f is not None:
            f._end_forward(sent=post_forward is not None)
        if b is not None:
            b.wait_current_stream()
            b.release_state()
        return out

    def _begin_backward(self, gradient: Tensor, pre_backward: Callable | None) -> Tensor:
        """Wait for the gradient on the stream that needs it, and on no other."""
        assert gradient is not None
        if self.mhc.recompute and self.mhc.overlaps("early_refill"):
            # What the first node of the backward reads, while the gradient is still on its way.
            prefetch(self.state.model)
        self.record_current_stream()
        if pre_backward is not None:
            with torch.cuda.stream(self._first_backward_stream()):
                self.wait_current_stream()
                pre_backward(self.vp_stage)
                self.record_current_stream()
        if self.post_process is not None:
            gradient = self.post_process.backward(gradient)
        return gradient

    def _first_backward_stream(self) -> torch.cuda.Stream:
        """The mixing stream where a layer's mixing is the first node of this chunk's backward."""
        if self.post_process is None and self.num_layers() > 0:
            first = self.get_layer(self.num_layers() - 1).mtp_post_process
            mixing = isinstance(first, TransformerLayerNode)  # and not in turn with another
            both = self.mhc.overlaps("mixing_stream") and self.mhc.overlaps("gradient_wait")
            if mixing and both:
                return mixing_stream()
        return torch.cuda.current_stream()

    def _send(self, tensor: Tensor, post: Callable, direction: str, megatrons) -> None:
        stream = hop_stream(direction) if self.mhc.overlaps("hop_streams") else megatrons
        shared(stream, tensor)
        with torch.cuda.stream(stream):
            self.wait_current_stream()
            post(tensor, self.vp_stage)

    def _end_forward(self, sent: bool) -> None:
        """Let the compute stream wait for the chunk's output, unless nothing there reads it."""
        if not (sent and self.post_process is None and self.mhc.overlaps("open_end")):
            self.wait_current_stream()


def _run_layers(
    f: ChunkPlan | None, b: ChunkPlan | None, out: Tensor | None, gradient: Tensor | None
) -> tuple[Tensor | None, Tensor | None, LayerPlan | None]:
    """All layers: the forward's first with the backward's last, and so on.

    Returns the forward's output, the gradient of the backward's input, and the backward's first
    layer, whose weight gradients are still to come.
    """
    forwards = f.num_layers() if f is not None else 0
    backwards = b.num_layers() if b is not None else 0
    last_layer = None
    for i in range(max(forwards, backwards)):
        f_layer = f.get_layer(i) if i < forwards else None
        b_layer = b.pop_layer() if i < backwards else None
        nvtx_range_push(f"layer {i}")
        out, gradient = LayerPlan.run(
            f_layer, b_layer, f_input=out, b_grad=gradient, is_last_layer_in_bwd=i == backwards - 1
        )
        nvtx_range_pop(f"layer {i}")
        if i == backwards - 1:
            last_layer = b_layer
        elif b_layer is not None:
            b_layer.release_state()
    if b is not None:
        gradient = b.arrive.backward(gradient)
    return out, gradient, last_layer


# ------------------------------------------------------------------------------------------- model


class HyperConnectedGPTModel(GPTModel):
    """GPTModel whose overlap schedule knows hyper-connections.

    Args:
        mhc: the run's choices; the rest is GPTModel's.
    """

    def __init__(self, *args: Any, mhc: MHCConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mhc = mhc

    def build_schedule_plan(self, *args: Any, **kwargs: Any) -> ChunkPlan:
        """As GPTModel's (models/gpt/gpt_model.py:798), which names Megatron's plan."""
        given = inspect.signature(super().build_schedule_plan).bind(*args, **kwargs).arguments
        for unused in ("inference_context", "inference_params"):
            given.pop(unused, None)
        if self.config.fine_grained_activation_offloading:
            self.preprocess_for_fine_grained_offloading()
        if self.config.moe_paged_stash:
            self.preprocess_for_paged_stash()
        return ChunkPlan(self, **given)
