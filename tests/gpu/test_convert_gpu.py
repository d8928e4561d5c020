"""Imported and upcycled models in Transformer Engine's layers, on one GPU.

What tests/test_convert_huggingface.py shows with stand-ins on a CPU: the names under which these
layers load an import, and that they compute what transformers computes. Transformer Engine
multiplies float32 in TF32, so logits agree to a relative error (Frobenius norm) of 1e-2; a norm
that was not loaded would give more than .1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint_models import (  # noqa: E402
    hf_logits,
    hf_model,
    megatron_logits,
    megatron_model,
    prediction_logits,
    save_hf,
    save_with_prediction,
    tokens,
)

from tools.convert_checkpoint import main  # noqa: E402

#: Widths that Transformer Engine's kernels take.
SIZES = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, initializer_range=0.1)
LATENT = dict(
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=64,
    moe_intermediate_size=64,
)


@pytest.fixture(scope="module")
def one_gpu():
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours.cpu() - theirs.cpu()).norm() / theirs.norm()
    print(f"relative error {error:.2e}")
    assert theirs.std() > 0.3 and error < 1e-2


def converted(*words) -> None:
    assert main([str(word) for word in words] + ["--quiet"]) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "deepseek_v3"])
def test_transformer_engine_loads_an_import(one_gpu, tmp_path: Path, family: str) -> None:
    changes = SIZES | (LATENT if family == "deepseek_v3" else {})
    if family == "qwen3":
        changes["head_dim"] = 32
    model = hf_model(family, **changes)
    if family == "deepseek_v3":
        prediction = save_with_prediction(model, tmp_path / "hf")
    else:
        save_hf(model, tmp_path / "hf")
    converted("import-hf", tmp_path / "hf", tmp_path / "m")
    ids = tokens(length=32)
    engine = {"transformer-impl": "transformer_engine", "moe-grouped-gemm": False}
    ours = megatron_model(tmp_path / "m", **engine)
    close(megatron_logits(ours, ids.cuda()), hf_logits(model, ids))
    if family == "deepseek_v3":
        close(prediction_logits(ours, ids.cuda()), prediction.logits(model, ids))
    converted("upcycle", tmp_path / "m", tmp_path / "up")
    up = megatron_model(tmp_path / "up", **engine)
    close(megatron_logits(up, ids.cuda()), hf_logits(model, ids))
    converted("export-hf", tmp_path / "m", tmp_path / "back")
    from safetensors.torch import load_file

    first, last = (load_file(tmp_path / x / "model.safetensors") for x in ("hf", "back"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
