"""Megatron's two ways to keep activations in the host's memory, on one GPU: the same bits.

Fine-grained offload (``offload-modules``) moves the inputs of parts of a layer and frees them;
``cpu-offloading`` moves what whole layers save, the streams with it. Both go through Transformer
Engine. And grouped experts, whose activations it can move, against experts one after the other.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs as specs  # noqa: E402
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (  # noqa: E402
    FineGrainedActivationOffloadingInterface,
    PipelineOffloadManager,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP  # noqa: E402
from megatron.core.transformer.transformer_config import (  # noqa: E402
    MLATransformerConfig,
    TransformerConfig,
)

from mhc_megatron.config import MHCConfig  # noqa: E402
from mhc_megatron.layer_spec import mhc_layer_spec  # noqa: E402

n, S, B, C, VOCAB, LAYERS = 4, 256, 2, 512, 256, 4
ATTENTION = ["qkv_linear", "core_attn", "attn_proj"]
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_head_dim": 64,
    "qk_pos_emb_head_dim": 32,
    "v_head_dim": 64,
    "rope_type": "rope",
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 256,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
}
#: name -> settings, whether the layers are Transformer Engine's, what is moved.
MOVED = {
    "dense, local": ({}, False, ATTENTION),
    "dense": ({}, True, ATTENTION),
    "dense, FP8": ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, True, ATTENTION),
    "latent attention": (LATENT, True, ATTENTION),
    "grouped experts": (EXPERTS, True, ["core_attn", "attn_proj", "expert_fc1", "moe_act"]),
    "all": (LATENT | EXPERTS, True, [*ATTENTION, "expert_fc1", "moe_act"]),
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


@pytest.fixture
def first_version(monkeypatch) -> None:
    """What Megatron asks of Transformer Engine >= 2.10 for fine-grained offload."""
    from transformer_engine.pytorch import cpu_offload

    if hasattr(cpu_offload, "NVTE_CPU_OFFLOAD_V1"):
        monkeypatch.setattr(cpu_offload, "NVTE_CPU_OFFLOAD_V1", True)


def model(settings: dict, transformer_engine: bool = True, **mhc) -> GPTModel:
    latent = settings.get("multi_latent_attention", False)
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
    config = (MLATransformerConfig if latent else TransformerConfig)(**options | settings)
    if transformer_engine:
        spec = specs.get_gpt_layer_with_transformer_engine_spec(
            config.num_moe_experts, config.moe_grouped_gemm, multi_latent_attention=latent
        )
    else:
        spec = specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    spec = mhc_layer_spec(spec, config, MHCConfig(alpha=0.5, n=n, **mhc))
    gpt = GPTModel(config, spec, VOCAB, S, position_embedding_type="rope")
    return gpt.cuda().bfloat16()


def loss(gpt: GPTModel, number: int) -> torch.Tensor:
    tokens = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(number)).cuda()
    positions = torch.arange(S, device="cuda").expand(B, S)
    return gpt(tokens, positions, None, labels=tokens.roll(-1, 1)).mean()


def steps(gpt: GPTModel, microbatches: int, count: int = 3) -> tuple[list[dict], int]:
    """Gradients of each of ``count`` steps, and the bytes that wait for the last backward.

    All forwards of a step first: Megatron learns in the first step what there is to move.
    """
    found = []
    for number in range(count):
        gpt.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        losses = [loss(gpt, microbatches * number + i) for i in range(microbatches)]
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        for one in losses:
            one.backward()
        FineGrainedActivationOffloadingInterface.reset()  # schedules.py:846
        torch.cuda.synchronize()
        found.append({name: p.grad.clone() for name, p in gpt.named_parameters()})
    return found, held


def errors(found: list[dict], expected: list[dict]) -> tuple[float, float]:
    """Relative difference of all gradients together, and the largest of one parameter's."""
    pairs = [
        (ours[name].float(), theirs[name].float())
        for ours, theirs in zip(found, expected, strict=True)
        for name in theirs
    ]
    gaps = [float((a - b).norm()) for a, b in pairs]
    sizes = [float(b.norm()) for _, b in pairs]
    worst = max(gap / size if size else gap for gap, size in zip(gaps, sizes, strict=True))
    return math.hypot(*gaps) / math.hypot(*sizes), worst


