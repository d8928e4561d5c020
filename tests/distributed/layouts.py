"""The table: which kinds of model run in which layouts. One row, one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.distributed.data import SEQUENCE

MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
}

#: Fields of Megatron's configurations over models.BASE, by name.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, 8 layers": {"num_layers": 8},
    "tied embeddings": {"share_embeddings_and_output_weights": True},
    "biases, LayerNorm, GELU, learned positions": {
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "position_embedding_type": "learned_absolute",
    },
    "grouped queries, QK norm": {"num_query_groups": 2, "qk_layernorm": True},
    "hidden dropout 0.1": {"hidden_dropout": 0.1, "add_bias_linear": True},
    "fp32 residual, bf16": {"fp32_residual_connection": True, "dtype": "bfloat16"},
    "fp32 residual, MTP, bf16": {
        "fp32_residual_connection": True,
        "dtype": "bfloat16",
        "mtp_num_layers": 1,
    },
    "bf16": {"dtype": "bfloat16"},
    "MoE alltoall": MOE,
    "MoE alltoall, bf16": MOE | {"dtype": "bfloat16"},
    "MoE allgather": MOE | {"moe_token_dispatcher_type": "allgather"},
    "MoE, shared expert, loss-free balancing": MOE
    | {
        "moe_shared_expert_intermediate_size": 32,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-2,
        "moe_layer_freq": [0, 1, 1, 1],
    },
    "MoE, auxiliary loss": MOE
    | {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-2},
    "MLA": MLA,
    "MLA, MoE": MLA | MOE | {"moe_layer_freq": [0, 1, 1, 1]},
    "MTP": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3},
    # Megatron averages a loss over each context-parallel rank's own tokens (schedules.py:334), also
    # MTP's, which is one token shorter (multi_token_prediction.py:890). With these two unscored the
    # ranks have equal numbers of both, and their average is that of one rank.
    "MTP, two documents": {
        "mtp_num_layers": 1,
        "mtp_loss_scaling_factor": 0.3,
        "unscored": [0, SEQUENCE // 2],
    },
    "MTP of depth 2": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3},
    "MLA, MoE, MTP": MLA | MOE | {"mtp_num_layers": 1, "moe_layer_freq": [0, 1, 1, 1]},
    "hybrid *-": {"hybrid_layer_pattern": "*-*-*-*-", "num_layers": 8},
    "hybrid *E": MOE | {"hybrid_layer_pattern": "*-*E*E*E", "num_layers": 8},
    "hybrid +E, latent attention": MLA
    | MOE
    | {"hybrid_layer_pattern": "+-+E+E+E", "num_layers": 8},
    "hybrid *E, shared expert, loss-free balancing": MOE
    | {
        "hybrid_layer_pattern": "*-*E*E*E",
        "num_layers": 8,
        "moe_shared_expert_intermediate_size": 32,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-2,
    },
    "hybrid *-, bf16": {"hybrid_layer_pattern": "*-*-*-*-", "num_layers": 8, "dtype": "bfloat16"},
    "hybrid *- with MTP": {
        "hybrid_layer_pattern": "*-*-/*-",
        "num_layers": 4,
        "mtp_num_layers": 1,
        "mtp_loss_scaling_factor": 0.3,
    },
}

DISTRIBUTED_OPTIMIZER = {"ddp": {"use_distributed_optimizer": True}}
OVERLAPPED = {
    "ddp": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "bucket_size": 4000,
    }
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def selective(*modules: str) -> dict[str, Any]:
    """Selective recompute of ``modules``."""
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def offload(*modules: str) -> dict[str, Any]:
    """Fine-grained activation offload of the inputs of ``modules``, however small."""
    return {
        "fine_grained_activation_offloading": True,
        "offload_modules": list(modules),
        "min_offloaded_tensor_size": 0,
    }


def flex(backend: str) -> dict[str, Any]:
    """The flex dispatcher, through deep_ep_on_gloo.py."""
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend,
            "moe_router_dtype": "fp32"}


ATTENTION = ("qkv_linear", "core_attn", "attn_proj")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kind: a key of KINDS.
        layout: what a reader calls it.
        settings: the layout, as models.py takes it.
        tolerance: relative, of losses and gradient norms against one rank; 0 for bit for bit.
        slow: runs in ``make test-all`` only; other rows have its parts.
    """

    kind: str
    layout: str
    settings: dict[str, Any]
    tolerance: float = 1e-5
    slow: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} | {self.layout}"


