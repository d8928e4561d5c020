"""HybridModel's stack of Megatron's own layers, which the wheel has for Transformer Engine only.

models/hybrid/hybrid_layer_specs.py asks for its modules; a laptop and the CPU suite have none.
The layers are those of the local GPT specs, a sublayer each.
"""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules


def local_hybrid_stack(config: TransformerConfig) -> ModuleSpec:
    """Attention ``*``, latent attention ``+``, MLP ``-``, experts ``E`` and a prediction layer."""
    dense, expert, latent = (
        get_gpt_layer_local_spec(normalization=config.normalization, **kind)
        for kind in (
            {"qk_layernorm": config.qk_layernorm},
            {"num_experts": config.num_moe_experts or 1},
            {"multi_latent_attention": True, "qk_layernorm": config.qk_layernorm},
        )
    )
    prediction = get_mtp_layer_spec_for_backend(None, backend=LocalSpecProvider())

    def layer(submodules: TransformerLayerSubmodules) -> ModuleSpec:
        return ModuleSpec(module=dense.module, submodules=submodules)

    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=layer(_attention(dense)),
            mla_layer=layer(_attention(latent)),
            mlp_layer=layer(_feed_forward(dense)),
            moe_layer=layer(_feed_forward(expert)),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[prediction]),
            ),
        ),
    )


def _attention(spec: ModuleSpec) -> TransformerLayerSubmodules:
    return TransformerLayerSubmodules(
        input_layernorm=spec.submodules.input_layernorm,
        self_attention=spec.submodules.self_attention,
        self_attn_bda=get_bias_dropout_add,
    )


def _feed_forward(spec: ModuleSpec) -> TransformerLayerSubmodules:
    return TransformerLayerSubmodules(
        pre_mlp_layernorm=spec.submodules.pre_mlp_layernorm,
        mlp=spec.submodules.mlp,
        mlp_bda=get_bias_dropout_add,
    )
