"""The training bench on a CPU: its slice, its arithmetic, its files, its refusals.

Times are not tested. What a GPU did is tested on traces made here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import bench_training  # noqa: E402
from kernel_bench.timing import Times  # noqa: E402
from training_bench import classes, columns, trace  # noqa: E402

from mhc_megatron import connection  # noqa: E402
from mhc_megatron.config import MHCConfig  # noqa: E402
from mhc_megatron.counting import Flops  # noqa: E402
from mhc_megatron.errors import UserError  # noqa: E402

TINY = str(ROOT / "configs" / "tiny.yaml")
SMALL = (
    "hidden-size=32", "ffn-hidden-size=64", "num-attention-heads=2", "seq-length=32",
    "max-position-embeddings=32",
)  # fmt: skip


# --- the command ---------------------------------------------------------------------------------


def bench(out: Path, config: Path | str, *words: str) -> subprocess.CompletedProcess:
    """A process of the bench with a small model."""
    command = [sys.executable, str(ROOT / "tools" / "bench_training.py")]
    command += ["--config", str(config), "--out", str(out)]
    command += [word for change in SMALL for word in ("--set", change)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, env=environment, timeout=200
    )


def test_a_run_writes_table_json_and_plot(tmp_path):
    out = tmp_path / "out"
    words = ["--layers", "2", "--tokens", "64", "--steps", "2", "--variants", "none,mhc:n=2,hc"]
    words += ["--precision", "fp32,bf16", "--optimizer", "--json", str(tmp_path / "copy.json")]
    done = bench(out, TINY, *words)
    log = out / "rank-0.log"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-3000:]
    assert {path.name for path in out.iterdir()} == {*columns.FILES, "rank-0.log"}
    assert (out / columns.FILES[0]).read_text() in done.stdout
    assert (out / columns.FILES[2]).read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / columns.FILES[1]).read_text())
    assert found == json.loads((tmp_path / "copy.json").read_text())
    assert (found["layers"], found["full_layers"]) == (2, 4)
    assert [group["precision"] for group in found["groups"]] == ["fp32", "bf16"]
    for group in found["groups"]:
        none, mhc, hc = group["columns"]
        assert [c["label"] for c in (none, mhc, hc)] == ["none", "mhc:n=2", "hc"]
        assert none["overhead"] == {"step": None, "kernels": None, "layers": None}
        step = mhc["step_ms"]["median"] / none["step_ms"]["median"] - 1
        assert mhc["overhead"]["step"] == pytest.approx(step)
        assert none["connection_parameters"] == 0
        # 2 layers x 2 sublayers x (K n C + K + 3), K = n^2 + 2n
        assert mhc["connection_parameters"] == 4 * (8 * 2 * 32 + 8 + 3)
        assert mhc["parameters"] - none["parameters"] == mhc["connection_parameters"]
        assert mhc["flops_per_token"]["model"] == none["flops_per_token"]["model"]
        assert hc["flops_per_token"]["connections"] > mhc["flops_per_token"]["connections"] > 0
        for column in (none, mhc, hc):
            rate = 1e3 * 64 / column["step_ms"]["median"]
            assert column["tokens_per_s"] == pytest.approx(rate)
            tflops = column["flops_per_token"]["model"] * rate / 1e12
            assert column["model_tflops"] == pytest.approx(tflops)
            assert column["mfu"] is None and column["profile"] is None and not column["failed"]
            # 257 symbols; same tokens and weights in every column, and the optimizer has stepped.
            assert 4.0 < column["loss"] < 5.6


#: Name -> (arguments behind the configuration, what the sentence says).
BAD = {
    "unknown variant": (["--variants", "none,mch"], "variant must be one of"),
    "unknown mhc key": (["--variants", "mhc:m=2"], "unknown key 'm'"),
    "no value": (["--variants", "mhc:n"], "name:key=value"),
    "twice": (["--variants", "mhc,mhc"], "same column twice"),
    "no variant": (["--variants", ","], "names no column"),
    "unknown precision": (["--precision", "fp4"], "'fp4' is not one of"),
    "fp8 without a GPU": (["--precision", "fp8-blockwise"], "needs a CUDA GPU"),
    "unknown peer": (["--peer", "liger"], "'liger' is not one of transformer-engine"),
    "peer without a GPU": (["--peer", "transformer-engine"], "needs a CUDA GPU"),
    "too many layers": (["--layers", "5"], "--layers must be from 1 to 4, not 5"),
    "no layers": (["--layers", "0"], "at least 1"),
    "layers twice": (["--layers", "2", "--set", "num-layers=2"], "the same thing twice"),
    "tokens": (["--tokens", "300"], "--tokens must be a multiple of"),
    "profile": (["--profile-steps", "-1"], "--profile-steps must not be negative"),
    "recompute": (["--recompute", "[maybe"], "not valid YAML"),
    "no such day": (["--recompute", "2024-13-45"], "not valid YAML (month must be"),
    "tokens twice": (["--tokens", "256", "--set", "micro-batch-size=2"], "the same thing twice"),
    "implementation twice": (
        ["--transformer-impl", "local", "--set", "transformer-impl=local"], "the same thing twice"
    ),
    "precision": (["--set", "fp16=true"], "--precision says"),
    "precision of fp8": (["--set", "fp8_format=e4m3"], "--precision says"),
    "not a number": (["--set", "tensor-model-parallel-size=two"], "must be a whole number"),
    "batch": (["--set", "global-batch-size=9"], "a step has"),
    "checked": (["--set", "check-for-nan-in-loss-and-grad=true"], "the trainer's loop"),
    "hybrid": (["--layers", "2", "--set", "hybrid-layer-pattern='*-*-'"], "hybrid-layer-pattern"),
    "json is a folder": (["--json", "/tmp"], "/tmp is a folder"),
    "set": (["--set", "n"], "--set takes key=value"),
    "json": (["--json", "/no/such/folder/x.json"], "does not exist"),
    "graphs": (["--set", "cuda-graph-impl=full_iteration"], "cuda-graph-impl full_iteration"),
    "pipeline": (["--set", "pipeline-model-parallel-size=2"], "--layers takes a slice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, tmp_path, capsys, monkeypatch):
    words, said = BAD[name]
    if name.endswith("without a GPU") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "out"
    try:
        code = bench_training.main(["--config", TINY, "--out", str(out), *words])
    except SystemExit as error:
        code = error.code
    heard = capsys.readouterr()
    assert code == 2 and said in heard.err + heard.out
    assert len((heard.err + heard.out).strip().splitlines()) == 1
    assert not out.exists()


def test_what_contradicts_in_every_precision_leaves_no_results(tmp_path):
    done = bench(tmp_path, TINY, "--precision", "fp32,bf16", "--set", "hidden-size=33")
    assert done.returncode == 2, done.stderr
    said = done.stdout + done.stderr
    assert said.startswith("bench_training: contradictory") and said.count("\n") == 1
    assert not [name for name in columns.FILES if (tmp_path / name).exists()]


def test_what_was_built_is_released_when_settings_contradict(monkeypatch):
    """The next precision needs the memory."""
    from training_bench import models

    told = []

    class Model:
        def __init__(self, column, *_, **__):
            if column.label == "hc":
                raise UserError("no")
            told.append("built")

        def release(self):
            told.append("released")

    monkeypatch.setattr(models, "Model", Model)
    monkeypatch.setattr(models, "start", lambda *_: types.SimpleNamespace(rank=0))
    chosen = columns.columns(["none", "mhc", "hc"], ["fp32"], [], {})
    with pytest.raises(UserError, match="no"):
        bench_training._bench(chosen, None, types.SimpleNamespace(optimizer=False), False)
    assert told == ["built", "built", "released", "released"]


def test_a_profiled_step_is_the_step_alone(monkeypatch):
    """Gradients are cleared, and waited for, before the profiler records."""
    from training_bench import measure

    told = []

    class Profiler:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def step(self):
            told.append("record")

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profiler())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    monkeypatch.setattr(trace, "read", lambda path: None)
    model = types.SimpleNamespace(
        column=types.SimpleNamespace(precision="bf16", label="mhc"),
        prepare=lambda: told.append("prepare"),
        step=lambda: told.append("step"),
    )
    measure._profiled(model, None)
    assert told == ["prepare", "step", "prepare", "wait", "record", "step", "wait", "record"]


def test_results_are_not_written_over(tmp_path, capsys):
    (tmp_path / columns.FILES[1]).write_text("{}")
    assert bench_training.main(["--config", TINY, "--out", str(tmp_path)]) == 2
    assert "already holds" in capsys.readouterr().err


# --- the slice -----------------------------------------------------------------------------------


def cut(name: str, *changes: str, layers: int | None = 4, tokens: int | None = 16384):
    return columns.cut(str(ROOT / "configs" / f"{name}.yaml"), list(changes), layers, tokens)


@pytest.mark.parametrize(
    ("name", "layers", "pattern"),
    [
        ("mhc-27b", 4, "([0]*1+[1]*3)"),
        ("mhc-27b", 1, "([0]*0+[1]*1)"),
        ("deepseek-v3-671b", 4, "([0]*1+[1]*3)"),
        ("deepseek-v3-671b", 40, "([0]*2+[1]*38)"),
        ("dense-8b", 4, None),
    ],
)
def test_a_slice_keeps_the_shares_of_its_layers(name, layers, pattern):
    part = cut(name, layers=layers)
    values = part.settings.megatron
    assert values.get("moe-layer-freq") == pattern and values["num-layers"] == layers
    assert values["micro-batch-size"] * values["seq-length"] == 16384 == part.tokens
    assert values["pipeline-model-parallel-size"] == 1
    assert values.get("mtp-num-layers") is None
    assert values["tensor-model-parallel-size"] == 1


def test_what_is_set_stays_as_it_is_set():
    part = cut("deepseek-v3-671b", "mtp-num-layers=1", "moe-layer-freq='[1]*4'", "num-experts=16")
    values = part.settings.megatron
    assert (values["mtp-num-layers"], values["num-experts"]) == (1, 16)
    assert values["moe-layer-freq"] == "[1]*4"


def test_the_layout_is_what_the_gpus_hold(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    values = cut("mhc-27b").settings.megatron
    assert values["expert-model-parallel-size"] == 4 and values["tensor-model-parallel-size"] == 1
    assert cut("dense-8b").settings.megatron["tensor-model-parallel-size"] == 2
    assert cut("dense-8b").settings.megatron["sequence-parallel"] is True


def test_experts_are_spread_over_a_stage(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    two_stages = "pipeline-model-parallel-size=2"
    values = cut("mhc-27b", two_stages, tokens=4 * 4096).settings.megatron
    assert values["expert-model-parallel-size"] == 2
    values = cut("mhc-27b", "tensor-model-parallel-size=2").settings.megatron
    assert values["expert-model-parallel-size"] == 2
    values = cut("mhc-27b", "expert-tensor-parallel-size=4").settings.megatron
    assert values["expert-model-parallel-size"] == 1


def test_the_batch_is_what_a_step_has(monkeypatch):
    """By it ``mhc.recompute: auto`` counts the microbatches in flight."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    part = columns.cut(TINY, ["pipeline-model-parallel-size=2"], None, 2048, microbatches=4)
    values = part.settings.megatron
    assert values["global-batch-size"] == 2 * 4 * values["micro-batch-size"]


