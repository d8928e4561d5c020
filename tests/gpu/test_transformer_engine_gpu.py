"""Hyper-connections in Transformer Engine's layers, bf16 and FP8, on one GPU.

A few steps with the optimizer of tiny models whose shapes FP8 can take. What is asked: the
connections stay float32 with float32 coefficients, the loss falls as it does in bf16, a run that
was saved and resumed goes on as if it had never stopped, and graphs give what no graphs give.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from training_bench import columns, models  # noqa: E402

from mhc_megatron.connection import HyperConnection  # noqa: E402
from mhc_megatron.streams import is_connection  # noqa: E402

STEPS = 5
FP8 = ("fp8-delayed", "fp8-current", "fp8-blockwise")
BASE = {
    "num-layers": 3,
    "hidden-size": 256,
    "ffn-hidden-size": 512,
    "num-attention-heads": 4,
    "kv-channels": 64,
    "normalization": "RMSNorm",
    "swiglu": "true",
    "disable-bias-linear": "true",
    "untie-embeddings-and-output-weights": "true",
    "position-embedding-type": "rope",
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 512,
    "seq-length": 128,
    "max-position-embeddings": 128,
    "micro-batch-size": 2,
    "train-iters": 1000,
    "lr": 1.0e-3,
    "clip-grad": 1.0,
    "use-distributed-optimizer": "true",
    "transformer-impl": "transformer_engine",
    "mock-data": "true",
}
LATENT = {
    "multi-latent-attention": "true",
    "q-lora-rank": 128,
    "kv-lora-rank": 128,
    "qk-head-dim": 128,
    "qk-pos-emb-head-dim": 64,
    "v-head-dim": 128,
    "qk-layernorm": "true",
    "rope-type": "rope",
}
EXPERTS = {
    "num-experts": 4,
    "moe-layer-freq": '"([0]*1+[1]*2)"',
    "moe-ffn-hidden-size": 256,
    "moe-shared-expert-intermediate-size": 256,
    "moe-router-topk": 2,
    "moe-router-score-function": "sigmoid",
    "moe-router-dtype": "fp32",
    "moe-router-load-balancing-type": "none",
    "moe-token-dispatcher-type": "alltoall",
    "moe-grouped-gemm": "true",
    "moe-permute-fusion": "true",
}
KINDS = {
    "dense": {},
    "latent attention": LATENT,
    "experts": EXPERTS,
    "latent attention, experts": LATENT | EXPERTS,
    "prediction": {"mtp-num-layers": 1},
}


def write(folder: Path, kind: str, **mhc) -> Path:
    lines = [f"{key}: {value}" for key, value in (BASE | KINDS[kind]).items()]
    # Large alpha and phi: a coefficient that went wrong shows in the loss.
    values = {"variant": "mhc", "n": 4, "alpha": 0.3, "init": "static", "identity-bias": 2.0} | mhc
    lines += ["mhc:", *(f"  {key}: {value}" for key, value in values.items())]
    path = folder / "model.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def train(folder: Path, kind: str, precision: str, *changes: str, steps: int = STEPS, **mhc):
    """Losses of a few steps on one batch, and what the connections were."""
    part = columns.cut(str(write(folder, kind, **mhc)), list(changes), None, None)
    args = models.start(part, precision)
    column = columns.Column("mhc", precision, part.settings.mhc)
    model = models.Model(column, args, part, with_optimizer=True)
    dtypes: set[torch.dtype] = set()
    for chunk in model.chunks:
        for module in chunk.modules():
            if isinstance(module, HyperConnection):
                module.observer = lambda _, H_res: dtypes.add(
                    torch.float32 if H_res is None else H_res.dtype
                )
    losses = []
    for _ in range(steps):
        model.prepare()
        model.step()
        losses.append(model.loss())
    own = [p for chunk in model.chunks for p in chunk.parameters() if is_connection(p)]
    assert own and all(p.dtype == torch.float32 for p in own)
    assert all(p.main_grad.dtype == torch.float32 for p in own)
    assert all(bool(p.main_grad.isfinite().all()) for p in own)
    assert any(bool(p.main_grad.any()) for p in own)
    assert dtypes == {torch.float32}
    del model, own
    gc.collect()
    models.forget()
    torch.cuda.empty_cache()
    return losses


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    """Losses in bf16, by kind; each trained once."""
    found: dict[str, list[float]] = {}

    def losses(kind: str) -> list[float]:
        if kind not in found:
            found[kind] = train(tmp_path_factory.mktemp("bf16"), kind, "bf16")
        return found[kind]

    return losses


def assert_near(losses: list[float], expected: list[float], limit: float) -> None:
    assert all(loss == loss for loss in losses)
    difference = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    print(f"losses {losses}, expected {expected}, largest relative difference {difference:.1e}")
    assert difference < limit
    assert losses[-1] < losses[0] - 0.1


# Megatron's local attention takes no latents (no k_channels).
@pytest.mark.parametrize("kind", ["dense", "prediction"])
def test_bf16_is_near_the_local_layers(kind, in_bf16, tmp_path):
    unfused = ("no-persist-layer-norm=true", "no-masked-softmax-fusion=true")
    local = train(tmp_path, kind, "bf16", "transformer-impl=local", *unfused)
    # Other initial weights: Transformer Engine draws its own. Both begin at the uniform loss.
    assert abs(local[0] - in_bf16(kind)[0]) / local[0] < 0.05
    assert local[-1] < local[0] - 0.1 and in_bf16(kind)[-1] < in_bf16(kind)[0] - 0.1


@pytest.mark.parametrize("precision", FP8)
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_is_near_bf16(kind, precision, in_bf16, tmp_path):
    # Delayed scales are a step late, which shows in the first steps: 3.2 % was seen.
    limit = 0.05 if precision == "fp8-delayed" else 0.03
    assert_near(train(tmp_path, kind, precision), in_bf16(kind), limit)


@pytest.mark.parametrize("precision", FP8)
@pytest.mark.parametrize("kind", ["dense", "latent attention, experts"])
def test_fp8_weights(kind, precision, in_bf16, tmp_path):
    """Weights kept and gathered in FP8 alone; the connections' are not among them."""
    losses = train(tmp_path, kind, precision, "fp8-param-gather=true")
    assert_near(losses, in_bf16(kind), 0.03)


