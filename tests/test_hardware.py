"""Peak rates by the names that devices have."""

from __future__ import annotations

import pytest

from mhc_megatron.hardware import peak_tflops

HOPPER = (989.4, 1978.9)
#: torch.cuda.get_device_name() -> bf16, fp8.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": (312.0, None),
    "NVIDIA A100 80GB PCIe": (312.0, None),
    "NVIDIA A800-SXM4-80GB": (312.0, None),
    "NVIDIA H100 80GB HBM3": HOPPER,
    "NVIDIA H100 PCIe": (756.0, 1513.0),
    "NVIDIA H100 NVL": (835.0, 1671.0),
    "NVIDIA H200": HOPPER,
    "NVIDIA H200 NVL": (835.5, 1670.5),
    "NVIDIA H800": HOPPER,
    "NVIDIA H800 PCIe": (756.0, 1513.0),
    "NVIDIA H20": (148.0, 296.0),
    "NVIDIA H20-3e": (148.0, 296.0),
    "NVIDIA GH200 480GB": HOPPER,
    "NVIDIA B200": (2250.0, 4500.0),
    "NVIDIA GB200": (2500.0, 5000.0),
    "NVIDIA RTX A1000": (None, None),
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": (None, None),
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb": (None, None),
    "cpu": (None, None),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks(name: str) -> None:
    assert (peak_tflops(name), peak_tflops(name, fp8=True)) == PEAKS[name]
