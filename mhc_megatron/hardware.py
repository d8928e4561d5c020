"""Peak rates of GPUs by name, for MFU. An unknown GPU has none: no MFU rather than a wrong one."""

from __future__ import annotations

import re

#: Words of ``torch.cuda.get_device_name()`` -> dense TFLOP/s (bf16, fp8), SXM parts where no other
#: is named, from the vendors' datasheets (half of what they give with sparsity). The longest match
#: counts.
PEAK_TFLOPS: dict[str, tuple[float, float | None]] = {
    "H100 PCIe": (756.0, 1513.0),
    "H800 PCIe": (756.0, 1513.0),
    "H100 NVL": (835.0, 1671.0),
    "H100": (989.4, 1978.9),
    "H200 NVL": (835.5, 1670.5),
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
    """Dense peak of the GPU ``name`` in TFLOP/s at bf16 (or fp8); None where unknown.

    A MIG slice has a share of its GPU's peak that the name does not tell exactly: unknown.
    """
    if re.search(r"\bMIG\b", name):
        return None
    for part in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if re.search(rf"\b{part}\b", name):  # RTX A1000 is no A100
            return PEAK_TFLOPS[part][int(fp8)]
    return None
