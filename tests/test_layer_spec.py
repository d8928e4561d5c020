"""Hyper-connections in Megatron's own GPTModel, on one rank."""

import pytest
import torch

from mhc_kernels import reference
from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.streams import is_connection

pytestmark = pytest.mark.usefixtures("megatron_cpu")

S, B, C, VOCAB = 16, 2, 32, 64


def transformer_config(**changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": 2,
        "hidden_size": C,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
    }
    return TransformerConfig(**{**options, **changes})


def model(mhc, config=None, spec=None):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from mhc_megatron.layer_spec import mhc_layer_spec

    config = config or transformer_config()
    torch.manual_seed(3)
    return GPTModel(
        config,
        mhc_layer_spec(
            spec or get_gpt_layer_local_spec(normalization=config.normalization), config, mhc
        ),
        vocab_size=VOCAB,
        max_sequence_length=S,
        position_embedding_type="rope",
    )


def batch():
    tokens = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(S).expand(B, S),
        "attention_mask": torch.triu(torch.ones(1, 1, S, S), diagonal=1).bool(),
        "labels": tokens.roll(-1, 1),
    }


def losses_and_gradients(gpt):
    losses = gpt(**batch())
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in gpt.named_parameters()}


@pytest.mark.parametrize("mhc", [MHCConfig(variant="none"), MHCConfig(variant="mhc", n=1)])
def test_none_is_megatrons_own_model_to_the_bit(mhc):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    torch.manual_seed(3)
    plain = GPTModel(
        transformer_config(),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=S,
        position_embedding_type="rope",
    )
    expected, gradients = losses_and_gradients(plain)
    got, ours = losses_and_gradients(model(mhc))
    assert torch.equal(got, expected)
    assert list(ours) == list(gradients)
    assert all(torch.equal(ours[name], gradients[name]) for name in gradients)


def test_the_rest_of_the_model_starts_the_same():
    """Same seed: every parameter that both models have is the same, so runs can be compared."""
    plain = dict(model(MHCConfig(variant="none")).named_parameters())
    ours = dict(model(MHCConfig()).named_parameters())
    assert set(plain) < set(ours)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert {name.split(".")[3] for name in set(ours) - set(plain)} == {"attn_hc", "mlp_hc"}


@pytest.mark.parametrize("variant", ["mhc", "identity", "birkhoff", "hc"])
@pytest.mark.parametrize("exit", ["mean", "learned"])
def test_layers_compute_the_equations(variant, exit):
    """The stack against reference.py, sublayer by sublayer, with Megatron's modules as F."""
    gpt = model(MHCConfig(variant=variant, exit=exit, alpha=0.5, init="static"))
    if exit == "learned":
        torch.nn.init.normal_(gpt.decoder.final_layernorm.exit.phi, std=0.1)
    seen = {}
    gpt.decoder.register_forward_hook(lambda module, args, out: seen.update(out=out))
    gpt(**batch())
    embedded = gpt.embedding(batch()["input_ids"], batch()["position_ids"])
    rotary = gpt.rotary_pos_emb(S)
    x = embedded.unsqueeze(-2).expand(S, B, 4, C)
    for layer in gpt.decoder.layers:
        for kind in ("attn", "mlp"):
            hc = getattr(layer, f"{kind}_hc")
            parameters = (hc.phi, hc.alpha, hc.bias)
            u, H_post, H_res = reference.mhc_pre(x, *parameters, variant=variant)
            if kind == "attn":
                norm = torch.nn.functional.rms_norm(u, (C,), layer.input_layernorm.weight, 1e-5)
                y, _ = layer.self_attention(norm, batch()["attention_mask"], rotary_pos_emb=rotary)
            else:
                norm = torch.nn.functional.rms_norm(u, (C,), layer.pre_mlp_layernorm.weight, 1e-5)
                y, _ = layer.mlp(norm)
            x = reference.mhc_post(x, y, H_post, H_res)
    norm = gpt.decoder.final_layernorm
    if exit == "mean":
        out = x.mean(-2)
    else:
        head = norm.exit
        v = x.flatten(-2) * torch.rsqrt(x.flatten(-2).square().mean(-1, keepdim=True))
        weights = torch.sigmoid(head.alpha * (v @ head.phi.t()) + head.bias)
        out = (weights.unsqueeze(-1) * x).sum(-2)
    expected = torch.nn.functional.rms_norm(out, (C,), norm.weight, 1e-5)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    for variant in ("mhc", "identity", "birkhoff", "hc"):
        gpt = model(MHCConfig(variant=variant, exit="learned"))
        _, gradients = losses_and_gradients(gpt)
        missing = [name for name, g in gradients.items() if g is None or not g.isfinite().all()]
        assert not missing


