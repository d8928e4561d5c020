"""The kernel bench on a CPU: its arithmetic, its files, its refusals.

Times are not tested. The adapters of other libraries are tested against eager stand-ins that follow
the layout and argument order those libraries document; the libraries themselves need a GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mhc_kernels import reference

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import bench_kernels  # noqa: E402
from kernel_bench import accuracy, columns, results, timing  # noqa: E402
from kernel_bench.case import PARTS, SUBLAYERS, Case, floor_elements, make_inputs  # noqa: E402
from kernel_bench.columns import Absent, EquationColumn  # noqa: E402
from kernel_bench.timing import Times  # noqa: E402

CPU = torch.device("cpu")
FUNCTIONS = (reference.mhc_pre, reference.mhc_post, reference.mhc_post_pre)


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(ROOT / "tools" / "bench_kernels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def measure_errors(column: columns.Column, case: Case) -> dict[str, float]:
    inputs = make_inputs(case, CPU)
    return accuracy.errors(column, inputs, accuracy.Float64(case, inputs))


# --- the command ---------------------------------------------------------------------------------


def test_quick_run_writes_table_json_and_plot(tmp_path: Path):
    out = tmp_path / "new" / "folder"
    done = run_bench(
        *("--device", "cpu", "--quick", "--shapes", "8x16,16x32"),
        *("--columns", "reference,liger", "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == sorted(results.FILES)
    assert (out / "bench_kernels.txt").read_text() == done.stdout
    assert "absent: liger: needs a CUDA GPU" in done.stdout
    assert (out / "bench_kernels.png").read_bytes().startswith(b"\x89PNG\r\n")

    record = json.loads((out / "bench_kernels.json").read_text())
    assert "--shapes 8x16,16x32" in record["command"] and record["device"] == "CPU"
    assert [(shape["T"], shape["C"]) for shape in record["shapes"]] == [(8, 16), (16, 32)]
    shape = record["shapes"][0]
    assert shape["copy_gb_s"] is None and shape["columns"]["liger"].keys() == {"absent"}
    column = shape["columns"]["reference"]
    assert set(column["ms"]) == set(PARTS) and not column["failed"]
    for part, times in column["ms"].items():
        assert 0 < times["least"] <= times["median"] <= times["p90"], part
        moved = shape["floor_ms"][part], times["gb_s"] * times["median"] * 1e6
        assert moved == (None, pytest.approx(floor_elements(part, 4) * 8 * 16 * 2)), part
    assert 1e-4 < column["errors"]["pre.u"] < 1e-2  # the rounding of a bf16 output
    assert column["errors"]["pre.d_phi"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--columns", "ours,cuda"], "'cuda' is not one of ours, reference"),
        (["--columns", "ours,ours"], "twice"),
        (["--shapes", "4096"], "'4096' is not TxC"),
        (["--shapes", "0x64"], "'0x64' is not TxC"),
        (["--shapes", "64x40"], "multiple of 16, not 40"),
        (["--variant", "mch"], "--variant must be one of mhc"),
        (["--dtype", "fp8"], "--dtype must be one of bf16"),
        (["--n", "0"], "at least 1, not 0"),
        (["--n", "8", "--variant", "birkhoff"], "n must be at most 4, not 8"),
        (["--n", "four"], "invalid int value"),
        (["--device", "tpu"], "--device must be one of cuda, cpu"),
        (["--colums", "ours"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_end_with_one_sentence_and_2(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        out = ["--out", str(tmp_path / "out")]
        bench_kernels.main(["--device", "cpu", "--quick", *arguments, *out])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path: Path):
    done = run_bench("--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA GPU is available" in done.stderr and done.stderr.count("\n") == 1
    done = run_bench("--device", "cpu")
    assert done.returncode == 2 and "--quick only" in done.stderr


def test_earlier_results_are_not_overwritten(capsys, tmp_path: Path):
    (tmp_path / "bench_kernels.json").write_text("precious")
    with pytest.raises(SystemExit) as ended:
        bench_kernels.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "already holds bench_kernels.json" in capsys.readouterr().err
    assert (tmp_path / "bench_kernels.json").read_text() == "precious"


def test_no_column_at_all_ends_with_2(capsys, tmp_path: Path):
    with pytest.raises(SystemExit) as ended:
        bench_kernels.main(
            ["--device", "cpu", "--quick", "--columns", "te,tile", "--out", str(tmp_path / "out")]
        )
    assert ended.value.code == 2
    assert "te: needs a CUDA GPU; tile: needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_column_that_fails_is_reported_and_the_rest_is_kept(monkeypatch, capsys, tmp_path):
    def broken_post(*_):
        raise RuntimeError("no such kernel\nsecond line")

    def load(name: str, case: Case, device: torch.device) -> columns.Column:
        functions = FUNCTIONS if name == "reference" else (FUNCTIONS[0], broken_post, FUNCTIONS[2])
        return EquationColumn(name, "", functions, case.variant)

    monkeypatch.setattr(bench_kernels, "load", load)
    out = tmp_path / "out"
    code = bench_kernels.main(
        ["--device", "cpu", "--quick", "--shapes", "8x16", "--out", str(out)]
    )
    assert code == 1
    assert "failed: ours, post_fwd: RuntimeError: no such kernel\n" in capsys.readouterr().out
    found = json.loads((out / "bench_kernels.json").read_text())["shapes"][0]["columns"]
    assert set(found["ours"]["failed"]) == {
        *("errors", "saved bytes", "chain", "chain_fwd", "post_fwd", "post_bwd")
    }
    assert set(found["ours"]["ms"]) == {"pre_fwd", "pre_bwd", "post_pre_fwd", "post_pre_bwd"}
    assert set(found["reference"]["ms"]) == set(PARTS)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("n", [2, 4])
def test_the_equations_themselves_have_float32_errors(variant: str, n: int):
    case = Case(24, 32, n, "fp32", variant)
    found = measure_errors(EquationColumn("reference", "", FUNCTIONS, variant), case)
    assert max(found.values()) < 1e-4
    expected = {"pre.u", "pre.d_phi", "post.d_y", "post_pre.d_H_post", "chain.x_last", "chain.d_x"}
    assert expected <= found.keys()
    assert ("pre.H_res" in found) == (variant != "identity")


@pytest.mark.parametrize("output", ["u", "H_post", "H_res"])
def test_a_perturbed_output_shows_with_its_size_and_nowhere_else(output: str):
    def perturbed(*args, **options):
        values = reference.mhc_pre(*args, **options)
        named = dict(zip(("u", "H_post", "H_res"), values, strict=True))
        # A straight-through factor: the value is off by 1e-3, the gradients are right.
        named[output] = named[output] + (1e-3 * named[output]).detach()
        return tuple(named.values())

    case = Case(24, 32, dtype="fp32")
    column = EquationColumn("off", "", (perturbed, *FUNCTIONS[1:]), "mhc")
    found = measure_errors(column, case)
    assert found.pop(f"pre.{output}") == pytest.approx(1e-3, rel=1e-2)
    assert max(v for k, v in found.items() if not k.startswith("chain.")) < 1e-4


def test_a_perturbed_gradient_shows_with_its_size_and_nowhere_else():
    def perturbed(x, y, H_post, H_res):
        value = reference.mhc_post(x, y, H_post, H_res)
        return value + 0.01 * (y - y.detach()).unsqueeze(-2) * H_post.detach().unsqueeze(-1)

    case = Case(24, 32, dtype="fp32")
    column = EquationColumn("off", "", (FUNCTIONS[0], perturbed, FUNCTIONS[2]), "mhc")
    found = measure_errors(column, case)
    assert found.pop("post.d_y") == pytest.approx(1e-2, rel=1e-2)
    assert max(v for k, v in found.items() if not k.startswith("chain.")) < 1e-4


def test_the_transposed_H_res_that_shipped_elsewhere_shows():
    def transposed(*args, **options):
        u, H_post, H_res = reference.mhc_pre(*args, **options)
        return u, H_post, H_res.transpose(-1, -2)

    column = EquationColumn("off", "", (transposed, *FUNCTIONS[1:]), "mhc")
    assert measure_errors(column, Case(24, 32, dtype="fp32"))["pre.H_res"] > 0.1


def test_relative_error():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert accuracy.relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert math.isnan(accuracy.relative_error(torch.tensor([3.0, math.inf]), exact))
    assert accuracy.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert accuracy.relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    with pytest.raises(ValueError, match="shape"):
        accuracy.relative_error(torch.ones(2, 1), exact)


# --- the layouts of other libraries, on stand-ins ------------------------------------------------


def sinkhorn_rows_first(logits: torch.Tensor) -> torch.Tensor:
    m = torch.exp(logits)
    for _ in range(reference.ITERATIONS):
        m = m / m.sum(-1, keepdim=True)
        m = m / m.sum(-2, keepdim=True)
    return m


def mixes(flat: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor):
    """pre, post and res logits for flat [..., nC] and phi [24, nC], n = 4."""
    v = flat.float() * torch.rsqrt(flat.float().square().mean(-1, keepdim=True))
    scale = torch.cat([alpha[:1].expand(4), alpha[1:2].expand(4), alpha[2:].expand(16)])
    pre, post, res = (v @ phi.t() * scale + bias).split([4, 4, 16], -1)
    return torch.sigmoid(pre), 2 * torch.sigmoid(post), res.unflatten(-1, (4, 4))


def transformer_engine_stand_in() -> columns.Column:
    """x [s, b, C, n], phi over C-major n-minor, beta [1, 24]; x @ H_res, rows first."""

    def generate(x, phi, alpha, beta):
        assert x.is_contiguous() and phi.is_contiguous() and beta.shape == (1, 24)
        H_pre, H_post, res = mixes(x.flatten(2), phi, alpha, beta[0])
        u = (x.float() @ H_pre.unsqueeze(-1)).squeeze(-1)
        return u.to(x.dtype), H_post, sinkhorn_rows_first(res)

    def combine(f, bias, H_post, x, H_res, n):
        assert bias is None and n == 4
        out = f.float().unsqueeze(-1) * H_post.unsqueeze(-2) + x.float() @ H_res
        return out.to(x.dtype)

    module = SimpleNamespace(mhc_generate_mix_and_aggregate=generate)
    module.mhc_fused_expand_combine = combine
    return columns.TransformerEngineColumn("stand-in", module)


def tile_kernels_stand_in() -> columns.Column:
    """residual [a, b, n, C]; comb[j, k] takes stream j to k; post mix [a, b, n, 1]."""

    def norm_fn(residual, fn, weight, eps, fuse_grad_acc=True):
        flat = residual.flatten(2).float()
        return flat @ fn.t() * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)

    def split(mixed, scale, base, mult, post_value, pre_eps):
        scales = torch.cat([scale[:1].expand(4), scale[1:2].expand(4), scale[2:].expand(16)])
        pre, post, res = (mixed * scales + base).split([4, 4, 16], -1)
        pre, post = torch.sigmoid(pre) + pre_eps, torch.sigmoid(post) * post_value
        return pre.unsqueeze(-1), post.unsqueeze(-1), res.unflatten(-1, (4, 4))

    def normalize(comb, repeat, eps):
        return sinkhorn_rows_first(comb)

    def apply_mix(x, mix):
        return (x.float() * mix).sum(-2).to(x.dtype)

    def post(x, residual, post_mix, comb):
        mixed = torch.einsum("abmn,abmc->abnc", comb, residual.float())
        return (x.float().unsqueeze(-2) * post_mix + mixed).to(x.dtype)

    ops = SimpleNamespace(mhc_pre_norm_fn=norm_fn, mhc_pre_split_mixes=split)
    ops.sinkhorn_normalize, ops.mhc_pre_apply_mix, ops.mhc_post = normalize, apply_mix, post

    def mhc_pre(x, fn, scale, base, *, norm_eps, post_mult_value, pre_eps, sinkhorn_repeat):
        mixed = norm_fn(x, fn, None, norm_eps)
        pre, post_mix, comb = split(mixed, scale, base, 4, post_mult_value, pre_eps)
        return apply_mix(x, pre), (post_mix, normalize(comb, sinkhorn_repeat, 1e-6))

    return columns.TileKernelsColumn("stand-in", SimpleNamespace(ops=ops, mhc_pre=mhc_pre))


def liger_stand_in() -> columns.Column:
    """x [..., HC, C], phi [HC*C, M], three scalar alphas; h_res [out, in]."""

    def coeffs(x, phi, b, alpha_pre, alpha_post, alpha_res, allow_fp32):
        assert phi.is_contiguous() and alpha_pre.ndim == 0
        alpha = torch.stack([alpha_pre, alpha_post, alpha_res])
        H_pre, H_post, res = mixes(x.flatten(-2), phi.t(), alpha, b)
        return H_pre, H_post, sinkhorn_rows_first(res)

    def pre(x, H_pre):
        return torch.einsum("ti,tic->tc", H_pre, x.float()).to(x.dtype)

    module = SimpleNamespace(liger_mhc_coeffs=coeffs, liger_mhc_pre=pre)
    module.liger_mhc_post_res = lambda x, f, post, res: reference.mhc_post(x, f, post, res)
    return columns.LigerColumn("stand-in", module)


@pytest.mark.parametrize(
    "make", [transformer_engine_stand_in, tile_kernels_stand_in, liger_stand_in]
)
def test_layouts_of_other_libraries(make):
    """Values and every gradient come back in this project's layout.

    1e-3: the order of Sinkhorn's two normalisations is visible only as far as it has not converged.
    """
    found = measure_errors(make(), Case(24, 32, dtype="fp32"))
    assert {"pre.d_phi", "pre.d_alpha", "pre.d_bias", "post.d_H_res", "chain.d_x"} <= found.keys()
    assert not any(key.startswith("post_pre.") for key in found)
    assert max(found.values()) < 1e-3


@pytest.mark.parametrize(
    ("name", "case", "words"),
    [
        ("te", Case(8, 16, variant="identity"), "Sinkhorn variant only"),
        ("te", Case(8, 16, n=2), "takes n in"),
        ("tile", Case(8, 128, dtype="fp32"), "takes bf16 streams"),
        ("tile", Case(8, 64), "multiples of 128 channels"),
        ("liger", Case(8, 16, n=3), "takes n in"),
    ],
)
def test_a_column_that_cannot_take_a_case_says_why(name: str, case: Case, words: str):
    with pytest.raises(Absent, match=words):
        columns.load(name, case, torch.device("cuda"))


# --- bytes, times, plot --------------------------------------------------------------------------


def test_floors_are_the_budgets_of_the_design():
    """n = 4: boundary 10C + 15C elements, pre then post 14C and 23C; 50 C bytes a token in bf16."""
    of = {part: floor_elements(part, 4) for part in PARTS}
    assert (of["post_pre_fwd"], of["post_pre_bwd"]) == (10, 15)
    assert of["pre_fwd"] + of["post_fwd"] == 14 and of["pre_bwd"] + of["post_bwd"] == 23
    assert Case(16384, 2560).floor_bytes("chain") == 50 * 16384 * 2560
    assert Case(3, 16, n=2, dtype="fp32").floor_bytes("chain") == 15 * 4 * 3 * 16


class SavesKnownBytes(torch.autograd.Function):
    """post that saves x, y and 3 floats a token."""

    @staticmethod
    def forward(ctx, x, y, H_post, H_res):
        ctx.save_for_backward(x, y, x.new_zeros(len(x), 3, dtype=torch.float32))
        return x + y.unsqueeze(-2)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.sum(-2), None, None


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    def pre(x, phi, alpha, bias, variant):
        return x[..., 0, :] * 1, x.new_ones(len(x), 4), None  # saves nothing

    case = Case(24, 32)
    column = EquationColumn("known", "", (pre, SavesKnownBytes.apply, None), "mhc")
    column.post_pre = None
    saved = accuracy.saved_bytes(column, make_inputs(case, CPU))
    assert saved.beyond_x_y == pytest.approx(12)
    assert saved.total == pytest.approx(5 * 32 * 2 + 12)
    assert saved.allocated is None


def test_times():
    times = Times.of([float(value) for value in range(11)], divide_by=2)
    assert (times.median, times.p10, times.p90, times.least) == (2.5, 0.5, 4.5, 0)
    assert times.spread == pytest.approx(1.6)


def test_the_fastest_copy_is_the_yardstick():
    samples = {key: [2.0, 1.0 + i, 3.0 + i] for i, key in enumerate(timing.COPIES)}
    samples["ours", "chain"] = [1e-3] * 3
    assert timing.copy_bandwidth(samples, 1 << 30) == 2 * (1 << 30) / 2.0


def example_run(copy: float | None) -> results.Run:
    run = results.Run({"device": "a test"})
    for T, C in ((4096, 7168), (4096, 1280), (16384, 2560)):
        case = Case(T, C)
        shape = results.ShapeResult(case, copy, copy and 0.004, [])
        for name, factor in (("ours", 1.5), ("te", 5.0)):
            time = factor * case.floor_bytes("chain") / 4.24e9
            column = results.ColumnResult(name, times={"chain": Times.of([time])})
            shape.columns.append(column)
        shape.columns.append(results.ColumnResult("tile", absent="not installed"))
        run.shapes.append(shape)
    return run


def test_table_and_json_give_fractions_of_the_floor():
    run = example_run(copy=4.24e9)
    text = results.table(run)
    assert "copy kernel 4.24 TB/s, floor of the chain 0.346 ms" in text
    assert f"{1.5 * 50 * 4096 * 7168 / 4.24e9:.4f}" in text  # milliseconds of ours
    assert "67 %" in text and "20 %" in text
    assert text.count("absent: tile: not installed") == 3
    ours = results.as_json(run)["shapes"][0]["columns"]["ours"]
    assert ours["ms"]["chain"]["of_floor"] == pytest.approx(1 / 1.5)
    assert ours["ms"]["chain"]["gb_s"] == pytest.approx(4240 / 1.5)


def test_a_result_that_is_not_finite_stays_visible(tmp_path: Path):
    run = example_run(copy=None)
    run.shapes[0].columns[0].errors = {"pre.u": 1e-3, "pre.d_x": math.nan}
    assert "nan pre.d_x" in results.table(run)
    results.write(run, tmp_path)
    found = json.loads((tmp_path / "bench_kernels.json").read_text())["shapes"][0]
    assert found["columns"]["ours"]["errors"]["pre.d_x"] == "nan"


def test_plot_draws_the_floor_and_every_column_on_log_axes():
    from matplotlib.figure import Figure

    run = example_run(copy=4.24e9)
    shapes = sorted(run.shapes, key=lambda shape: shape.case.T * shape.case.C)
    axis = Figure().subplots()
    results._draw(axis, shapes, relative=False)
    assert axis.get_xscale() == axis.get_yscale() == "log"
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines) == [results._FLOOR, "mhc_kernels", "Transformer Engine"]
    floor, ours = (line.get_ydata() for line in list(lines.values())[:2])
    assert floor[1:-1] == pytest.approx([shape.floor("chain") for shape in shapes])
    assert ours == pytest.approx([1.5 * value for value in floor[1:-1]])
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["4096x1280", "4096x7168", "16384x2560"]


def test_the_chain_is_eight_sublayers_with_their_own_parameters():
    inputs = make_inputs(Case(8, 16), CPU)
    assert SUBLAYERS == len(inputs.params) == 8
    assert not torch.equal(inputs.params[0].phi, inputs.params[1].phi)
