"""Recompute of blocks on a GPU: the same bits with the kernels, on a stream of its own, and memory.

One process, one GPU, Megatron's GPTModel: its local layers, and Transformer Engine's where it is
installed, bf16 and FP8.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_cases import Case, refilled  # noqa: E402

from mhc_megatron.config import MHCConfig  # noqa: E402

TE = importlib.util.find_spec("transformer_engine") is not None
S, B, C, VOCAB, LAYERS = 256, 2, 512, 256, 4

MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 256,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
KINDS = {
    "dense": {},
    "bias and dropout": {"add_bias_linear": True, "hidden_dropout": 0.1},
    "bias": {"add_bias_linear": True},
    "MoE": MOE,
    "MoE, shared expert on its own stream": MOE
    | {"moe_shared_expert_intermediate_size": 256, "moe_shared_expert_overlap": True},
    "selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm", "mlp"],
    },
    "fp32 residual": {"fp32_residual_connection": True},
}


@pytest.fixture(scope="module", autouse=True)
def megatron():
    """One rank. Attention's backward in a fixed order of sums."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    os.environ |= {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def model(recompute, kind: str, transformer_engine: bool, fp8: bool = False, **mhc):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mhc_megatron.layer_spec import mhc_layer_spec

    changes = {"fp8": "hybrid", "fp8_recipe": "delayed"} if fp8 else {}
    options = {
        "num_layers": LAYERS,
        "hidden_size": C,
        "ffn_hidden_size": 1024,
        "num_attention_heads": 8,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "attention_backend": AttnBackend.unfused,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    config = TransformerConfig(**{**options, **KINDS[kind], **changes})
    experts = config.num_moe_experts
    if transformer_engine:
        spec = specs.get_gpt_layer_with_transformer_engine_spec(experts, moe_grouped_gemm=False)
    else:
        spec = specs.get_gpt_layer_local_spec(experts, normalization="RMSNorm")
    settings = MHCConfig(alpha=0.5, recompute=recompute, **mhc)
    gpt = GPTModel(
        config, mhc_layer_spec(spec, config, settings), VOCAB, S, position_embedding_type="rope"
    )
    return gpt.cuda().bfloat16()


def loss(gpt, number: int) -> torch.Tensor:
    tokens = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(number)).cuda()
    positions = torch.arange(S, device="cuda").expand(B, S)
    return gpt(tokens, positions, None, labels=tokens.roll(-1, 1)).mean()


