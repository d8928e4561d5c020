"""Later launches of the kernels against Triton's own, with a driver that only writes down."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from test_kernels import flat_calls  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402

from mhc_kernels import coefficients, launch, relaunch  # noqa: E402
from mhc_kernels.relaunch import Relaunched  # noqa: E402


class Gpu:
    """A driver of a GPU that is not there: ``launched`` has what would reach its C launcher."""

    def __init__(self, arch: int) -> None:
        self.arch, self.device, self.stream, self.launched, self.maps = arch, 0, 7, [], 0
        gpu = self

        class Launcher(nvidia.CudaLauncher):
            def __init__(self, src, metadata) -> None:
                meta = getattr(metadata, "tensordesc_meta", None)
                self.num_ctas = metadata.num_ctas
                self.launch = nvidia.wrap_handle_tensordesc(gpu.write_down, src.signature, meta)
                for name in ("scratch_size", "scratch_align"):
                    for kind in ("global_", "profile_"):
                        setattr(self, kind + name, getattr(metadata, kind + name))
                self.launch_cooperative_grid = metadata.launch_cooperative_grid
                self.launch_pdl = metadata.launch_pdl

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (1, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            fill_tma_descriptor=self.map,
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def map(self, *arguments) -> tuple:
        self.maps += 1
        return "map", *map(str, arguments)

    def write_down(self, *arguments) -> None:
        """The arguments as C reads them, but for hooks and their metadata; calls the first hook."""
        metadata, enter = arguments[10:12]
        if enter is not None:
            enter(metadata)
        plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        plain[10:13] = []
        self.launched.append(plain)


@pytest.fixture
def gpu(monkeypatch):
    """Makes a GPU of an architecture the current one, with no binary kept from before."""

    def make(arch: int) -> Gpu:
        gpu = Gpu(arch)
        monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
        monkeypatch.setattr(launch, "_device", lambda index: (arch, 132))
        for kernel in kernels():
            monkeypatch.setattr(kernel, "binaries", {})
            caches = type(kernel.device_caches)(kernel.kernel.create_binder)
            monkeypatch.setattr(kernel.kernel, "device_caches", caches)
        return gpu

    return make


def kernels() -> list[Relaunched]:
    return [k for k in vars(launch).values() if isinstance(k, Relaunched)]


def test_this_triton_is_known():
    """With another one the kernels still run, at its pace: look at what moved, then add it."""
    assert triton.__version__.split("+")[0] in relaunch.KNOWN
    assert len(kernels()) == 11


def test_another_triton_is_left_alone(monkeypatch):
    jitted = coefficients.split_phi_kernel.kernel
    assert isinstance(relaunch.relaunched(jitted), Relaunched)
    monkeypatch.setattr(triton, "__version__", "3.7.0+git")
    assert relaunch.relaunched(jitted) is jitted


@pytest.mark.parametrize(
    "arch, n, variant, dtype, norm",
    [
        (90, 4, "mhc", torch.bfloat16, True),
        (90, 2, "birkhoff", torch.float16, True),
        (80, 4, "identity", torch.float32, False),
    ],
)
def test_a_later_launch_is_what_triton_would_launch(
    monkeypatch, gpu, arch, n, variant, dtype, norm
):
    """Every kernel of a boundary: the same numbers reach the C launcher, in the same places."""
    gpu, calls, original = gpu(arch), [], Relaunched._launch

    def recorded(self, grid, *operands, **constants):
        calls.append((self, grid, operands, constants))
        original(self, grid, *operands, **constants)

    monkeypatch.setattr(Relaunched, "_launch", recorded)
    flat_calls(n, 48, variant, dtype, norm, alone=arch == 90)()
    assert len(calls) >= 6 and all(kernel.binaries for kernel, *_ in calls)
    monkeypatch.setattr(Relaunched, "_launch", original)
    for kernel, grid, operands, constants in calls:
        gpu.launched.clear()
        kernel.kernel[grid](*operands, **constants)
        maps = gpu.maps
        with monkeypatch.context() as patch:
            patch.setattr(kernel.kernel, "run", None)  # no later launch goes through Triton's
            kernel[grid](*operands, **constants)
            made = gpu.maps - maps
            kernel[grid](*operands, **constants)
        assert gpu.maps - maps == made and len(gpu.launched) == 3
        assert gpu.launched[0] == gpu.launched[1] == gpu.launched[2]


def split(phi: torch.Tensor, out: torch.Tensor, size: int) -> None:
    coefficients.split_phi_kernel[(3,)](phi, out, size, WIDTH=16, PDL=False, launch_pdl=False)


def test_what_goes_the_long_way(monkeypatch, gpu):
    """First launches of a kind, and what somebody watches; streams and devices are looked up."""
    gpu, long = gpu(90), []
    jitted = coefficients.split_phi_kernel.kernel
    run = jitted.run
    monkeypatch.setattr(jitted, "run", lambda *a, **k: long.append(1) or run(*a, **k))
    phi, out = torch.zeros(64), torch.zeros(128, dtype=torch.bfloat16)

    def goes_long(*operands) -> bool:
        long.clear()
        split(*operands)
        return bool(long)

    assert goes_long(phi, out, 48) and not goes_long(phi, out, 48)
    assert not goes_long(phi, out, 32)  # as good a multiple of 16
    for other in ((phi, out, 47), (phi, out, 1), (phi, out, 2**31), (phi[1:], out, 48)):
        assert goes_long(*other) and not goes_long(*other)
    assert goes_long(phi.double(), out, 48)
    gpu.stream = 8
    assert not goes_long(phi, out, 48) and gpu.launched[-1][3] == 8
    gpu.device = 1
    assert goes_long(phi, out, 48) and gpu.launched[-1][3] == 108
    assert not goes_long(phi, out, 48) and gpu.launched[-1][3] == 108
    seen = []
    hook = seen.append
    knobs.runtime.launch_enter_hook.add(hook)
    assert goes_long(phi, out, 48) and seen[0].get()["name"] == "split_phi_kernel"
    knobs.runtime.launch_enter_hook.remove(hook)
    assert not goes_long(phi, out, 48)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert goes_long(phi, out, 48) and not goes_long(phi, out, 48)
    monkeypatch.setattr(jitted, "pre_run_hooks", [lambda *a, **k: None])
    assert goes_long(phi, out, 48)


def test_descriptors_are_kept_for_so_many_addresses(monkeypatch, gpu):
    gpu = gpu(90)
    monkeypatch.setattr(relaunch, "DESCRIPTORS", 6)
    flat_calls(4, 48, "mhc", torch.bfloat16, False, alone=False)()
    binary = next(iter(launch.phi_grad_kernel.binaries.values()))
    run = flat_calls(4, 48, "mhc", torch.bfloat16, False, alone=False)
    kept = [run() for _ in range(5)]
    assert len(kept) == 5 and 0 < len(binary.made) <= 6
