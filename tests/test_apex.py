"""What of NVIDIA's Apex is found, and what a run does without it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mhc_megatron import apex
from mhc_megatron.errors import UserError

PIECES = {
    "apex": {},
    "apex.multi_tensor_apply": {"multi_tensor_applier": object()},
    "apex.optimizers": {"FusedAdam": object()},
    "amp_C": {"multi_tensor_l2norm": object()},
    "fused_weight_gradient_mlp_cuda": {"wgrad_gemm_accum_fp32": object()},
}


def install(monkeypatch, names) -> None:
    """Modules of these names, and none of Apex's others."""
    for name in PIECES:
        module = None
        if name in names:
            module = ModuleType(name)
            vars(module).update(PIECES[name])
        monkeypatch.setitem(sys.modules, name, module)  # None: ImportError


def test_nothing_there(monkeypatch):
    install(monkeypatch, [])
    assert apex.apex() == apex.Apex(False, False, False)
    assert str(apex.apex()) == "none"


def test_all_there(monkeypatch):
    install(monkeypatch, PIECES)
    assert apex.apex() == apex.Apex(True, True, True)
    assert str(apex.apex()) == "amp_C, FusedAdam, fused_weight_gradient_mlp_cuda"
    assert apex.can_fuse_weight_gradients()


def test_the_package_of_that_name_on_pypi_is_not_it(monkeypatch):
    install(monkeypatch, ["apex"])
    assert apex.apex() == apex.Apex(False, False, False)


def test_a_build_without_the_extension(monkeypatch):
    install(monkeypatch, [name for name in PIECES if "weight" not in name])
    assert apex.apex() == apex.Apex(True, True, False)


def test_the_launcher_fuses_only_what_is_there(monkeypatch):
    from launch.environment import fusions

    install(monkeypatch, [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert fusions({})["no-gradient-accumulation-fusion"]
    assert fusions({})["transformer-impl"] == "local"
    install(monkeypatch, PIECES)
    assert "no-gradient-accumulation-fusion" not in fusions({})
    install(monkeypatch, [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: SimpleNamespace())
    assert fusions({}) == {}  # Transformer Engine's product takes the extension's place


@pytest.fixture
def layers(monkeypatch):
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    return layers


def test_without_apex_transformer_engine_adds_the_gradient(monkeypatch, layers):
    def general_gemm(A, B, out_dtype, layout, out, accumulate, grad):
        assert layout == "NT" and accumulate and grad and out.dtype == out_dtype
        return out.add_((B.double().t() @ A.double()).to(out_dtype))

    extensions = ModuleType("transformer_engine.pytorch.cpp_extensions")
    extensions.general_gemm = general_gemm
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, extensions.__name__, extensions)
    apex.supply_weight_gradient()
    assert layers._grad_accum_fusion_available
    x, grad = torch.randn(6, 3), torch.randn(6, 4)
    main_grad = torch.ones(4, 3)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, grad, main_grad)
    torch.testing.assert_close(main_grad, 1 + grad.t() @ x)


def test_with_apex_nothing_is_replaced(monkeypatch, layers):
    theirs = object()
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", theirs)
    apex.supply_weight_gradient()
    assert layers.fused_weight_gradient_mlp_cuda is theirs


def test_with_neither_a_sentence(monkeypatch, layers):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.cpp_extensions", None)
    with pytest.raises(UserError, match="no-gradient-accumulation-fusion"):
        apex.supply_weight_gradient()


def test_rope_is_fused_for_latent_attention_only_where_megatron_can():
    from launch.environment import fusions

    latent = {"multi-latent-attention": True}
    assert fusions(latent | {"rope-type": "rope"})["no-rope-fusion"]