def test_a_configuration_that_counts_samples_is_cut_too(tmp_path):
    text = Path(TINY).read_text().replace("train-iters:", "train-samples:")
    path = tmp_path / "samples.yaml"
    path.write_text(text.replace("lr-warmup-iters:", "lr-warmup-samples:"))
    done = bench(tmp_path / "out", path, "--layers", "2", "--steps", "1", "--no-plot")
    assert done.returncode == 0, done.stderr


def test_columns_take_turns_by_precision():
    found = columns.columns(
        ["none", "mhc:kernels=reference"], ["bf16", "fp8-current"], ["transformer-engine"], {"n": 4}
    )
    assert [(c.label, c.precision) for c in found] == [
        (label, precision)
        for precision in ("bf16", "fp8-current")
        for label in ("none", "mhc:kernels=reference", "transformer-engine")
    ]
    assert found[1].mhc == MHCConfig(kernels="reference") and found[2].peer
    with pytest.raises(UserError, match="unknown key"):
        columns.columns(["mhc:recomputes=1"], ["bf16"], [], {})


def test_a_peers_connection_reads_and_writes_through_its_kernels(monkeypatch):
    """Transformer Engine's functions, by an eager stand-in of their layouts: x [s, b, C, n], phi's
    columns with the streams innermost, bias [1, K]."""
    from training_bench import peers

    from mhc_kernels import reference

    n, C = 4, 16

    def mix(x, phi, alpha, bias):
        ours = phi.unflatten(1, (C, n)).transpose(1, 2).flatten(1)
        assert x.shape[-2:] == (C, n) and bias.shape == (1, 24)
        return reference.mhc_pre(x.transpose(-2, -1), ours, alpha, bias[0])

    def combine(y, y_bias, H_post, x, H_res, streams):
        return reference.mhc_post(x.transpose(-2, -1), y, H_post, H_res, y_bias).transpose(-2, -1)

    package = "transformer_engine.pytorch.triton"
    names = ("transformer_engine", "transformer_engine.pytorch", package)
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kernels = types.SimpleNamespace(
        mhc_generate_mix_and_aggregate=mix, mhc_fused_expand_combine=combine
    )
    monkeypatch.setattr(sys.modules[package], "mhc", kernels, raising=False)
    peers._operations.cache_clear()
    (column,) = columns.columns([], ["bf16"], ["transformer-engine"], {"recompute": "auto"})
    assert column.mhc.recompute == 0 and not column.mhc.fuse_norm
    options = (column.mhc, C, 1, "0.mlp")
    theirs = peers.TransformerEngineConnection(*options, device=torch.device("cpu"))
    own = connection.HyperConnection(*options, device=torch.device("cpu"))
    with torch.no_grad():
        own.phi.copy_(theirs.phi.unflatten(1, (C, n)).transpose(1, 2).flatten(1))
    x = torch.randn(3, 2, C, n)
    y = torch.randn(3, 2, C)
    found = []
    for module, streams in ((theirs, x), (own, x.transpose(-2, -1))):
        u = module(streams.flatten(-2))
        write = connection.Write(y, None, *module.take_coefficients())
        found.append((u, module.mix(streams.flatten(-2), write, True, 0.0)))
    peers._operations.cache_clear()
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(
        found[0][1].unflatten(-1, (C, n)), found[1][1].unflatten(-1, (n, C)).transpose(-2, -1)
    )


