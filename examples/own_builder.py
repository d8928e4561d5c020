"""Hyper-connections in a model builder of one's own: mhc_layer_spec and widen_pipeline."""

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from mhc_megatron.config import MHCConfig
from mhc_megatron.layer_spec import mhc_layer_spec
from mhc_megatron.pipeline import widen_pipeline

MHC = MHCConfig(variant="mhc", n=4)


def build(config, vocab_size, sequence_length, pre_process=True, post_process=True, vp_stage=None):
    """One pipeline stage, as Megatron's ``model_provider`` functions make it."""
    spec = get_gpt_layer_local_spec(normalization=config.normalization)  # any layer or block spec
    spec = mhc_layer_spec(spec, config, MHC, vp_stage)  # connections in every layer
    model = GPTModel(
        config,
        spec,
        vocab_size,
        sequence_length,
        pre_process,
        post_process,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    return widen_pipeline(model, MHC)  # n*C channels between pipeline stages
