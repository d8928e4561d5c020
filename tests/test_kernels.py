"""The kernels without a GPU: numerics through Triton's interpreter, compilation for three GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import kernel_cases  # noqa: E402
from compile_kernels import Usage, compile_call, record  # noqa: E402

import mhc_kernels  # noqa: E402
from mhc_kernels import launch, reference, tuning  # noqa: E402

ROOT = Path(__file__).parents[1]
#: Relative errors allowed: outputs and gradients of half-precision streams, of float32 ones.
LIMITS = {"bfloat16": 2.5e-2, "float16": 2e-3, "float32": 2e-6}
#: Bytes of shared memory a block may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def interpreted() -> list[dict]:
    """The tester's lines, from a process of its own: the interpreter is chosen at import."""
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "kernel_cases.py")],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("number", range(len(kernel_cases.INTERPRETER_CASES)))
def test_values_and_gradients_in_the_interpreter(interpreted, number):
    line = interpreted[number]
    limit = LIMITS[line["case"]["dtype"]]
    assert len(line["errors"]["kernels"]) >= 14
    for name, error in line["errors"]["kernels"].items():
        # The interpreter cuts bfloat16 off where the hardware rounds: twice eager's error.
        assert error < max(limit, 3 * line["errors"]["eager"][name]), (name, error)


@pytest.mark.parametrize("number", range(len(kernel_cases.INTERPRETER_CASES)))
def test_a_refill_gives_the_forwards_bits(interpreted, number):
    same = interpreted[number]["refilled"]
    assert len(same) == 5 and all(same.values()), same


def flat_calls(n: int, C: int, variant: str, dtype: torch.dtype, norm: bool, alone: bool):
    """Runs the launches of a boundary, forward and backward; ``alone``: of a pre and a post too."""
    T, K = 96, reference.phi_rows(n, variant)
    x, y = torch.zeros(T, n, C, dtype=dtype), torch.zeros(T, C, dtype=dtype)
    phi, bias = torch.zeros(K, n * C), torch.zeros(K)
    alpha = torch.zeros(reference.alpha_size(variant))
    weight = torch.zeros(C) if norm else None
    H_post = torch.zeros(T, n)
    H_res = None if variant == "identity" else torch.zeros(T, n, n)

    def run():
        s = launch.plan(x, variant)
        _, projected, gram = launch.project(s, x, y, None, H_post, H_res, phi, norm)
        _, _, _, p, inverse_rms, gram, _ = launch.read(
            s, x, projected, gram, alpha, bias, weight, 20, 1e-20, 1e-6
        )
        logits = launch.logits_grad(
            s, x, y, H_post, H_res, phi, alpha, bias, weight, p, inverse_rms, gram, 20, 1e-6
        )
        launch.phi_grad(s, x, logits, alpha)
        launch.boundary_grad(s, x, y, None, H_post, H_res, x, y, phi, weight, logits)
        launch.post(s, x, y, None, H_post, H_res)
        if alone:
            launch.project(s, x, None, None, None, None, phi, norm)
            launch.boundary_grad(s, x, None, None, None, None, x, y, phi, weight, logits)
            launch.boundary_grad(s, x, y, None, H_post, H_res, x)
        if norm and not s.hopper:
            launch.norm_weight_grad(s, x, y, logits.token, weight)

    return run