def test_parameters_stay_float32():
    from megatron.core.transformer.module import Float16Module

    gpt = model(MHCConfig(exit="learned"))
    before = {n: p.detach().clone() for n, p in gpt.named_parameters() if "hc." in n or "exit" in n}
    wrapped = Float16Module(transformer_config(bf16=True), gpt)
    after = dict(wrapped.module.named_parameters())
    assert after["embedding.word_embeddings.weight"].dtype == torch.bfloat16
    assert before and all(torch.equal(after[name], value) for name, value in before.items())


def test_connections_stay_marked_where_their_parameters_are_made_anew():
    """From ``meta``, as init_model_with_meta_device makes a model."""
    mhc = MHCConfig(exit="learned")
    marked = {n: p.hyper_connection for n, p in model(mhc).named_parameters() if is_connection(p)}
    with torch.device("meta"):
        gpt = model(mhc, transformer_config(init_model_with_meta_device=True))
    gpt = gpt.to_empty(device="cpu")
    now = {n: p.hyper_connection for n, p in gpt.named_parameters() if is_connection(p)}
    assert now == marked and len(now) == 3 * 4 + 3
    assert all(hasattr(p, "sequence_parallel") for p in gpt.parameters() if is_connection(p))


def test_initial_values_do_not_depend_on_the_default_dtype():
    expected = model(MHCConfig()).decoder.layers[0].attn_hc.phi
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        phi = model(MHCConfig()).decoder.layers[0].attn_hc.phi
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(phi, expected)


def test_a_layer_without_sublayers():
    """Heterogeneous models have them: no connection, and the streams go through."""
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    nothing = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules())
    gpt = model(MHCConfig(), spec=nothing)
    assert not any(is_connection(p) for p in gpt.parameters())
    assert gpt(**batch()).isfinite().all()


def test_parameter_count_formula():
    mhc = MHCConfig(exit="learned")
    with_hc = sum(p.numel() for p in model(mhc).parameters())
    without = sum(p.numel() for p in model(MHCConfig(variant="none")).parameters())
    assert with_hc - without == mhc.parameters(sublayers=4, hidden_size=C)


def fused_model(monkeypatch, **changes):
    """The model as on a GPU, where the read makes the sublayer's norm; here in the reference."""
    from mhc_megatron import layer_spec

    monkeypatch.setattr(layer_spec, "fuses_norm", lambda norm, mhc, config: mhc.fuse_norm)
    gpt = model(MHCConfig(alpha=0.5, init="static"), transformer_config(**changes))
    for layer in gpt.decoder.layers:
        assert layer.attn_hc._norm and layer.mlp_hc._norm
        with torch.no_grad():  # a weight of ones would hide that it is used
            layer.input_layernorm.weight.copy_(torch.linspace(0.5, 2, C))
            layer.pre_mlp_layernorm.weight.copy_(torch.linspace(2, 0.5, C))
    return gpt


def test_a_read_that_makes_the_norm_changes_no_value(monkeypatch):
    fused = fused_model(monkeypatch)
    apart = model(MHCConfig(alpha=0.5, init="static", fuse_norm=False))
    apart.load_state_dict(fused.state_dict())  # the same names too
    got, ours = losses_and_gradients(fused)
    expected, gradients = losses_and_gradients(apart)
    assert torch.allclose(got, expected, rtol=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-7), name


