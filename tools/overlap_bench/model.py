"""One chunk of a middle pipeline stage, and what its layers would send to other experts' ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.config import MHCConfig
from mhc_megatron.layer_spec import mhc_layer_spec
from mhc_megatron.overlap import HyperConnectedGPTModel


@dataclass(frozen=True)
class Shape:
    """What is measured; the defaults are the paper's 27B, with eight of its experts on this rank.

    Attributes:
        layers: of the chunk.
        tokens: of a microbatch of one sequence.
        experts: on this rank; a token meets ``topk`` of them here as it would of all ranks'.
        dense: no experts at all.
    """

    layers: int = 4
    tokens: int = 4096
    hidden: int = 2560
    heads: int = 20
    experts: int = 8
    topk: int = 6
    expert_ffn: int = 1536
    dense_ffn: int = 12288
    dense: bool = False
    n: int = 4

    @property
    def hop_bytes(self) -> int:
        """Of x between two stages, in bf16."""
        return 2 * self.tokens * self.n * self.hidden

    @property
    def expert_bytes(self) -> int:
        """Of one all-to-all among eight ranks, in bf16: 7/8 of the tokens' copies leave."""
        return 2 * self.tokens * self.topk * self.hidden * 7 // 8


def configuration(shape: Shape, cpu: bool, **changes: Any) -> TransformerConfig:
    """The chunk's TransformerConfig; Transformer Engine on a GPU, Megatron's own layers on a CPU.

    Tokens are dropped beyond an expert's share and missing ones padded: the experts' shapes are
    known to the host, which then never waits for the GPU (a dropless dispatcher's host does).
    """
    dtype = torch.float32 if cpu else torch.bfloat16
    settings: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "ffn_hidden_size": shape.dense_ffn,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": not cpu,
        "use_cpu_initialization": cpu,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": not cpu,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": not cpu,
        "persist_layer_norm": False,
    }
    if not shape.dense:
        settings |= {
            "num_moe_experts": shape.experts,
            "moe_router_topk": shape.topk,
            "moe_ffn_hidden_size": shape.expert_ffn,
            "moe_shared_expert_intermediate_size": 2 * shape.expert_ffn,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "moe_expert_capacity_factor": 1.0,
            "moe_pad_expert_input_to_capacity": True,
            "moe_grouped_gemm": not cpu,
            "moe_permute_fusion": not cpu,
        }
    config = TransformerConfig(**(settings | changes))
    # Its own check wants several expert-parallel ranks (transformer_config.py:2680).
    config.overlap_moe_expert_parallel_comm = True
    return config


def chunk(
    config: TransformerConfig, mhc: MHCConfig, tokens: int, first: bool, last: bool, **more: Any
) -> GPTModel:
    """One chunk of a model; ``first`` has the embedding, ``last`` the loss.

    Megatron's own GPTModel where ``mhc`` is not enabled.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    on_gpu = not config.use_cpu_initialization
    make = get_gpt_layer_with_transformer_engine_spec if on_gpu else get_gpt_layer_local_spec
    arguments = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    if not on_gpu:
        arguments["normalization"] = config.normalization
    if mhc.enabled:
        more["mhc"] = mhc
    return (HyperConnectedGPTModel if mhc.enabled else GPTModel)(
        config,
        mhc_layer_spec(make(**arguments), config, mhc, more.get("vp_stage")),
        vocab_size=1024,
        max_sequence_length=tokens,
        position_embedding_type="rope",
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=False,
        **more,
    )


def leave_out(models: list[HyperConnectedGPTModel], pieces: str) -> None:
    """Turn pieces of the overlap off in models that are built; the rest is on."""
    for model in models:
        model.mhc = dataclasses.replace(model.mhc, overlap_without=pieces)
        for layer in model.decoder.layers:
            layer.mhc = model.mhc


class Delay(torch.autograd.Function):
    """x itself; forward and backward start the stream's ``work`` first."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, work) -> torch.Tensor:
        ctx.work = work
        work()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        ctx.work()
        return gradient, None


def send_to_experts(models: list[HyperConnectedGPTModel], work) -> None:
    """Let every dispatch and combine take the time of ``work``, which one rank's do not have."""
    for model in models:
        for layer in model.decoder.layers:
            if hasattr(layer.mlp, "token_dispatcher"):
                for name in ("token_dispatch", "token_combine"):
                    _delayed(layer.mlp.token_dispatcher, name, work)


def _delayed(dispatcher: Any, name: str, work) -> None:
    own = getattr(dispatcher, name)

    def delayed(x: torch.Tensor, *args: Any, **kwargs: Any):
        out = own(Delay.apply(x, work), *args, **kwargs)
        return out

    setattr(dispatcher, name, delayed)
