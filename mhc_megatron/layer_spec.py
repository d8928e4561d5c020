"""mhc_layer_spec: any Megatron-Core GPT layer spec -> the same layers with hyper-connections.

Leans on megatron-core 0.19.2, transformer/transformer_layer.py:

- ``TransformerLayer`` calls ``input_layernorm(hidden_states)``, then the attention, then
  ``self_attn_bda(training, fused)((out, bias), residual, p)``; the same with
  ``pre_mlp_layernorm`` and ``mlp_bda``. The residual is the ``hidden_states`` that went into the
  norm. So a read before each norm and a write in each ``*_bda`` is all; attention, MLP, MoE and
  MLA stay as they are, local or Transformer Engine.
- ``TransformerBlockSubmodules.layer_norm`` builds the final norm, before which the streams leave.
- A ``HybridStack`` (models/hybrid/hybrid_block.py, the decoder of HybridModel) has attention and
  MLP as layers of their own and makes its final norm itself (``final_norm``).
- A multi-token prediction layer (transformer/multi_token_prediction.py) runs one more layer on
  states that have left the stack; the streams begin and end within it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    _get_block_submodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_pg_rank
from torch import Tensor

from mhc_megatron import overlap
from mhc_megatron.config import MHCConfig
from mhc_megatron.connection import HyperConnection
from mhc_megatron.errors import UserError
from mhc_megatron.recompute import Recompute, check_recompute, recompute_of
from mhc_megatron.streams import Exit, enter

Spec = ModuleSpec | TransformerBlockSubmodules | MultiTokenPredictionBlockSubmodules


def mhc_layer_spec(
    spec: Spec,
    config: TransformerConfig,
    mhc: MHCConfig,
    vp_stage: int | None = None,
) -> Spec:
    """The same spec with hyper-connections.

    Args:
        spec: of a GPTModel's layer or whole block, local or Transformer Engine; of a HybridModel's
            stack; or of the multi-token prediction block of either.
        config: the model's; ``num_layers`` and the pipeline layout say how many layers to build.
        mhc: the run's choices. Where it is not enabled, ``spec`` comes back as it is.
        vp_stage: the virtual pipeline stage that is being built.

    Returns:
        Block submodules for a layer: a bare layer spec could not say what happens before the final
        norm. Otherwise what was given. With pipeline parallelism the model needs
        ``mhc_megatron.pipeline.widen_pipeline`` too.

    Raises:
        UserError: a layer or a setting that hyper-connections do not support.
    """
    if not mhc.enabled:
        return spec
    check_config(config)
    check_recompute(config, mhc)
    if isinstance(spec, MultiTokenPredictionBlockSubmodules):
        return MultiTokenPredictionBlockSubmodules(
            [_mtp_layer(layer, mhc) for layer in spec.layer_specs or []]
        )
    if isinstance(spec, ModuleSpec) and issubclass(spec.module, HybridStack):
        if config.overlap_moe_expert_parallel_comm:
            raise UserError(
                "mhc: overlap-moe-expert-parallel-comm is for GPT models; leave it out of a hybrid "
                "model's run."
            )
        return _hybrid_stack(spec, mhc)
    block, chain = _get_block_submodules(config, spec, vp_stage), Chain()
    return TransformerBlockSubmodules(
        layer_specs=[_layer(layer, mhc, chain=chain) for layer in block.layer_specs or []],
        layer_norm=block.layer_norm and _final_norm(block.layer_norm, mhc),
    )


def check_config(config: TransformerConfig) -> None:
    """Settings of a model that its connections cannot follow.

    Raises:
        UserError: with what to change.
    """
    if config.inference_fuse_tp_communication:
        raise UserError(
            "mhc: inference_fuse_tp_communication adds the residual inside Megatron's kernel, "
            "where the streams cannot follow; turn it off."
        )
    if config.fused_residual_rmsnorm:
        raise UserError(
            "mhc: fused_residual_rmsnorm adds the residual inside Transformer Engine's norm, where "
            "the streams cannot follow; turn it off."
        )
    norms = {"attn_norm", "mlp_norm"} & set(config.offload_modules or ())
    if config.fine_grained_activation_offloading and norms:
        raise UserError(
            f"mhc: offload-modules {' and '.join(sorted(norms))} frees the residual streams that a "
            "connection's backward reads; leave it out."
        )
    _check_graphs(config)


def _check_graphs(config: TransformerConfig) -> None:
    """CUDA graphs that would cut through a connection.

    A connection's read leaves H_post and H_res for its write. Both lie in the attention's part of
    a layer, or both in the MLP's (``attn``, ``mlp`` and ``moe`` of ``cuda_graph_modules``). A graph
    of the router alone has the read in it and the write behind it, and hands on Megatron's tensors
    only (transformer_layer.py:1265); ``local`` graphs of parts of a layer are not tested.
    """
    parts = {part.name for part in config.cuda_graph_modules or ()}
    if config.cuda_graph_impl not in ("local", "transformer_engine") or not parts:
        return
    cut = sorted(parts & {"moe_router", "moe_preprocess"})
    if cut:
        raise UserError(
            f"mhc: cuda-graph-modules {' '.join(cut)} captures a connection's read without its "
            "write; leave it out (attn can stay)."
        )
    if config.cuda_graph_impl == "local":
        raise UserError(
            f"mhc: cuda-graph-modules {' '.join(sorted(parts))} needs cuda-graph-impl: "
            "transformer_engine; local graphs take whole layers."
        )


class Chain:
    """The connections of a block, as its layers are built one after the other.

    Each learns which one follows it, so that a write and the next read are one launch. Not across
    layers that Megatron recomputes, captures or schedules one by one: a read made ahead would
    leave the layer's boundary beside its output. Nor, where a CUDA graph holds a part of a layer,
    within it. A graph of the whole iteration holds everything. Where the run recomputes, they also
    share the blocks of their chunk.
    """

    def __init__(self) -> None:
        self._last: HyperConnection | None = None

    def append(
        self,
        connection: HyperConnection,
        config: TransformerConfig,
        recompute: Callable[[], Recompute | None],
    ) -> None:
        """The next connection; the first of a new model where it does not follow the last.

        ``recompute`` makes the blocks of a new chunk.
        """
        last, self._last = self._last, connection
        follows = last is not None and connection.index == last.index + 1
        if follows and last.recompute is not None:
            last.recompute[0].append(connection)
        if not follows:
            blocks = recompute()
            if blocks is not None:
                blocks.append(connection)
            return
        new_layer = connection.index % 2 == 0
        alone = (
            config.recompute_granularity == "full"
            or config.cuda_graph_impl in ("local", "transformer_engine")
            or config.overlap_moe_expert_parallel_comm
            or config.cpu_offloading
        )
        if not (new_layer and alone or _graphed_in_parts(config)):
            last.followed_by(connection)


def _graphed_in_parts(config: TransformerConfig) -> bool:
    """Whether a CUDA graph holds a part of a layer, and the rest runs outside of it."""
    return config.cuda_graph_impl == "transformer_engine" and bool(config.cuda_graph_modules)


def _layer(
    spec: ModuleSpec, mhc: MHCConfig, stacked: bool = False, chain: Chain | None = None
) -> ModuleSpec:
    if issubclass(spec.module, HyperConnectedLayer):
        return spec
    if not issubclass(spec.module, TransformerLayer):
        raise UserError(
            f"mhc: layers of class {spec.module.__name__} are not supported; "
            "a spec's layers must be Megatron's TransformerLayer or subclasses of it."
        )
    spec = copy.copy(spec)
    spec.module = hyper_connected(spec.module)
    spec.params = {**(spec.params or {}), "mhc": mhc, "stacked": stacked, "chain": chain}
    return spec


def _mtp_layer(spec: ModuleSpec, mhc: MHCConfig) -> ModuleSpec:
    spec, layer = copy.copy(spec), spec.submodules.mtp_model_layer
    spec.submodules = dataclasses.replace(spec.submodules, mtp_model_layer=_layer(layer, mhc))
    return spec


def _hybrid_stack(spec: ModuleSpec, mhc: MHCConfig) -> ModuleSpec:
    """Connections for every kind of layer that is a TransformerLayer; the others refuse if used."""
    layers = {}
    for field in dataclasses.fields(spec.submodules):
        layer = getattr(spec.submodules, field.name)
        if field.name == "mtp_block_spec" or not isinstance(layer, ModuleSpec):
            continue
        if issubclass(layer.module, TransformerLayer):
            layers[field.name] = _layer(layer, mhc, stacked=True)
        else:
            layers[field.name] = ModuleSpec(_refused(layer.module.__name__))
    if spec.submodules.mtp_block_spec is not None:
        layers["mtp_block_spec"] = block = copy.copy(spec.submodules.mtp_block_spec)
        block.submodules = MultiTokenPredictionBlockSubmodules(
            [_hybrid_mtp_layer(layer, mhc) for layer in block.submodules.layer_specs]
        )
    spec = copy.copy(spec)
    spec.module, spec.params = HyperConnectedStack, {**(spec.params or {}), "mhc": mhc}
    spec.submodules = dataclasses.replace(spec.submodules, **layers)
    return spec


def _hybrid_mtp_layer(spec: ModuleSpec, mhc: MHCConfig) -> ModuleSpec:
    spec = copy.copy(spec)
    spec.module, spec.params = HyperConnectedPrediction, {**(spec.params or {}), "mhc": mhc}
    return spec


def _refused(name: str) -> type:
    """A layer class that says no when a model's pattern asks for it."""

    def refuse(self, *args, **kwargs) -> None:
        raise UserError(f"mhc: layers of class {name} are not supported in a hybrid model.")

    return type(name, (torch.nn.Module,), {"__init__": refuse})