def _row(kind: str, layout: str, world: int, **settings: Any) -> Row:
    options = {key: settings.pop(key) for key in ("tolerance", "slow") if key in settings}
    return Row(kind, layout, {"world": world, **settings}, **options)


ROWS: list[Row] = [
    # Data and model parallelism of a dense model.
    _row("dense", "DP2", 2),
    _row("dense", "DP2, distributed optimizer", 2, **DISTRIBUTED_OPTIMIZER),
    _row("dense", "DP4, distributed optimizer, both overlaps", 4, **OVERLAPPED),
    _row("dense", "TP2", 2, tp=2),
    _row("dense", "TP2, SP", 2, tp=2, sp=True),
    _row("dense", "TP4, SP", 4, tp=4, sp=True, slow=True),
    _row("dense", "CP2", 2, cp=2),
    _row("dense", "PP2", 2, pp=2),
    _row("dense", "PP4", 4, pp=4),
    _row("dense", "PP2, VPP2", 2, pp=2, vp=2),
    _row("dense, 8 layers", "PP4, VPP2", 4, pp=4, vp=2),
    _row("dense", "PP2, shapes exchanged", 2, pp=2, variable_seq_lengths=True,
         moe_token_dispatcher_type="alltoall"),
    # Uneven stages.
    _row("dense", "PP2, one layer on the first stage", 2, pp=2,
         num_layers_in_first_pipeline_stage=1),
    _row("dense", "PP2, layout Et|tttL", 2, pp=2, pipeline_model_parallel_layout="Et|tttL"),
    _row("dense", "PP3, embedding alone: E|tt|ttL", 3, pp=3,
         pipeline_model_parallel_layout="E|tt|ttL", slow=True),
    _row("dense", "PP3, loss alone: Ett|tt|L", 3, pp=3,
         pipeline_model_parallel_layout="Ett|tt|L", slow=True),
    _row("dense", "PP4, embedding and loss alone: E|tt|tt|L", 4, pp=4,
         pipeline_model_parallel_layout="E|tt|tt|L"),
    _row("dense", "PP2, VPP2, E|tt|tt|L", 2, pp=2, vp=2,
         pipeline_model_parallel_layout="E|tt|tt|L"),
    # Products.
    _row("dense", "TP2, SP, PP2", 4, tp=2, sp=True, pp=2),
    _row("dense", "TP2, SP, DP2, distributed optimizer", 4, tp=2, sp=True, **DISTRIBUTED_OPTIMIZER),
    _row("dense", "PP2, VPP2, DP2, overlaps", 4, pp=2, vp=2, **OVERLAPPED),
    _row("dense", "TP2, SP, CP2", 4, tp=2, sp=True, cp=2),
    _row("dense", "CP2, PP2", 4, cp=2, pp=2, slow=True),
    _row("dense", "TP2, SP, PP2, DP2, overlaps", 8, tp=2, sp=True, pp=2, slow=True, **OVERLAPPED),
    _row("dense", "TP2, SP, CP2, PP2", 8, tp=2, sp=True, cp=2, pp=2, slow=True),
    # Recompute.
    _row("dense", "full recompute, uniform", 1, tolerance=0, **FULL),
    _row("dense", "full recompute, block of 2", 1, tolerance=0, recompute_granularity="full",
         recompute_method="block", recompute_num_layers=2, slow=True),
    _row("dense", "selective recompute: core_attn", 1, tolerance=0, **selective("core_attn")),
    _row("dense", "selective recompute: mlp", 1, tolerance=0, **selective("mlp")),
    _row("dense", "selective recompute: layernorm", 1, tolerance=0, **selective("layernorm")),
    _row("dense", "selective recompute: all three, TP2, SP, PP2", 4, tp=2, sp=True, pp=2,
         slow=True, **selective("core_attn", "mlp", "layernorm")),
    _row("dense", "full recompute, TP2, SP, PP2", 4, tp=2, sp=True, pp=2, **FULL),
    _row("MoE alltoall", "selective recompute: moe", 1, tolerance=0, **selective("moe")),
    _row("MoE alltoall", "selective recompute: layernorm", 1, tolerance=0,
         **selective("layernorm")),
    # Offload. (Attention's sums change their order: what comes back is contiguous.)
    _row("dense", "offload of attention", 1, **offload(*ATTENTION)),
    _row("dense, 8 layers", "offload of attention, PP2, VPP2", 2, pp=2, vp=2,
         slow=True, **offload(*ATTENTION)),
    _row("dense", "offload of attention, TP2, SP, PP2", 4, tp=2, sp=True, pp=2, slow=True,
         **offload(*ATTENTION)),
    _row("MLA, MoE", "offload of attention, moe recomputed, EP2, PP2", 4, ep=2, pp=2, slow=True,
         **offload(*ATTENTION), **selective("moe")),
    _row("hybrid *-", "offload of attention", 1, slow=True, **offload(*ATTENTION)),
    # Kinds.
    _row("tied embeddings", "PP2", 2, pp=2, slow=True),
    _row("tied embeddings", "TP2, SP, PP2, VPP2", 4, tp=2, sp=True, pp=2, vp=2),
    _row("biases, LayerNorm, GELU, learned positions", "TP2, SP", 2, tp=2, sp=True),
    _row("biases, LayerNorm, GELU, learned positions", "PP2", 2, pp=2),
    _row("grouped queries, QK norm", "TP2, SP", 2, tp=2, sp=True),
    _row("hidden dropout 0.1", "full recompute", 1, tolerance=0, slow=True, **FULL),
    _row("hidden dropout 0.1", "TP2", 2, tp=2),
    _row("bf16", "TP2, SP, DP2, distributed optimizer", 4, tp=2, sp=True, tolerance=2e-2,
         **DISTRIBUTED_OPTIMIZER),
    _row("bf16", "PP2, VPP2", 2, pp=2, vp=2, tolerance=2e-2, slow=True),
    # A rank's second chunk gathers its bfloat16 and float32 weights together.
    _row("bf16", "PP2, VPP2, distributed optimizer", 2, pp=2, vp=2, tolerance=1e-3,
         slow=True, **DISTRIBUTED_OPTIMIZER),
    _row("bf16", "PP2, VPP2, DP2, overlaps", 4, pp=2, vp=2, tolerance=1e-3, **OVERLAPPED),
    _row("fp32 residual, bf16", "one rank, full recompute", 1, tolerance=0, slow=True, **FULL),
    _row("fp32 residual, bf16", "PP2, VPP2", 2, pp=2, vp=2, tolerance=1e-3, slow=True),
    _row("MoE alltoall", "EP2", 2, ep=2),
    _row("MoE alltoall", "TP2, SP, expert TP1, EP2", 2, tp=2, sp=True, ep=2, etp=1),
    _row("MoE alltoall", "TP2, SP, expert TP2", 2, tp=2, sp=True, etp=2),
    _row("MoE alltoall", "EP2, PP2, VPP2", 4, ep=2, pp=2, vp=2),
    _row("MoE alltoall, bf16", "EP2, PP2, VPP2, overlap of expert communication", 4,
         ep=2, pp=2, vp=2, tolerance=2e-2, overlap_moe_expert_parallel_comm=True),
    _row("MoE alltoall, bf16", "EP2, PP2, VPP2, distributed optimizer", 4,
         ep=2, pp=2, vp=2, tolerance=5e-3, slow=True, **DISTRIBUTED_OPTIMIZER),
    _row("MoE alltoall", "EP4, distributed optimizer, overlaps", 4, ep=4, **OVERLAPPED),
    _row("MoE allgather", "EP2", 2, ep=2),
    _row("MoE allgather", "TP2, SP, EP2, expert TP2", 4, tp=2, sp=True, ep=2, etp=2, slow=True),
    _row("MoE, shared expert, loss-free balancing", "flex (DeepEP's interface), EP2", 2, ep=2,
         **flex("deepep")),
    _row("MoE, shared expert, loss-free balancing", "flex (HybridEP's interface), EP2, PP2", 4,
         ep=2, pp=2, slow=True, **flex("hybridep")),
    _row("MoE alltoall", "flex (DeepEP's interface), TP2, SP, EP2, expert TP2", 4, tp=2, sp=True,
         ep=2, etp=2, slow=True, **flex("deepep")),
    _row("MoE alltoall", "flex (HybridEP's interface), TP2, SP, EP2", 2, tp=2, sp=True, ep=2, etp=1,
         slow=True, **flex("hybridep")),
    _row("MoE, shared expert, loss-free balancing", "EP2, PP2", 4, ep=2, pp=2),
    _row("MoE, shared expert, loss-free balancing", "TP2, SP, EP2", 2, tp=2, sp=True, ep=2,
         etp=1, slow=True),
    _row("MoE, auxiliary loss", "EP2, PP2", 4, ep=2, pp=2),
    _row("MLA", "TP2", 2, tp=2, slow=True),
    _row("MLA", "TP2, SP", 2, tp=2, sp=True),
    _row("MLA", "PP2", 2, pp=2),
    _row("MLA, MoE", "EP2, PP2, VPP2", 4, ep=2, pp=2, vp=2, slow=True),
    _row("MLA, MoE", "TP2, SP, EP2, PP2", 8, tp=2, sp=True, ep=2, etp=1, pp=2, slow=True),
    _row("MTP", "DP2, distributed optimizer", 2, slow=True, **DISTRIBUTED_OPTIMIZER),
    _row("MTP", "TP2, SP", 2, tp=2, sp=True),
    _row("MTP", "PP2", 2, pp=2, slow=True),
    _row("MTP", "PP2, VPP2", 2, pp=2, vp=2),
    _row("MTP", "full recompute", 1, tolerance=0, slow=True, **FULL),
    _row("MTP", "PP2, Etttt|mL", 2, pp=2, pipeline_model_parallel_layout="Etttt|mL"),
    _row("MTP", "PP3, Ett|ttm|L", 3, pp=3, pipeline_model_parallel_layout="Ett|ttm|L", slow=True),
    _row("MTP", "PP4, MTP alone: Ett|tt|m|L", 4, pp=4,
         pipeline_model_parallel_layout="Ett|tt|m|L"),
    _row("MTP, two documents", "CP2", 2, cp=2),
    _row("MTP, two documents", "TP2, SP, CP2, PP2", 8, tp=2, sp=True, cp=2, pp=2, slow=True),
    _row("MTP of depth 2", "PP2", 2, pp=2, slow=True),
    _row("MLA, MoE, MTP", "EP2, PP2", 4, ep=2, pp=2),
    _row("hybrid *-", "TP2, SP", 2, tp=2, sp=True),
    _row("hybrid *-", "PP2", 2, pp=2, slow=True),
    _row("hybrid *-", "full recompute", 1, tolerance=0, slow=True, **FULL),
    _row("hybrid *E", "EP2, PP2", 4, ep=2, pp=2),
    _row("hybrid *- with MTP", "PP2", 2, pp=2),
    _row("hybrid *-", "PP2, VPP2", 2, pp=2, vp=2, hybrid_layer_pattern="*-|*-|*-|*-"),
    _row("hybrid *-", "PP2, VPP2, uneven: *-*|-*|-*|-", 2, pp=2, vp=2, slow=True,
         hybrid_layer_pattern="*-*|-*|-*|-"),
    _row("hybrid *-", "CP2", 2, cp=2, slow=True),
    _row("hybrid *-", "TP2, SP, PP2, DP2, overlaps", 8, tp=2, sp=True, pp=2, slow=True,
         **OVERLAPPED),
    _row("hybrid *-", "selective recompute: core_attn, mlp, layernorm", 1, tolerance=0, slow=True,
         **selective("core_attn", "mlp", "layernorm")),
    _row("hybrid *-, bf16", "PP2, distributed optimizer", 2, pp=2, tolerance=1e-3, slow=True,
         **DISTRIBUTED_OPTIMIZER),
    _row("hybrid *E", "TP2, SP, EP2, distributed optimizer", 2, tp=2, sp=True, ep=2, etp=1,
         slow=True, **DISTRIBUTED_OPTIMIZER),
    _row("hybrid *E, shared expert, loss-free balancing", "EP2, PP2", 4, ep=2, pp=2, slow=True),
    _row("hybrid +E, latent attention", "EP2, PP2", 4, ep=2, pp=2, slow=True),
]
