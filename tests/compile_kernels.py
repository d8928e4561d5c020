"""Compiles every launch of the kernels for a named GPU architecture on a machine without a GPU.

``launch`` runs on CPU tensors with its kernels replaced by recorders; what they were called with
becomes a signature for Triton's compiler, and cuobjdump, which Triton ships, reads the registers,
the stack (spills) and the shared memory of the binary.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from mhc_kernels import launch
from mhc_kernels.relaunch import Relaunched

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


@dataclass
class Usage:
    """What a compiled kernel takes of a multiprocessor."""

    kernel: str
    registers: int
    stack: int
    shared: int
    #: Fused multiply-adds that the source asks for by name.
    named_fmas: int


class Recorder:
    """Stands for a kernel: ``kernel[grid](...)`` keeps the call."""

    def __init__(self, kernel, calls: list) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


def record(monkeypatch, arch: int, run) -> list:
    """The kernel calls that ``run()`` would make on a GPU of this architecture."""
    calls: list = []
    monkeypatch.setattr(launch, "_device", lambda index: (arch, 132))
    for name in dir(launch):
        if name.endswith("_kernel"):
            kernel = getattr(launch, name)
            kernel = kernel.kernel if isinstance(kernel, Relaunched) else kernel
            monkeypatch.setattr(launch, name, Recorder(kernel, calls))
    run()
    return calls


def _type(value) -> str | tuple[str, ...]:
    if isinstance(value, tuple):
        return tuple(map(_type, value))
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool) or value is None:
        return "constexpr"
    if isinstance(value, (int, float)):
        return "i32" if isinstance(value, int) else "fp32"
    layout = getattr(value, "layout", None)
    inner = f"{TYPES[value.base.dtype]}{list(value.block_shape)}"
    return f"tensordesc<{inner}>" if layout is None else f"tensordesc<{inner},{layout!r}>"


def compile_call(call, arch: int) -> Usage:
    """Compiles a recorded call for sm_``arch``."""
    kernel, args, kwargs = call
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False))
    options = {k: v for k, v in kwargs.items() if k not in names}
    values |= {k: v for k, v in kwargs.items() if k in names}
    constant = {p.name for p in kernel.params if p.is_constexpr}
    signature = {
        name: "constexpr" if name in constant else _type(values[name]) for name in names
    }
    constants = {name: values[name] for name in names if signature[name] == "constexpr"}
    aligned = {}
    for i, name in enumerate(names):
        if isinstance(signature[name], tuple):
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(len(signature[name]))}
        elif signature[name][0] == "*":
            aligned[i,] = [["tt.divisibility", 16]]
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    binary = triton.compile(
        source(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    resources = *_resources(binary.asm["cubin"]), binary.metadata.shared
    named = re.findall(r"call .*@llvm\.fma\.", binary.asm["llir"])
    return Usage(kernel.__name__, *resources, len(named))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match, text
    return int(match[1]), int(match[2])