def refill_calls(L: int, variant: str, dtype: torch.dtype):
    """Launches of a block's refill, its first read included, every other y with a bias."""
    T, n, C = 96, 4, 2560
    x, y, u = torch.zeros(T, n, C, dtype=dtype), torch.zeros(T, C, dtype=dtype), torch.zeros(T, C)
    H, H_res = torch.zeros(T, n), torch.zeros(T, n, n)

    def run():
        launch.refill(
            launch.plan(x), x, [y] * L, [y[0] if i % 2 else None for i in range(L)], [H] * L,
            None if variant == "identity" else [H_res] * L, [H] * (L + 1),
            [u if i % 2 else None for i in range(L + 1)], [x] * L, [u.to(dtype)] * (L + 1),
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    "L, variant",
    [(0, "mhc"), (3, "mhc"), (3, "identity"), pytest.param(9, "mhc", marks=pytest.mark.slow)],
)
def test_refill_compiles(monkeypatch, L, variant):
    calls = record(monkeypatch, 90, refill_calls(L, variant, torch.bfloat16))
    assert len(calls) == max(1, -(-L // launch.REFILL_LAYERS))
    for call in calls:
        check(compile_call(call, 90), 90, stack=16)


def check(usage: Usage, arch: int, stack: int) -> None:
    assert usage.stack <= stack, usage
    assert usage.shared <= SHARED[arch], usage
    assert usage.registers <= 255, usage


#: Bytes of stack a thread may use: none to speak of where the kernels are tuned. What compute
#: capability 8.0 spills is recorded here so that it does not grow unseen.
STACK = {80: 900, 90: 16, 100: 128}


@pytest.mark.parametrize("arch, norm", [(80, False), (90, False), (90, True), (100, False)])
def test_compiles_within_registers_and_shared_memory(monkeypatch, arch, norm):
    """The tuned case: mhc, n = 4, bfloat16, without and (Hopper) with a fused norm."""
    calls = record(monkeypatch, arch, flat_calls(4, 2560, "mhc", torch.bfloat16, norm, arch == 90))
    names = {call[0].__name__ for call in calls}
    assert ("boundary_grad_hopper_kernel" in names) == (arch == 90)
    for call in calls:
        check(compile_call(call, arch), arch, STACK[arch])


@pytest.mark.parametrize(
    "n, variant, dtype, norm",
    [
        (4, "identity", torch.bfloat16, False),
        (4, "birkhoff", torch.float16, False),
        (2, "hc", torch.float32, True),
    ],
)
def test_compiles_other_cases(monkeypatch, n, variant, dtype, norm):
    """What the interpreter cannot see: that every branch passes the compiler."""
    calls = record(monkeypatch, 90, flat_calls(n, 48, variant, dtype, norm, False))
    for call in calls:
        check(compile_call(call, 90), 90, stack=128)


@pytest.mark.parametrize("variant", ["mhc", "identity"])
def test_forward_and_refill_round_alike(monkeypatch, variant):
    """Of a b + c d the compiler may fuse either product, in each kernel another one: not here."""
    calls = record(monkeypatch, 90, flat_calls(4, 256, variant, torch.bfloat16, False, False))
    monkeypatch.undo()
    calls += record(monkeypatch, 90, refill_calls(1, variant, torch.bfloat16))
    for call in calls:
        if call[0].__name__ in ("post_project_hopper_kernel", "post_kernel", "refill_kernel"):
            usage = compile_call(call, 90)
            mixes = 4 * (4 if variant == "mhc" else 1)
            # At least one for each product of a mix and of each element that a thread holds.
            assert usage.named_fmas >= mixes and usage.named_fmas % mixes == 0, usage
        elif call[0].__name__ == "read_kernel":
            assert compile_call(call, 90).named_fmas >= 4


def forward_launches(T: int) -> None:
    """project and post of T tokens."""
    x, y = torch.zeros(T, 4, 64, dtype=torch.bfloat16), torch.zeros(T, 64, dtype=torch.bfloat16)
    H_post, H_res, phi = torch.zeros(T, 4), torch.zeros(T, 4, 4), torch.zeros(24, 256)
    launch.post(launch.plan(x), x, y, None, H_post, H_res)
    launch.project(launch.plan(x), x, y, None, H_post, H_res, phi, False)


def test_a_new_T_compiles_nothing(monkeypatch):
    """Launch shapes are the same whatever T is: constants and options must not see it."""
    seen = []
    for T in (1, 16, 4096, 5000):
        with monkeypatch.context() as patch:
            calls = record(patch, 90, partial(forward_launches, T))
        seen.append([(call[0].__name__, sorted(call[2].items())) for call in calls])
    assert all(constants == seen[0] for constants in seen)


@pytest.mark.parametrize("C", [1024, 1280, 1920, 2560, 4096, 7168, 16, 48, 8176])
def test_blocks_divide_the_channels(C):
    for kernel in tuning.DEFAULTS:
        for n, itemsize in ((4, 2), (2, 4), (8, 2)):
            block = tuning.block(kernel, n, C, itemsize, 90)
            over = -C % block.BC
            allowed = 0.1 * C if kernel in tuning.MASKED else 0
            assert kernel == "logits_grad" or (over <= allowed and block.BC >= 16)


def test_parts_fill_the_gpu_once():
    assert tuning.parts(tiles=256, chunks=80, most=16, slots=264) == 1
    assert tuning.parts(tiles=64, chunks=40, most=16, slots=264) == 4
    assert tuning.parts(tiles=1, chunks=3, most=16, slots=264) == 3


def test_on_a_cpu_the_reference_runs_and_says_so_once():
    case = kernel_cases.Case(4, 16, 3, dtype="float32")
    inputs = kernel_cases.make_inputs(case, "cpu")
    mhc_kernels.functions._said.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = kernel_cases.values_and_gradients(mhc_kernels, inputs, "mhc")
    messages = [str(w.message) for w in caught if "mhc_kernels" in str(w.message)]
    assert len(messages) == 1 and "not on a CUDA device" in messages[0]
    eager = kernel_cases.values_and_gradients(reference, inputs, "mhc")
    assert all(torch.equal(ours[name], eager[name]) for name in eager)


def test_refill_is_post_and_read():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 16, generator=generator)
    y = [torch.randn(3, 16, generator=generator) for _ in range(2)]
    H = [torch.rand(3, 4, generator=generator) for _ in range(4)]
    res = [torch.rand(3, 4, 4, generator=generator) for _ in range(2)]
    streams, reads = mhc_kernels.mhc_refill(x, y, H[:2], res, H[2:])
    for layer in range(2):
        x = reference.mhc_post(x, y[layer], H[layer], res[layer])
        assert torch.equal(streams[layer], x)
        assert torch.allclose(reads[layer], (H[2 + layer].unsqueeze(-1) * x).sum(-2), atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"phi0": torch.zeros(23, 64)}, "phi must be [24, 64]"),
        ({"alpha0": torch.zeros(2)}, "alpha must be [3]"),
        ({"bias0": torch.zeros(3)}, "bias must be [24]"),
    ],
)
def test_wrong_parameters_are_named(change, message):
    inputs = kernel_cases.make_inputs(kernel_cases.Case(4, 16, 3, dtype="float32"), "cpu") | change
    with pytest.raises(ValueError) as caught:
        mhc_kernels.mhc_pre(inputs["x"], inputs["phi0"], inputs["alpha0"], inputs["bias0"])
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_compiler_sees_one_op_each(monkeypatch):
    """Forward and backward traced without a break; the kernels stand still, no value is looked at.

    Untraced, the functions behind the ops run without them.
    """
    from mhc_kernels import functions

    monkeypatch.setattr(functions, "INTERPRETED", True)
    T, n, C = 8, 4, 64
    half = {"dtype": torch.bfloat16, "requires_grad": True}
    x, y = torch.zeros(T, n, C, **half), torch.zeros(T, C, **half)
    params = [torch.zeros(s, requires_grad=True) for s in ((24, n * C), (3,), (24,))]
    seen = []

    def chain(x, y, *params):
        x, u, H_post, H_res = mhc_kernels.mhc_enter(x, *params)
        x, u, H_post, H_res = mhc_kernels.mhc_post_pre(x, y + u, H_post, H_res, *params)
        again, _, _ = mhc_kernels.mhc_pre(x, *params)
        return mhc_kernels.mhc_post(x, u + again, H_post, H_res)

    def look(graph, _):
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph

    def run():
        with torch._dynamo.config.patch(disable=False):
            for backend in (look, "aot_eager"):
                torch._dynamo.reset()
                compiled = torch.compile(chain, fullgraph=True, backend=backend)
                compiled(x, y, *params).sum().backward()
        x_last = chain(x, y, *params)
        assert x_last.grad_fn.name() == "PostBackward"
        x_last.sum().backward()

    assert len(record(monkeypatch, 90, run)) > 20
    assert {f"mhc_kernels.{name}.default" for name in ("post_pre", "pre", "post")} <= seen[0]
    assert x.grad.shape == x.shape