def test_the_norms_weight_is_gathered_before_the_read_uses_it(monkeypatch):
    """Hooks on the norm, as overlap_param_gather's, run before the write that reads ahead."""
    gpt = fused_model(monkeypatch)
    expected = gpt(**batch()).detach()
    ran = []
    for layer in gpt.decoder.layers:
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            weight = norm.weight.detach().clone()
            norm.weight.data.zero_()

            def gather(norm, inputs, weight=weight):
                ran.append(norm)
                norm.weight.data.copy_(weight)

            gather.__module__ = "megatron.core.distributed.distributed_data_parallel"
            norm.register_forward_pre_hook(gather)
    assert torch.equal(gpt(**batch()), expected)
    assert len(set(ran)) == 4


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_other_hooks_of_a_norm_see_its_input(monkeypatch, with_kwargs):
    gpt, seen = fused_model(monkeypatch), []
    norm = gpt.decoder.layers[1].input_layernorm
    norm.register_forward_pre_hook(
        lambda norm, inputs, *kwargs: seen.append(inputs[0].shape), with_kwargs=with_kwargs
    )
    gpt(**batch())
    assert len(seen) == 1


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"use_cpu_initialization": True}, "no GPU"),
        ({"normalization": "LayerNorm"}, "no RMSNorm"),
    ],
)
def test_what_no_kernel_norms_keeps_its_norm(changes, why):
    gpt = model(MHCConfig(), transformer_config(**changes))
    assert not any(layer.attn_hc._norm for layer in gpt.decoder.layers), why


def test_dropout_is_megatrons():
    """p = 1 would drop every sublayer's output; in evaluation nothing is dropped."""
    gpt = model(MHCConfig(), transformer_config(hidden_dropout=0.5))
    torch.manual_seed(0)
    first = gpt(**batch())
    assert not torch.equal(first, gpt(**batch()))
    gpt.eval()
    assert torch.equal(gpt(**batch()), gpt(**batch()))


def test_evaluation_records_no_graph():
    gpt = model(MHCConfig()).eval()
    with torch.no_grad():
        assert not gpt(**batch()).requires_grad
    hc = gpt.decoder.layers[0].attn_hc
    assert hc._coefficients is None


def test_write_without_read_is_an_error():
    hc = model(MHCConfig()).decoder.layers[0].attn_hc
    with pytest.raises(RuntimeError, match="write without a read"):
        hc.write(True, False)((torch.zeros(1, 1, C), None), torch.zeros(1, 1, 4 * C), 0.0)


def test_a_spec_of_other_layers_is_refused():
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from mhc_megatron.layer_spec import mhc_layer_spec

    block = TransformerBlockSubmodules(layer_specs=[ModuleSpec(module=torch.nn.Linear)])
    with pytest.raises(UserError, match="Linear are not supported"):
        mhc_layer_spec(block, transformer_config(), MHCConfig())


def test_block_specs_keep_their_order_and_norm():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import _get_block_submodules

    from mhc_megatron.layer_spec import mhc_layer_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    block = _get_block_submodules(transformer_config(), spec)
    ours = mhc_layer_spec(block, transformer_config(), MHCConfig())
    assert len(ours.layer_specs) == 2 and ours.layer_specs[0].submodules is spec.submodules
    assert spec.params is None or "mhc" not in spec.params


def test_a_hybrid_stack_counts_its_layers_as_sublayers():
    """By which ``init: static`` spreads the reads over the streams."""
    from test_inference import model as any_model

    from mhc_megatron.connection import HyperConnection

    stack = any_model("hybrid *-", init="static").decoder
    found = [m for m in stack.modules() if isinstance(m, HyperConnection)]
    assert [connection.index for connection in found] == list(range(6))
