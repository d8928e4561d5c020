"""A key-value cache changes nothing: prefill and token-by-token decode give the full logits."""

import pytest
import torch

from mhc_megatron.config import MHCConfig

pytestmark = pytest.mark.usefixtures("megatron_cpu")

VOCABULARY, SEQUENCE, PROMPT, BATCH = 64, 12, 5, 2

KINDS = {
    "dense": {},
    "grouped queries, biases": {"num_query_groups": 2, "add_bias_linear": True},
    "fp32 residual": {"fp32_residual_connection": True},
    "dropout, off in evaluation": {"hidden_dropout": 0.3},
    "hybrid *-": {"hybrid_layer_pattern": "*-*-*-", "num_layers": 6},
}


def model(kind: str, **mhc):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mhc_megatron.hybrid import local_hybrid_stack
    from mhc_megatron.layer_spec import mhc_layer_spec

    options = {
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
    }
    options |= KINDS[kind]
    pattern = options.pop("hybrid_layer_pattern", None)
    config = TransformerConfig(**options)
    torch.manual_seed(5)
    of_model = {
        "vocab_size": VOCABULARY,
        "max_sequence_length": SEQUENCE,
        "position_embedding_type": "rope",
        "parallel_output": False,
    }
    connections = MHCConfig(alpha=0.5, init_std=0.1, **mhc)
    if pattern is None:
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
        return GPTModel(config, mhc_layer_spec(spec, config, connections), **of_model).eval()
    spec = mhc_layer_spec(local_hybrid_stack(config), config, connections)
    return HybridModel(config, spec, hybrid_layer_pattern=pattern, **of_model).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["mhc", "birkhoff", "hc"])
def test_decoding_with_a_cache_gives_the_full_logits(kind: str, variant: str) -> None:
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode

    gpt = model(kind, variant=variant, exit="learned" if variant == "mhc" else "mean")
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    full = gpt(tokens, positions, None)

    context = StaticInferenceContext(BATCH, SEQUENCE)
    with InferenceMode.active():
        start = 0
        for end in (PROMPT, *range(PROMPT + 1, SEQUENCE + 1)):
            if start:
                context.enable_decode_mode()
            logits = gpt(
                tokens[:, start:end],
                positions[:, start:end],
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
            context.sequence_len_offset += end - start
            torch.testing.assert_close(logits[:, -1], full[:, end - 1], rtol=1e-5, atol=1e-5)
            start = end