def gradients(gpt, microbatches: int = 3) -> dict[str, torch.Tensor]:
    """Of several microbatches, all forwards first; the first ones are warm-up for FP8's scales."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    torch.manual_seed(5)
    losses = [loss(gpt, number) for number in range(microbatches)]
    for one in losses:
        one.backward()
    torch.cuda.synchronize()
    found = {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}
    assert found and all(g.isfinite().all() for g in found.values())
    return found


def differing(ours, expected) -> list[str]:
    assert ours.keys() == expected.keys()
    return [name for name in expected if not torch.equal(ours[name], expected[name])]


@pytest.mark.parametrize("transformer_engine", [False, pytest.param(True, marks=pytest.mark.skipif(
    not TE, reason="Transformer Engine is not installed"))], ids=["local", "te"])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("L_r", [1, 3, "auto", 8])
def test_the_same_bits(kind: str, L_r: int | str, transformer_engine: bool) -> None:
    expected = gradients(model(0, kind, transformer_engine))
    again = gradients(model(0, kind, transformer_engine))
    if differing(again, expected):
        pytest.skip(f"two runs without recompute differ: {differing(again, expected)[:3]}")
    assert not differing(gradients(model(L_r, kind, transformer_engine)), expected)


@pytest.mark.skipif(not TE, reason="Transformer Engine is not installed")
@pytest.mark.parametrize("kind", ["dense", "MoE"])
def test_the_same_bits_in_fp8(kind: str) -> None:
    expected = gradients(model(0, kind, True, fp8=True))
    again = gradients(model(0, kind, True, fp8=True))
    if differing(again, expected):
        pytest.skip(f"two runs without recompute differ: {differing(again, expected)[:3]}")
    assert not differing(gradients(model(3, kind, True, fp8=True)), expected)


@pytest.mark.parametrize(
    "mhc",
    [{"kernels": "reference"}, {"variant": "identity"}, {"n": 2}, {"fuse_norm": False}],
    ids=str,
)
def test_other_connections(mhc: dict) -> None:
    expected = gradients(model(0, "dense", False, **mhc))
    assert not differing(gradients(model(3, "dense", False, **mhc)), expected)


@pytest.mark.parametrize("C", [64, 512, 1280, 2560])
@pytest.mark.parametrize("sublayers", [1, 2, 9])
@pytest.mark.parametrize("y_bias", [False, True])
def test_a_refill_gives_the_forwards_bits(C: int, sublayers: int, y_bias: bool) -> None:
    """The kernels alone: what Hopper's own kernels wrote, and what Triton's wrote (a bias)."""
    for case in (Case(4, C, 300, y_bias=y_bias), Case(2, C, 77, "identity", y_bias=y_bias)):
        same = refilled(case, "cuda", sublayers)
        assert all(same.values()), same


def test_the_refill_runs_beside_and_is_waited_for(monkeypatch) -> None:
    """On its own stream; with it a thousand times slower, or the forward's, nothing changes."""
    from mhc_megatron import recompute

    expected = gradients(model(0, "dense", False))
    gpt = model(3, "dense", False)
    streams: set[torch.cuda.Stream] = set()
    fill, close = recompute.Block._fill, recompute.Block.close

    def slow_fill(self, filled) -> None:
        streams.add(torch.cuda.current_stream())
        torch.cuda._sleep(20_000_000)
        fill(self, filled)

    def slow_close(self, x, make) -> None:
        torch.cuda._sleep(20_000_000)
        close(self, x, make)

    monkeypatch.setattr(recompute.Block, "_fill", slow_fill)
    monkeypatch.setattr(recompute.Block, "close", slow_close)
    assert not differing(gradients(gpt), expected)
    assert streams == {recompute.side_stream(torch.device("cuda", 0))}


def test_without_waiting_the_bits_differ(monkeypatch) -> None:
    """The test above can fail: memory that is not filled yet, and nobody waits."""
    from mhc_megatron import recompute

    kept, gpt = model(0, "dense", False), model(3, "dense", False)
    loss(kept, 0).backward()
    fill = recompute.Block._fill

    def slow_fill(self, filled) -> None:
        for tensor in (t for of in filled for t in (of.x, of.u, of.normed) if t is not None):
            tensor.zero_()
        torch.cuda._sleep(1_000_000_000)
        fill(self, filled)

    monkeypatch.setattr(recompute.Block, "_fill", slow_fill)
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda stream, event: None)
    loss(gpt, 0).backward()
    torch.cuda.synchronize()
    expected = {name: p.grad for name, p in kept.named_parameters()}
    assert differing({name: p.grad for name, p in gpt.named_parameters()}, expected)


def test_prefetch() -> None:
    from mhc_megatron.recompute import prefetch

    expected = gradients(model(0, "dense", False), 1)
    gpt = model(3, "dense", False)
    one = loss(gpt, 0)
    assert prefetch(gpt)
    one.backward()
    assert not differing({name: p.grad for name, p in gpt.named_parameters()}, expected)


@pytest.mark.parametrize("fuse_norm", [True, False])
def test_memory_of_the_streams(fuse_norm: bool) -> None:
    """What waits for backward, against nC ceil(L / L_r) and the y: 4 microbatches."""
    n, m, L, width = 4, 4, 2 * LAYERS, S * B * C * 2

    def held(L_r: int) -> int:
        gpt = model(L_r, "dense", False, fuse_norm=fuse_norm)
        gc.collect()  # models before it; a connection and its norm know each other
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        losses = [loss(gpt, number) for number in range(m)]
        assert len(losses) == m
        return torch.cuda.memory_allocated() - before

    held(0)  # libraries' workspaces
    everything = held(0)
    for L_r in (1, 2, 4, 8):
        # Without recompute: x, u and norm(u) of each sublayer, or norm(u) alone; with it, x of each
        # block.
        saved = ((n + 2 - fuse_norm) * L - n * math.ceil(L / L_r)) * m * width
        # Beside them some coefficients, up to 100 bytes a token and sublayer.
        expected = pytest.approx(saved, rel=0.05, abs=100 * S * B * m * L)
        assert everything - held(L_r) == expected, L_r
