"""Peak rates of GPUs by name, for MFU. An unknown GPU has none: no MFU rather than a wrong one."""

from __future__ import annotations

#: Part of ``torch.cuda.get_device_name()`` -> dense TFLOP/s (bf16, fp8), SXM parts without
#: sparsity, from the vendors' datasheets. The first match counts, so longer names come first.
PEAK_TFLOPS: dict[str, tuple[float, float | None]] = {
    "H100 PCIe": (756.0, 1513.0),
    "H800 PCIe": (756.0, 1513.0),
    "H100 NVL": (835.0, 1671.0),
    "H100": (989.4, 1978.9),
    "H200": (989.4, 1978.9),
    "H800": (989.4, 1978.9),
    "GH200": (989.4, 1978.9),
    "H20": (148.0, 296.0),
    "A100": (312.0, None),
    "A800": (312.0, None),
    "B200": (2250.0, 4500.0),
    "GB200": (2500.0, 5000.0),
}


def peak_tflops(name: str, fp8: bool = False) -> float | None:
    """Dense peak of the GPU ``name`` in TFLOP/s at bf16 (or fp8); None where unknown."""
    for part in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if part in name:
            return PEAK_TFLOPS[part][int(fp8)]
    return None
