"""What hyper-connections cannot follow stops with a sentence before anything runs."""

import pytest
import torch

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("megatron_cpu")


def config(**changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    made = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        normalization="RMSNorm",
        use_cpu_initialization=True,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inference_fuse_tp_communication": True}, "inference_fuse_tp_communication"),
        (
            {"fine_grained_activation_offloading": True, "offload_modules": ["mlp_norm"]},
            "offload-modules mlp_norm",
        ),
    ],
)
def test_settings(changes, said) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from mhc_megatron.layer_spec import mhc_layer_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    with pytest.raises(UserError, match=said):
        mhc_layer_spec(spec, config(**changes), MHCConfig())
    assert mhc_layer_spec(spec, config(**changes), MHCConfig(variant="none")) is spec


def test_a_hybrid_pattern_with_mamba() -> None:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from mhc_megatron.layer_spec import mhc_layer_spec

    spec = mhc_layer_spec(hybrid_stack_spec, config(), MHCConfig())
    with pytest.raises(UserError, match="MambaLayer"):
        HybridModel(
            config(num_layers=1),
            spec,
            vocab_size=64,
            max_sequence_length=16,
            hybrid_layer_pattern="M",
        )


def test_a_layer_that_is_none_of_megatrons() -> None:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from mhc_megatron.layer_spec import mhc_layer_spec

    block = TransformerBlockSubmodules(layer_specs=[ModuleSpec(module=torch.nn.Linear)])
    with pytest.raises(UserError, match="Linear"):
        mhc_layer_spec(block, config(), MHCConfig())


@pytest.mark.parametrize(
    "changes", [{"num_distributed_optimizer_instances": 2}, {"save_wgrads_interval": 10}], ids=str
)
def test_an_all_reduce_of_two_dtypes(changes) -> None:
    from argparse import Namespace

    from mhc_megatron.training import _check_reduction

    plain = {
        "accumulate_allreduce_grads_in_fp32": False,
        "virtual_pipeline_model_parallel_size": 2,
        "num_distributed_optimizer_instances": 1,
        "save_wgrads_interval": None,
    }
    _check_reduction(Namespace(**plain))
    for allowed in (
        {"accumulate_allreduce_grads_in_fp32": True},
        {"virtual_pipeline_model_parallel_size": None},
    ):
        _check_reduction(Namespace(**plain | changes | allowed))
    with pytest.raises(UserError, match="set accumulate-allreduce-grads-in-fp32"):
        _check_reduction(Namespace(**plain | changes))


@pytest.mark.parametrize(
    ("backend", "said"),
    [("deepep", "needs DeepEP,"), ("hybridep", "hybrid-ep"), ("ncclep", "NCCL")],
)
def test_a_dispatcher_that_is_not_installed(backend, said, monkeypatch) -> None:
    from argparse import Namespace

    from megatron.core.transformer.moe import fused_a2a

    from mhc_megatron.training import _check_dispatcher

    flex = Namespace(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=backend)
    with pytest.raises(UserError, match=said):
        _check_dispatcher(flex)
    _check_dispatcher(Namespace(**vars(flex) | {"moe_token_dispatcher_type": "alltoall"}))
    for name in ("HAVE_DEEP_EP", "HAVE_HYBRIDEP", "HAVE_TE_EP"):
        monkeypatch.setattr(fused_a2a, name, True)
    _check_dispatcher(flex)


def test_optimizers_that_megatron_stops_at() -> None:
    from argparse import Namespace

    from mhc_megatron.training import _check_optimizer

    plain = {
        "optimizer": "muon",
        "use_layer_wise_distributed_optimizer": False,
        "save": "run",
        "no_save_optim": None,
        "bf16": False,
    }
    layers = plain | {"use_layer_wise_distributed_optimizer": True}
    soap = plain | {"optimizer": "soap"}
    for allowed in (plain, layers | {"bf16": True}, soap | {"no_save_optim": True}):
        _check_optimizer(Namespace(**allowed))
    with pytest.raises(UserError, match="bf16 only"):
        _check_optimizer(Namespace(**layers))
    with pytest.raises(UserError, match="no-save-optim"):
        _check_optimizer(Namespace(**soap | {"bf16": True}))