# --- the trace -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "GEMM"),
        ("nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT", "GEMM"),
        ("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32", "GEMM"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "GEMM"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x192",
            "attention",
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob", "attention"),
        ("_permute_kernel", "MoE permute"),
        ("_unpermute_bwd_with_merging_probs_kernel", "MoE permute"),
        ("_row_id_map_pass_1_kernel", "MoE permute"),
        ("_sort_chunks_by_map_kernel", "MoE permute"),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>", "MoE permute"),
        (
            "void transformer_engine::fused_topk_with_score_function_forward_kernel<float>",
            "MoE permute",
        ),
        (
            "void transformer_engine::detail::cast_transpose_fused_kernel_notaligned<false>",
            "quantise",
        ),
        ("void transformer_engine::(anonymous namespace)::block_scaled_1d_cast", "quantise"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<...>", "norm"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
         "communication"),
        ("boundary_grad_hopper_kernel", "mHC backward"),
        ("logits_grad_kernel", "mHC backward"),
        ("phi_grad_kernel", "mHC backward"),
        ("post_project_hopper_kernel", "mHC forward"),
        ("post_kernel", "mHC forward"),
        ("read_kernel", "mHC forward"),
        ("split_phi_kernel", "mHC forward"),
        ("refill_kernel", "mHC refill"),
        ("_mhc_projection_bwd_fused_dphi", "mHC backward"),
        ("_mhc_sinkhorn_fwd_fused_recompute", "mHC forward"),
        ("Memcpy DtoD (Device -> Device)", "memory"),
        ("Memset (Device)", "memory"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
         "other"),
    ],
)  # fmt: skip
def test_kernels_have_classes(kernel, name):
    assert classes.class_of(kernel) == name


