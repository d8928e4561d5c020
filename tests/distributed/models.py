"""Small models of every kind, and the layouts that they are run in, from plain data.

A *kind* is a dictionary: fields of Megatron's TransformerConfig and GPTModelConfig (or
HybridModelConfig where it has a ``hybrid_layer_pattern``) over ``BASE``, and ``unscored``, the
tokens of a sequence that have no loss. A *layout* is another one: tp, pp, vp, cp, ep, etp, sp,
world, overlap, ``whole_position_gradient`` (see ``sum_position_gradients``), and fields of the same
configurations over it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.utils import get_model_config

from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline import embedding_ranks
from mhc_megatron.training import MHCHybridModelConfig, MHCModelConfig
from tests.distributed import deep_ep_on_gloo
from tests.distributed.data import SEQUENCE, VOCABULARY

BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "position_embedding_type": "rope",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "init_method_std": 0.1,
    # Fused kernels need a GPU; so does the p2p batching of NCCL.
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "batch_p2p_comm": False,
    "deallocate_pipeline_outputs": True,
}

#: A layout's short keys and what they are called in Megatron's configuration.
PARALLEL = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "sp": "sequence_parallel",
}

#: Keys of a layout that are no fields of a model's configuration.
OF_THE_RUN = ("world", "ddp", "whole_position_gradient")


def initialize(kind: dict[str, Any], layout: dict[str, Any]) -> None:
    """Model-parallel groups."""
    sizes = {PARALLEL[k]: v for k, v in layout.items() if k in PARALLEL and k != "sp"}
    model = model_config(kind, layout, MHCConfig())
    if model.transformer.moe_token_dispatcher_type == "flex":
        deep_ep_on_gloo.install()
    parallel_state.initialize_model_parallel(
        **sizes,
        get_embedding_ranks=functools.partial(
            embedding_ranks,
            config=model.transformer,
            tied=model.share_embeddings_and_output_weights,
        ),
    )
    # Of Megatron's own layers; Transformer Engine's need neither.
    own_layers = model.transformer.transformer_impl == "local"
    if own_layers and layout.get("cp", 1) > 1:
        gather_context()
    latent = own_layers and getattr(model.transformer, "multi_latent_attention", False)
    if latent and layout.get("tp", 1) > 1 and layout.get("whole_position_gradient", True):
        sum_position_gradients(model.transformer)


def model_config(
    kind: dict[str, Any], layout: dict[str, Any], mhc: MHCConfig
) -> MHCModelConfig | MHCHybridModelConfig:
    """The configuration that a builder takes."""
    settings = {**BASE, **kind}
    settings |= {PARALLEL.get(k, k): v for k, v in layout.items() if k not in OF_THE_RUN}
    settings.pop("unscored", None)
    dtype = settings.pop("dtype", "float32")
    settings["params_dtype"] = settings["pipeline_dtype"] = getattr(torch, dtype)
    settings |= {
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "overlap_p2p_comm": bool(layout.get("vp")),
    }
    overlap = settings.pop("overlap", False)
    hybrid = "hybrid_layer_pattern" in settings
    model_class = MHCHybridModelConfig if hybrid else MHCModelConfig
    of_model = {f.name for f in dataclasses.fields(model_class)} - {"transformer"}
    own = {key: settings.pop(key) for key in list(settings) if key in of_model}
    mla = settings.get("multi_latent_attention", False)
    config = (MLATransformerConfig if mla else TransformerConfig)(
        activation_func=F.silu, **settings
    )
    # Megatron's own flag wants half precision and several expert-parallel ranks
    # (transformer_config.py:2680); nothing that it turns on needs either.
    config.overlap_moe_expert_parallel_comm |= overlap
    return model_class(
        transformer=config, vocab_size=VOCABULARY, seq_length=SEQUENCE, mhc=mhc, **own
    )


def build(
    kind: dict[str, Any], layout: dict[str, Any], mhc: MHCConfig, ddp: dict[str, Any]
) -> list[torch.nn.Module]:
    """The model chunks of this rank, wrapped for training."""
    model = model_config(kind, layout, mhc)
    return model.get_builder_cls()(model).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(**ddp),
        data_parallel_random_init=False,
    )


def build_with(module: str):
    """``build`` through the function of that name in ``module``, with Megatron's ``get_model``."""
    make = importlib.import_module(module).build

    def build(kind, layout, mhc, ddp):
        config = model_config(kind, layout, mhc).transformer
        stages = layout.get("vp") or 1
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        model = []
        for stage in range(stages):
            ends = first and stage == 0, last and stage == stages - 1
            number = stage if layout.get("vp") else None
            model.append(make(config, VOCABULARY, SEQUENCE, *ends, vp_stage=number))
        # What training/training.py's get_model does with the chunks of a model_provider.
        for chunk in model:
            chunk.model_type = ModelType.encoder_or_decoder
            for parameter in chunk.parameters():
                set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        config = get_model_config(model[0])
        if config.bf16:
            model = [Float16Module(config, chunk) for chunk in model]
        return [
            DistributedDataParallel(config, DistributedDataParallelConfig(**ddp), chunk)
            for chunk in model
        ]

    return build


def gather_context() -> None:
    """Context parallelism for Megatron's local attention, which has none: gather keys and values.

    Rank r of cp holds the pieces r and 2 cp - 1 - r of 2 cp (core/utils.py:2612).
    """
    build, attend = DotProductAttention.__init__, DotProductAttention.forward

    def __init__(self, config, *args, **kwargs):
        local = copy.copy(config)
        local.context_parallel_size = 1
        build(self, local, *args, **kwargs)

    def forward(self, query, key, value, attention_mask, *args, **kwargs):
        group = parallel_state.get_context_parallel_group()
        key, value = _Gather.apply(key, group), _Gather.apply(value, group)
        cp, rank, piece = group.size(), group.rank(), query.shape[0] // 2
        tokens = torch.arange(2 * cp * piece, device=query.device)
        pieces = tokens.chunk(2 * cp)
        columns = torch.cat([p for r in range(cp) for p in (pieces[r], pieces[2 * cp - 1 - r])])
        rows = torch.cat([pieces[rank], pieces[2 * cp - 1 - rank]])
        mask = (rows[:, None] < columns[None, :])[None, None]
        return attend(self, query, key, value, mask, *args, **kwargs)

    DotProductAttention.__init__, DotProductAttention.forward = __init__, forward


class _Gather(torch.autograd.Function):
    """[s, ...] of every rank, in their order; backward adds what all ranks say of this one's."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


def sum_position_gradients(config: TransformerConfig) -> None:
    """Give Megatron's local latent attention the gradient that it loses under tensor parallelism.

    All heads share the keys' rotary part (``k_pos_emb``); a rank's gradient of it is of its own
    heads. multi_latent_attention.py:739 gathers it by an operation whose backward
    (tensor_parallel/mappings.py:275) takes a piece of this partial gradient and adds nothing. The
    Transformer Engine spec, whose down projection is not split, does not come this way.
    """
    gather = multi_latent_attention.gather_from_tensor_model_parallel_region
    positions = config.qk_pos_emb_head_dim

    def add(gradient: torch.Tensor) -> torch.Tensor:
        latent, shared = gradient.tensor_split([-positions], dim=-1)
        shared = shared.contiguous()
        dist.all_reduce(shared, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat([latent, shared], dim=-1)

    def gathered(x: torch.Tensor) -> torch.Tensor:
        x = gather(x)
        if x.shape[-1] == config.kv_lora_rank + positions and x.requires_grad:
            x.register_hook(add)
        return x

    multi_latent_attention.gather_from_tensor_model_parallel_region = gathered