def offloaded(name: str, variant: str) -> tuple[tuple[float, float], dict[str, int]]:
    """Errors of the gradients with fine-grained offload against those without; bytes moved."""
    settings, transformer_engine, modules = MOVED[name]
    PipelineOffloadManager.reset_instance()
    expected, kept = steps(model(settings, transformer_engine, variant=variant), 3)
    again, _ = steps(model(settings, transformer_engine, variant=variant), 3)
    assert errors(again, expected) == (0, 0), "two runs without offload differ"
    PipelineOffloadManager.reset_instance()
    moving = settings | {
        "fine_grained_activation_offloading": True,
        "offload_modules": modules,
        "min_offloaded_tensor_size": 0,
    }
    found, held = steps(model(moving, transformer_engine, variant=variant), 3)
    print(f"{name}, {variant}: {held} bytes wait on the GPU, {kept} without offload")
    assert held < kept
    return errors(found, expected), PipelineOffloadManager.get_instance().offload_summary_bytes


@pytest.mark.parametrize("name", MOVED)
def test_fine_grained_offload(name: str, first_version) -> None:
    """To the bit, unless Megatron itself has other bits: it brings views back contiguous."""
    (ours, worst), moved = offloaded(name, "mhc")
    assert set(moved) == set(MOVED[name][2])
    if ours:
        (plain, _), _ = offloaded(name, "none")
        print(f"{name}: difference {ours:.1e} ({worst:.1e} of one parameter), Megatron {plain:.1e}")
        assert plain > 0 and ours < 1e-2 and worst < 0.2


def apart(gpt: GPTModel) -> GPTModel:
    """Each layer makes its first read itself, as with ``cpu-offloading``: other roundings of x's
    gradient than where the layer before makes it."""
    for layer in gpt.decoder.layers:
        layer.mlp_hc._following = ()
    return gpt


@pytest.mark.parametrize("fuse_norm", [True, False])
def test_cpu_offloading(fuse_norm: bool, monkeypatch) -> None:
    """Two layers' activations, the streams among them: more than x of every sublayer."""
    from transformer_engine.pytorch import cpu_offload

    monkeypatch.setattr(cpu_offload, "NVTE_CPU_OFFLOAD_V1", False, raising=False)
    mhc = {"fuse_norm": fuse_norm}
    expected, kept = steps(apart(model({}, **mhc)), 1)
    again, _ = steps(apart(model({}, **mhc)), 1)
    assert errors(again, expected) == (0, 0), "two runs without offload differ"
    found, held = steps(model({"cpu_offloading": True, "cpu_offloading_num_layers": 2}, **mhc), 1)
    print(f"{held} bytes wait on the GPU, {kept} without offload")
    assert errors(found, expected) == (0, 0)
    assert kept - held > 2 * 2 * n * S * B * C * 2


def test_grouped_experts_are_the_sequential_ones() -> None:
    """Same weights, one grouped product or one after the other: gradients near each other."""
    grouped, sequential = model(EXPERTS), model(EXPERTS | {"moe_grouped_gemm": False})
    kinds = [{type(m) for m in gpt.modules()} for gpt in (grouped, sequential)]
    assert TEGroupedMLP in kinds[0] and SequentialMLP in kinds[1]
    ours = dict(sequential.named_parameters())
    with torch.no_grad():
        for name, p in grouped.named_parameters():
            ours[sequential_name(name)].copy_(p)
    (expected,), _ = steps(sequential, 1, count=1)
    (found,), _ = steps(grouped, 1, count=1)
    found = {sequential_name(name): gradient for name, gradient in found.items()}
    assert set(found) == set(expected) and any("_hc.phi" in name for name in found)
    whole, worst = errors([found], [expected])
    print(f"difference of the gradients {whole:.1e} ({worst:.1e} of one parameter)")
    assert whole < 1e-2 and worst < 0.2


def sequential_name(name: str) -> str:
    """mlp.experts.linear_fc1.weight2 -> mlp.experts.local_experts.2.linear_fc1.weight"""
    head, experts, linear = name.partition(".experts.")
    if not experts or linear.startswith("local_experts"):
        return name
    linear, _, number = linear.partition(".weight")
    return f"{head}.experts.local_experts.{number}.{linear}.weight"
