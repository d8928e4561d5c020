"""mhc_layer_spec: any Megatron-Core GPT layer spec -> the same layers with hyper-connections.

Leans on megatron-core 0.19.2, transformer/transformer_layer.py:

- ``TransformerLayer`` calls ``input_layernorm(hidden_states)``, then the attention, then
  ``self_attn_bda(training, fused)((out, bias), residual, p)``; the same with
  ``pre_mlp_layernorm`` and ``mlp_bda``. The residual is the ``hidden_states`` that went into the
  norm. So a read before each norm and a write in each ``*_bda`` is all; attention, MLP, MoE and
  MLA stay as they are, local or Transformer Engine.
- ``TransformerBlockSubmodules.layer_norm`` builds the final norm, before which the streams leave.
"""

from __future__ import annotations

import contextlib
import copy
import functools

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    _get_block_submodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.connection import HyperConnection
from mhc_megatron.errors import UserError
from mhc_megatron.streams import Exit, enter


def mhc_layer_spec(
    spec: ModuleSpec | TransformerBlockSubmodules,
    config: TransformerConfig,
    mhc: MHCConfig,
    vp_stage: int | None = None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """A GPT layer spec, or block of them, with hyper-connections.

    Args:
        spec: of one layer or of a whole block, local or Transformer Engine.
        config: the model's; ``num_layers`` and the pipeline layout say how many layers to build.
        mhc: the run's choices. Where it is not enabled, ``spec`` comes back as it is.
        vp_stage: the virtual pipeline stage that is being built.

    Returns:
        Block submodules: a bare layer spec could not say what happens before the final norm.
    """
    if not mhc.enabled:
        return spec
    block = _get_block_submodules(config, spec, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[_layer(layer, mhc) for layer in block.layer_specs or []],
        layer_norm=block.layer_norm and _final_norm(block.layer_norm, mhc),
    )


def _layer(spec: ModuleSpec, mhc: MHCConfig) -> ModuleSpec:
    if not issubclass(spec.module, TransformerLayer):
        raise UserError(
            f"mhc: layers of class {spec.module.__name__} are not supported; "
            "a spec's layers must be Megatron's TransformerLayer or subclasses of it."
        )
    spec = copy.copy(spec)
    spec.module, spec.params = hyper_connected(spec.module), {**(spec.params or {}), "mhc": mhc}
    return spec


def _final_norm(builder, mhc: MHCConfig):
    """A builder whose norm first lets the streams leave.

    The norm keeps its class and the names of its parameters (``final_layernorm.weight``), so a
    checkpoint of the residual model fits; a learned exit adds ``final_layernorm.exit.*``.
    """

    def build(*args, config: TransformerConfig, hidden_size: int, **kwargs):
        norm = builder(*args, config=config, hidden_size=hidden_size, **kwargs)
        norm.exit = Exit(mhc, hidden_size, parameter_device(config))
        norm.register_forward_pre_hook(lambda norm, inputs: (norm.exit(inputs[0]), *inputs[1:]))
        return norm

    return build


class HyperConnectedLayer(MegatronModule):
    """What hyper-connections add to a TransformerLayer; comes before it in the class's order.

    Parameters: ``attn_hc`` and ``mlp_hc``, one connection for each sublayer that the layer has (a
    HybridModel's layers have one each). ``forward`` takes [s, b, n*C], or [s, b, C] in the first
    layer of a stack, which then makes the streams.
    """

    def __init__(self, config: TransformerConfig, *args, mhc: MHCConfig, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        if not isinstance(self.cross_attention, IdentityOp):
            raise UserError("mhc: layers with cross-attention are not supported.")
        self.mhc, self.C = mhc, config.hidden_size
        # Megatron runs the bias-dropout-add with gradients on even in evaluation, for its fused
        # kernel; the write would then record a graph that nobody uses.
        self.bias_dropout_add_exec_handler = contextlib.nullcontext
        if not isinstance(self.self_attention, IdentityOp):
            self.attn_hc = self._connect("attn", 0, self.input_layernorm)
            self.self_attn_bda = self.attn_hc.write
        if not isinstance(self.mlp, IdentityOp):
            self.mlp_hc = self._connect("mlp", 1, self.pre_mlp_layernorm)
            self.mlp_bda = self.mlp_hc.write
        if self.is_mtp_layer:
            self.exit = Exit(mhc, self.C, parameter_device(config))

    def _connect(self, kind: str, offset: int, norm: torch.nn.Module) -> HyperConnection:
        prefix = "mtp" if self.is_mtp_layer else ""
        connection = HyperConnection(
            self.mhc,
            self.C,
            2 * (self.layer_number - 1) + offset,
            f"{prefix}{self.layer_number - 1}.{kind}",
            device=parameter_device(self.config),
            sequence_parallel=self.config.sequence_parallel,
            compute_dtype=(
                self.config.params_dtype if self.config.fp32_residual_connection else None
            ),
        )
        norm.register_forward_pre_hook(lambda norm, inputs: (connection(inputs[0]), *inputs[1:]))
        return connection

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if hidden_states.shape[-1] == self.C:
            hidden_states = enter(hidden_states, self.mhc.n)
        hidden_states, context = super().forward(hidden_states, *args, **kwargs)
        if self.is_mtp_layer:
            hidden_states = self.exit(hidden_states)
        return hidden_states, context


@functools.cache
def hyper_connected(base: type[TransformerLayer]) -> type[TransformerLayer]:
    """The subclass of a layer class whose sublayers have hyper-connections."""
    return type(f"HyperConnected{base.__name__}", (HyperConnectedLayer, base), {})


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron makes this model's parameters."""
    if config.init_model_with_meta_device:
        return torch.device("meta")
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
