"""CUDA graphs of hyper-connected layers: what a graph is captured on, holds, and may not cut.

No graph is made here: a replay is played by the function that a graph would have captured.
"""

from __future__ import annotations

import pytest
import torch

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("megatron_cpu")
C, N = 32, 4


def block(impl: str = "none", modules=(), layers: int = 2, fuse_norm: bool = True):
    """A TransformerBlock with connections; ``impl`` set after Megatron's checks, which want TE."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import CudaGraphModule
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mhc_megatron.layer_spec import mhc_layer_spec

    config = TransformerConfig(
        num_layers=layers, hidden_size=C, num_attention_heads=4, normalization="RMSNorm",
        use_cpu_initialization=True, attention_dropout=0.0, hidden_dropout=0.0,
        cuda_graph_modules=[],
    )  # fmt: skip
    config.cuda_graph_impl = impl
    config.cuda_graph_modules = [CudaGraphModule[name] for name in modules]
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec = mhc_layer_spec(spec, config, MHCConfig(alpha=0.5, init="static", fuse_norm=fuse_norm))
    torch.manual_seed(3)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return TransformerBlock(config, spec, pg_collection=groups)


@pytest.mark.parametrize("modules", [["moe_router"], ["attn", "moe_router", "moe_preprocess"]])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_a_graph_may_not_part_read_and_write(impl, modules):
    with pytest.raises(UserError, match="moe_router captures a connection's read|moe_preprocess"):
        block(impl, modules)
    assert block("none", modules)


def test_local_graphs_take_whole_layers():
    with pytest.raises(UserError, match="attn needs cuda-graph-impl: transformer_engine"):
        block("local", ["attn"])


def chained(stack) -> list[str]:
    """Names of the connections whose write makes the next read."""
    pairs = [(layer.attn_hc, layer.mlp_hc) for layer in stack.layers]
    return [c.name for pair in pairs for c in pair if c._following]


@pytest.mark.parametrize(
    ("impl", "modules", "names"),
    [
        ("none", [], ["0.attn", "0.mlp", "1.attn"]),
        ("full_iteration", [], ["0.attn", "0.mlp", "1.attn"]),
        ("transformer_engine", [], ["0.attn", "1.attn"]),
        ("transformer_engine", ["attn"], []),
        ("transformer_engine", ["attn", "mlp"], []),
    ],
)
def test_nothing_is_read_ahead_across_the_edge_of_a_graph(impl, modules, names):
    assert chained(block(impl, modules)) == names


@pytest.mark.parametrize("modules", [[], ["attn"], ["mlp"], ["attn", "mlp"]])
def test_capture_and_replay_give_what_forward_gives(modules):
    """Streams enter before the first layer's graph; every graph takes and gives n*C channels."""
    stack = block("transformer_engine", modules)
    plain = block("none")
    plain.load_state_dict(stack.state_dict())
    x = torch.randn(6, 2, C)
    expected_in, given = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = plain(expected_in, attention_mask=None)
    widths = []

    def graph_of(layer):
        def graph(hidden_states, **kwargs):
            widths.append(hidden_states.shape[-1])
            return layer._te_cuda_graph_capture(hidden_states, attention_mask=None)

        return graph

    for layer in stack.layers:
        static = layer.get_layer_static_inputs(6, 2)["hidden_states"]
        assert static.shape == (6, 2, N * C) and static.requires_grad
        layer.cuda_graphs, layer.cuda_graph_manual_hooks = [graph_of(layer)], []
        layer.current_microbatch = 0
        # Megatron's own asks for Transformer Engine to prepare the arguments.
        layer._get_te_cuda_graph_replay_args = lambda x, **kwargs: ((x,), {})
    result = stack(given, attention_mask=None)
    assert widths == [N * C] * 2
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    expected.square().sum().backward()
    result.square().sum().backward()
    torch.testing.assert_close(given.grad, expected_in.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("modules", "names"),
    [([], None), (["attn"], ["attn_hc"]), (["mlp"], ["mlp_hc"]), (["attn", "mlp"], None)],
)
def test_parameters_of_connections_are_gathered_before_a_replay(modules, names):
    layer = block("transformer_engine", modules).layers[0]
    held = {m for module in layer._get_submodules_under_cudagraphs() for m in module.modules()}
    names = ["attn_hc", "mlp_hc"] if names is None else names
    for name in ("attn_hc", "mlp_hc"):
        assert (getattr(layer, name) in held) == (name in names)


@pytest.mark.parametrize("fuse_norm", [True, False])
def test_a_layer_has_no_hooks_that_a_graph_refuses(fuse_norm):
    """core/transformer/cuda_graphs.py:1855: only those of Megatron's data parallelism."""
    for module in block(fuse_norm=fuse_norm).layers.modules():
        assert not module._forward_pre_hooks, module