def test_every_kernel_of_ours_has_a_class_of_ours():
    """The table follows kernels/mhc_kernels: no launch of it may count as another's."""
    import re

    jit = re.compile(r"^@\w+\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)
    sources = (ROOT / "kernels" / "mhc_kernels").glob("*.py")
    names = {name for source in sources for name in jit.findall(source.read_text())}
    assert len(names) > 8
    assert not {name for name in names if not classes.class_of(name).startswith("mHC")}


def test_the_classes_of_the_table_are_all_shown():
    assert set(classes.NAMES) == {*classes.CLASSES, classes.OTHER}


def event(
    cat: str, name: str, ts: float, dur: float, correlation: int = 0, stream: int = 7
) -> dict:
    return {
        "ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": stream,
        "args": {"correlation": correlation},
    }  # fmt: skip


EVENTS = [
    event("cuda_runtime", "cudaDeviceSynchronize", -20, 5),  # before the step, for nothing
    event("cuda_runtime", "cudaLaunchKernel", 0, 5, 1),
    event("cuda_runtime", "cudaLaunchKernelExC", 10, 5, 2),
    event("cuda_driver", "cuLaunchKernelEx", 20, 5, 3),
    event("cuda_runtime", "cudaStreamSynchronize", 30, 500),
    event("cuda_runtime", "cudaMemcpyAsync", 540, 5, 4),
    event("cuda_runtime", "cudaDeviceSynchronize", 560, 500),  # the bench's own, at the end
    event("kernel", "nvjet_hsh_x", 7, 300, 1),  # 2 us after its launch: the queue was empty
    event("kernel", "post_kernel", 307, 100, 2),  # long after: it stood in the queue
    event("kernel", "post_kernel", 357, 100, 3, stream=8),  # half beside the one before
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 1000, 50, 4),
    {"ph": "i", "cat": "kernel", "name": "an instant"},
    event("cpu_op", "aten::mm", 0, 1000),
]