def _final_norm(builder, mhc: MHCConfig):
    """A builder whose norm first lets the streams leave."""

    def build(*args, config: TransformerConfig, hidden_size: int, **kwargs):
        norm = builder(*args, config=config, hidden_size=hidden_size, **kwargs)
        return leave_before(norm, mhc, config)

    return build


def leave_before(norm: torch.nn.Module, mhc: MHCConfig, config: TransformerConfig):
    """Let the streams leave before ``norm``; returns ``norm``.

    It keeps its class and the names of its parameters (``final_layernorm.weight``), so a checkpoint
    of the residual model fits; a learned exit adds ``final_layernorm.exit.*``.
    """
    norm.exit = Exit(mhc, config.hidden_size, parameter_device(config), config.sequence_parallel)
    norm.register_forward_pre_hook(lambda norm, inputs: (norm.exit(inputs[0]), *inputs[1:]))
    return norm


class HyperConnectedStack(HybridStack):
    """A HybridModel's stack whose streams leave before its final norm."""

    def __init__(self, config: TransformerConfig, *args, mhc: MHCConfig, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        if self.post_process and self.post_layer_norm:
            leave_before(self.final_norm, mhc, config)
        recompute_in_blocks(self, mhc)


def recompute_in_blocks(stack: HybridStack, mhc: MHCConfig) -> None:
    """The blocks of a hybrid stack, whose layers are made without knowing each other."""
    blocks = recompute_of(mhc, stack.config, get_pg_rank(stack.pg_collection.pp))
    if blocks is not None:
        for module in stack.layers.modules():
            if isinstance(module, HyperConnection):
                blocks.append(module)


class HyperConnectedPrediction(MultiTokenPredictionLayer):
    """A HybridModel's multi-token prediction layer: its inner stack has no norm to leave at."""

    def __init__(self, config: TransformerConfig, *args, mhc: MHCConfig, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        stack = self.mtp_model_layer
        stack.exit = Exit(
            mhc, config.hidden_size, parameter_device(config), config.sequence_parallel
        )
        stack.register_forward_hook(lambda stack, inputs, x: stack.exit(x))
        recompute_in_blocks(stack, mhc)
        # The stack numbers its layers from one again; names and seeds must differ all the same.
        for connection in stack.modules():
            if isinstance(connection, HyperConnection):
                inner = connection.name.removeprefix("mtp")
                connection.name = f"mtp{self.layer_number - 1}.{inner}"
                connection.reset_parameters()


class HyperConnectedLayer(MegatronModule):
    """What hyper-connections add to a TransformerLayer; comes before it in the class's order.

    Parameters: ``attn_hc`` and ``mlp_hc``, one connection for each sublayer that the layer has (a
    HybridModel's layers have one each). ``forward`` takes [s, b, n*C], or [s, b, C] in the first
    layer of a stack, which then makes the streams. A multi-token prediction layer lets them leave
    again, unless it is ``stacked``: one of several in a HybridModel's stack.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args,
        mhc: MHCConfig,
        stacked: bool = False,
        chain: Chain | None = None,
        **kwargs,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        if not isinstance(self.cross_attention, IdentityOp):
            raise UserError("mhc: layers with cross-attention are not supported.")
        self.mhc, self.C = mhc, config.hidden_size
        #: Whether a schedule plan (overlap.py) runs this layer's parts.
        self.planned = False
        # Megatron runs the bias-dropout-add with gradients on even in evaluation, for its fused
        # kernel; the write would then record a graph that nobody uses.
        self.bias_dropout_add_exec_handler = contextlib.nullcontext
        if not isinstance(self.self_attention, IdentityOp):
            self.attn_hc = self._connect("attn", 0, self.input_layernorm, stacked)
            if self.recompute_input_layernorm:
                self.recompute_input_layernorm = False
                recompute_norm(self.input_layernorm, self.attn_hc, config)
            self.self_attn_bda = self.attn_hc.write
        if not isinstance(self.mlp, IdentityOp):
            self.mlp_hc = self._connect("mlp", 1, self.pre_mlp_layernorm, stacked)
            if self.recompute_pre_mlp_layernorm:
                self.recompute_pre_mlp_layernorm = False
                recompute_norm(self.pre_mlp_layernorm, self.mlp_hc, config)
            self.mlp_bda = self.mlp_hc.write
        # Between two prediction layers the streams end: no chain leads from one to the next.
        chain = Chain() if chain is None or self.is_mtp_layer else chain
        for connection in (getattr(self, name, None) for name in ("attn_hc", "mlp_hc")):
            if connection is not None:
                chain.append(connection, config, lambda: None if stacked else self._blocks())
        self.exit: Exit | None = None
        if self.is_mtp_layer and not stacked:
            self.exit = Exit(mhc, self.C, parameter_device(config), config.sequence_parallel)

    def _connect(
        self, kind: str, offset: int, norm: torch.nn.Module, stacked: bool
    ) -> HyperConnection:
        prefix = "mtp" if self.is_mtp_layer else ""
        connection = HyperConnection(
            self.mhc,
            self.C,
            self.layer_number - 1 if stacked else 2 * (self.layer_number - 1) + offset,
            f"{prefix}{self.layer_number - 1}.{kind}",
            device=parameter_device(self.config),
            sequence_parallel=self.config.sequence_parallel,
            compute_dtype=(
                self.config.params_dtype if self.config.fp32_residual_connection else None
            ),
        )
        connection.read_before(norm, fuse=fuses_norm(norm, self.mhc, self.config))
        if self.mhc.recompute:
            norm.register_forward_hook(lambda norm, inputs, out: connection.normed(norm, out))
        return connection

    def _enter(self, hidden_states: Tensor) -> Tensor:
        # A prediction layer's input is half precision also where the streams are float32.
        if self.config.fp32_residual_connection:
            hidden_states = hidden_states.float()
        return enter(hidden_states, self.mhc.n)

    def _blocks(self) -> Recompute | None:
        return recompute_of(self.mhc, self.config, get_pg_rank(self.pg_collection.pp))

    def _forward_attention(self, hidden_states: Tensor, *args, **kwargs):
        # A schedule plan calls this, not ``forward``, and gives an MTP layer [s, b, C].
        if self.planned:
            if hidden_states.shape[-1] == self.C:
                hidden_states = self._enter(hidden_states)
            hidden_states = self.attn_hc(hidden_states, head=True)
        return super()._forward_attention(hidden_states, *args, **kwargs)

    def init_backward_dw_wrapper(self) -> None:
        # What a schedule plan calls first (models/gpt/fine_grained_callables.py:273). Megatron's
        # own would detach x without its coefficients, and their gradients would be lost.
        if not overlap.planning():
            raise UserError(
                "overlap-moe-expert-parallel-comm with hyper-connections needs "
                "mhc_megatron.overlap.HyperConnectedGPTModel in the place of GPTModel."
            )
        super().init_backward_dw_wrapper()

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if hidden_states.shape[-1] == self.C:
            hidden_states = self._enter(hidden_states)
        first = getattr(self, "attn_hc", None) or getattr(self, "mlp_hc", None)
        if first is not None:  # a heterogeneous layer may have no sublayer
            hidden_states = first(hidden_states, head=True)
        hidden_states, context = super().forward(hidden_states, *args, **kwargs)
        if self.exit is not None:
            hidden_states = self.exit(hidden_states)
        return hidden_states, context

    # Transformer Engine's CUDA graphs do not go through ``forward``: transformer_layer.py:1152
    # captures the layer's parts, :1209 replays them. The streams enter and leave outside of them.

    def get_layer_static_inputs(self, seq_length: int, micro_batch_size: int) -> dict[str, Tensor]:
        """What a graph is captured on: Megatron's, with n*C channels (module.py:237)."""
        inputs = super().get_layer_static_inputs(seq_length, micro_batch_size)
        narrow = inputs["hidden_states"]
        wide = torch.ones(
            (*narrow.shape[:-1], self.mhc.n * self.C),
            dtype=narrow.dtype,
            device=narrow.device,
            requires_grad=narrow.requires_grad,
        )
        return inputs | {"hidden_states": wide}

    def _te_cuda_graph_replay(self, *args, **kwargs):
        if args:
            hidden_states, args = args[0], args[1:]
        else:
            hidden_states = kwargs.pop("hidden_states")
        if hidden_states.shape[-1] == self.C:
            hidden_states = self._enter(hidden_states)
        output, context = super()._te_cuda_graph_replay(hidden_states, *args, **kwargs)
        return output if self.exit is None else self.exit(output), context

    def _get_submodules_under_cudagraphs(self) -> list[torch.nn.Module]:
        """Those whose pre-forward hooks a replay has to run: the connections' too."""
        modules, parts = super()._get_submodules_under_cudagraphs(), self.config.cuda_graph_modules
        if not parts:
            return modules
        held = {part.name for part in parts}
        mlp = "moe" if self.is_moe_layer else "mlp"
        for name, part in (("attn_hc", "attn"), ("mlp_hc", mlp)):
            if part in held and hasattr(self, name):
                modules.append(getattr(self, name))
        return modules


@functools.cache
def hyper_connected(base: type[TransformerLayer]) -> type[TransformerLayer]:
    """The subclass of a layer class whose sublayers have hyper-connections."""
    return type(f"HyperConnected{base.__name__}", (HyperConnectedLayer, base), {})


def fuses_norm(norm: torch.nn.Module, mhc: MHCConfig, config: TransformerConfig) -> bool:
    """Whether the connection's kernels make this norm: an RMSNorm on its own, on a GPU."""
    return (
        mhc.fuse_norm
        and mhc.kernels == "auto"
        and mhc.sinkhorn == "paper"
        and config.normalization == "RMSNorm"
        and not config.use_cpu_initialization
        and parameter_device(config).type == "cuda"
        and isinstance(getattr(norm, "weight", None), torch.Tensor)
        and isinstance(getattr(norm, "eps", None), float)
    )


def recompute_norm(
    norm: torch.nn.Module, connection: HyperConnection, config: TransformerConfig
) -> None:
    """Selective recompute of ``norm``: its output is dropped once the sublayer has run.

    Nothing to do where the run recomputes blocks, which drop the norms' outputs with the rest, or
    where the read makes norm(u), and u is not kept in the first place.

    Megatron would run the read again with the norm, and its second H_post and H_res would be
    nobody's. Here the read stays outside: u [s, b, C] is kept, norm(u) is made again.
    ``HyperConnection.write`` sees the sublayer's output and drops norm(u) there, where
    transformer_layer.py:684 does.
    """
    if connection.mhc.recompute or fuses_norm(norm, connection.mhc, config):
        return
    own = functools.partial(type(norm).forward, norm)

    def checkpointed(x: Tensor) -> Tensor:
        u = connection(x)
        # Without fp8 the argument must be None (tensor_parallel/random.py:740: "is not None").
        connection.norm_checkpoint = CheckpointWithoutOutput(fp8=config.fp8)
        return connection.norm_checkpoint.checkpoint(own, u)

    norm.forward = checkpointed


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron makes this model's parameters."""
    if config.init_model_with_meta_device:
        return torch.device("meta")
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