@pytest.mark.parametrize("precision", ["fp8-current", "fp8-blockwise"])
def test_first_and_last_layers_in_bf16(precision, in_bf16, tmp_path):
    losses = train(tmp_path, "dense", precision, "first-last-layers-bf16=true")
    assert_near(losses, in_bf16("dense"), 0.03)


@pytest.mark.parametrize("precision", FP8)
def test_padded_routing(precision, in_bf16, tmp_path):
    losses = train(tmp_path, "experts", precision, "moe-router-padding-for-quantization=true")
    assert_near(losses, in_bf16("experts"), 0.05)


@pytest.mark.parametrize("variant", ["hc", "identity", "birkhoff"])
def test_other_variants(variant, tmp_path):
    changes = (f"mhc.variant={variant}",)
    expected = train(tmp_path, "dense", "bf16", *changes)
    assert_near(train(tmp_path, "dense", "fp8-blockwise", *changes), expected, 0.03)


def test_gradients_are_added_without_apex(tmp_path, in_bf16):
    """The output layer's weight gradient through Transformer Engine's product, and unfused."""
    unfused = train(tmp_path, "dense", "bf16", "no-gradient-accumulation-fusion=true")
    assert_near(in_bf16("dense"), unfused, 1e-2)


# ------------------------------------------------------------------------------------ CUDA graphs


GRAPHS = {
    "local": ["cuda-graph-impl=local"],
    "whole layers": ["cuda-graph-impl=transformer_engine"],
    "attention": ["cuda-graph-impl=transformer_engine", "cuda-graph-modules=attn"],
    "mlp": ["cuda-graph-impl=transformer_engine", "cuda-graph-modules=mlp"],
    "iteration": ["cuda-graph-impl=full_iteration", "no-check-for-nan-in-loss-and-grad=true"],
}


def pretrain(config: Path, run: Path, *changes: str) -> list[float]:
    """Losses of a run of launch/pretrain.py."""
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(config)]
    command += ["--run-dir", str(run)]
    for change in changes:
        command += ["--set", change]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for name in [*environment]:  # what models of this process left there
        if name.startswith(("NVTE_", "MASTER_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del environment[name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    log = run / "logs" / "rank-0.log"
    said = done.stdout + done.stderr + (log.read_text()[-4000:] if log.exists() else "")
    assert done.returncode == 0, said
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["event"] == "train"]


RUN = ("global-batch-size=2", "log-interval=1", "eval-iters=0", "bf16=true", "num-workers=0")


@pytest.mark.parametrize("graphs", GRAPHS)
def test_graphs_of_the_trainer(graphs, tmp_path):
    config = write(tmp_path, "dense")
    common = (*RUN, "train-iters=8", "cuda-graph-warmup-steps=2")
    expected = pretrain(config, tmp_path / "plain", *common, "te-rng-tracker=true")
    losses = pretrain(config, tmp_path / "graphs", *common, *GRAPHS[graphs])
    assert len(losses) == len(expected) == 8
    difference = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    print(f"{graphs}: largest relative difference of a loss {difference:.1e}")
    assert difference < 1e-2


# ------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("weights", ["bf16 weights", "fp8 weights"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("kind", ["dense", "latent attention, experts"])
def test_a_resumed_fp8_run_goes_on_equal(kind, recipe, weights, tmp_path):
    """Eight steps, and four, saved, then four more: the same losses.

    Delayed scaling with FP8 weights needs ``mhc_megatron.fp8``.
    """
    difference = after_resuming(tmp_path, kind, recipe, weights)
    print(f"{kind}, {recipe}, {weights}: largest relative difference of a loss {difference:.1e}")
    assert difference < 1e-6


def after_resuming(folder: Path, kind: str, recipe: str, weights: str) -> float:
    """The largest relative difference of a loss to a run that was not interrupted."""
    config = write(folder, kind)
    form = "e4m3" if recipe == "blockwise" else "hybrid"
    common = (*RUN, "train-iters=8", f"fp8-format={form}", f"fp8-recipe={recipe}")
    if weights == "fp8 weights":
        common = (*common, "fp8-param-gather=true")
    whole = pretrain(config, folder / "whole", *common)
    pretrain(config, folder / "run", *common, "exit-interval=4", "save-interval=4")
    parts = pretrain(config, folder / "run", *common)
    assert len(whole) == len(parts) == 8
    print(f"never stopped {whole}, resumed {parts}")
    return max(abs(a - b) / b for a, b in zip(parts, whole, strict=True))