def test_a_trace_adds_up(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": EVENTS}))
    found = trace.read(path)
    assert found.kernel_ms == pytest.approx(0.55)
    assert found.busy_ms == pytest.approx(0.5)
    assert (found.launches, found.waits) == (4, 1)
    assert found.at_once == pytest.approx(1 / 3)
    assert found.classes == pytest.approx({"GEMM": 0.3, "mHC forward": 0.2, "memory": 0.05})


def test_a_dependent_launch_is_counted_from_the_end_of_the_one_before():
    project = event("kernel", "post_project_hopper_kernel", 0, 100)
    read = event("kernel", "read_kernel", 10, 130)  # on the GPU since 10, at work since 100
    within = event("kernel", "split_phi_kernel", 20, 30)
    found = trace.activity([read, within, project])
    assert found.names["read_kernel"] == pytest.approx(0.04)
    assert found.names["split_phi_kernel"] == 0
    assert found.kernel_ms == found.busy_ms == pytest.approx(0.14)


def test_the_union_of_intervals():
    assert trace.union([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == pytest.approx(4)
    assert trace.union([]) == 0


# --- the table -----------------------------------------------------------------------------------


def results_of(step_ms: float, kernel_ms: float, label: str, **activity):
    from training_bench.measure import Measured
    from training_bench.results import Result

    values = {"busy_ms": kernel_ms, "launches": 10, "waits": 0, "at_once": 0.1} | activity
    found = trace.Activity(kernel_ms=kernel_ms, classes={"GEMM": kernel_ms}, **values)
    column = columns.Column(label, "bf16", MHCConfig(variant=label))
    return Result(
        column, tokens=1000, flops=Flops(2e9, 0, 1e7), peak_tflops=100.0,
        measured=Measured([step_ms], Times.of([step_ms]), 2**30, 5.0, [found]),
    )  # fmt: skip


def test_overheads_with_the_vocabulary_and_without():
    from training_bench.results import Group, Run, table

    none, mhc = results_of(50, 40, "none"), results_of(53, 42, "mhc")
    group = Group("bf16", [none, mhc], vocabulary=20)
    assert group.overhead(mhc) == pytest.approx({"step": 0.06, "kernels": 0.05, "layers": 0.1})
    # 4 of 8 layers: the added 2 ms and the layers' 20 ms double, the vocabulary's 20 ms do not.
    assert group.derived(mhc, 4, 8) == pytest.approx(4 / 60)
    assert group.derived(mhc, 4, 4) is None
    assert mhc.tokens_per_s == pytest.approx(1000 / 0.053)
    assert mhc.mfu == pytest.approx(2e9 * mhc.tokens_per_s / 1e14)
    text = table(Run({}, 4, 8, [group]))
    assert "+10.00 % of the layers alone" in text and "derived, not measured: +6.67 %" in text


def test_the_interval_of_the_added_time_takes_rounds_as_pairs():
    """Rounds that differ by 40 %, and a second model that takes 5 % more in each of them."""
    from training_bench.results import Group, Run, table

    none, mhc = results_of(50, 40, "none"), results_of(53, 42, "mhc")
    none.measured.rounds = [50.0 + 2 * i for i in range(11)]
    mhc.measured.rounds = [1.05 * ms for ms in none.measured.rounds]
    group = Group("bf16", [none, mhc])
    assert group.interval(mhc) == pytest.approx((0.05, 0.05))
    assert group.interval(none) is None
    assert "+5.0..+5.0" in table(Run({}, 4, 4, [group]))
    # As far apart, but not in the same rounds: the interval says so, and holds what is so.
    mhc.measured.rounds = list(reversed(mhc.measured.rounds))
    low, high = group.interval(mhc)
    assert -0.3 < low < 0 < 0.05 < high < 0.5
    mhc.measured.rounds = none.measured.rounds = [50.0]
    assert group.interval(mhc) is None


@pytest.mark.parametrize(
    ("activity", "kind", "said"),
    [
        ({"busy_ms": 48.0}, "gpu", "the GPU is the bottleneck (idle 4.0 %"),
        ({"busy_ms": 40.0, "at_once": 0.9}, "host", "NOT bound by the GPU, which is idle 20.0 %"),
        ({"busy_ms": 40.0, "waits": 7}, "waits", "waits for it 7 times a step"),
    ],
)
def test_it_says_what_a_step_waits_for(activity, kind, said):
    from training_bench.results import Group, Run, bottleneck, table

    result = results_of(50, 60, "none", **activity)
    assert bottleneck(result) == kind
    assert said in table(Run({}, 4, 4, [Group("bf16", [result])]))


def test_an_unknown_gpu_has_no_mfu():
    from mhc_megatron.hardware import peak_tflops

    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("NVIDIA H200", fp8=True) == 1978.9
    assert peak_tflops("CPU") is None
    result = results_of(50, 40, "none")
    result.peak_tflops = None
    assert result.mfu is None and result.tflops
