"""Later launches of a kernel, without what Triton works out anew for each.

``kernel[grid](...)`` binds the arguments to names, describes each as its compiler would see it,
looks the binary up by a string of all that and has a descriptor made for every tensor that needs
one: more Python than the rest of a launch. Here a shorter key finds what an earlier launch came to
and a descriptor is made once for an address. The key holds no less than Triton's; what it cannot
hold, what a profiler watches and what a Triton not in ``KNOWN`` runs goes the long way.
"""

from __future__ import annotations

import inspect
from functools import partial

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.runtime import driver

#: Releases whose ``JITFunction.run`` and ``CudaLauncher`` were read for this.
KNOWN = ("3.6.0",)
#: Tile descriptors that a binary keeps, a few hundred bytes each.
DESCRIPTORS = 4096


def relaunched(kernel):
    """Decorates a ``jit`` function, whose call stays ``kernel[grid](*operands, **constants)``."""
    known = triton.__version__.split("+")[0] in KNOWN and not knobs.runtime.interpret
    return Relaunched(kernel) if known else kernel


class Relaunched:
    """A kernel, and its binaries by what tells their launches apart."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.binaries: dict[tuple, Binary] = {}

    def __getitem__(self, grid: tuple[int, ...]):
        return partial(self._launch, grid)

    def __getattr__(self, name: str):
        return getattr(self.kernel, name)

    def _launch(self, grid: tuple[int, ...], /, *operands, **constants) -> None:
        active = driver.active
        device = active.get_current_device()
        key, values = _described(operands)
        if key is None or self.kernel.pre_run_hooks or _watched():
            self.kernel[grid](*operands, **constants)
            return
        key = (device, *key, *constants, *constants.values(), *_settings())
        binary = self.binaries.get(key)
        if binary is None:
            compiled = self.kernel[grid](*operands, **constants)
            names = self.kernel.arg_names[len(operands) :]
            if compiled is not None:  # None where a hook of Triton's cache keeps it from compiling
                self.binaries[key] = Binary(compiled, [constants[name] for name in names])
        else:
            binary.launch(grid, active.get_current_stream(device), values)


class Binary:
    """A compiled kernel and what of its launch stays as it is."""

    def __init__(self, compiled, constants: list) -> None:
        self.run, self.head = compiled.run, (compiled.function, compiled.packed_metadata)
        # The launcher takes every parameter in its place; a constant's value is not looked at.
        self.tail = constants
        described = enumerate(compiled.src.signature.values())
        places = [i for i, t in described if isinstance(t, str) and t.startswith("tensordesc")]
        # Without metadata the compiler made pointers of the descriptors (before Hopper).
        metadata = getattr(compiled.metadata, "tensordesc_meta", None)
        self.tiled = list(zip(places, metadata)) if metadata else []
        self.made: dict[tuple, list] = {}
        if self.tiled:
            # The launcher that wants descriptors made already, inside the one that makes them.
            self.inner = inspect.getclosurevars(self.run.launch).nonlocals["launcher"]

    def launch(self, grid: tuple[int, ...], stream: int, values: list) -> None:
        sizes = grid[0], grid[1] if len(grid) > 1 else 1, 1
        function, metadata = self.head
        run = self.run
        if not self.tiled or run.global_scratch_size or run.profile_scratch_size:
            run(*sizes, stream, function, metadata, None, None, None, *values, *self.tail)
            return
        # The four without a value: scratch memory, which is none, launch metadata and hooks.
        self.inner(
            *sizes, stream, function, run.launch_cooperative_grid, run.launch_pdl, None, None,
            metadata, None, None, None, *self._with_descriptors(values), *self.tail,
        )  # fmt: skip

    def _with_descriptors(self, values: list) -> list:
        """The values, with each descriptor as the launcher takes it: a map, sizes and strides."""
        out, done, made = [], 0, self.made
        for place, metadata in self.tiled:
            out += values[done:place]
            done = place + 1
            known = place, values[place].tiles, values[place].base.data_ptr()
            descriptor = made.get(known)
            if descriptor is None:
                if len(made) >= DESCRIPTORS:
                    made.clear()
                descriptor = made[known] = make_tensordesc_arg(values[place], metadata)
            out += descriptor
        return out + values[done:]


def _described(operands: tuple) -> tuple[list | None, list]:
    """What of the operands a binary depends on, or None for the long way; and what is passed."""
    key, values = [], []
    for value in operands:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            # An address in place of a tensor spares the launcher asking the driver whose it is.
            value, dtype = value.data_ptr(), value.dtype
            key.append(dtype)
            if value % 16:
                key.append("unaligned")
        elif value is None or kind is float:
            key.append(kind)
        elif kind is int:
            # Triton makes 1 a constant, looks for a factor of 16 and widens what needs 64 bits.
            key.append((value == 1) + 2 * (value % 16 == 0) + 4 * (value >> 31))
        elif hasattr(value, "tiles"):
            key.append(value.tiles.kind)
        else:
            return None, values
        values.append(value)
    return key, values


def _watched() -> bool:
    """Whether somebody wants to hear of launches: a chain of hooks, or one in its place."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _settings() -> tuple:
    """Settings of Triton's that make other binaries and may change between launches."""
    return knobs.runtime.debug, knobs.compilation.instrumentation_mode


class Tiles:
    """Descriptors of tensors that differ in their address alone; Triton checks the first."""

    def __init__(self, descriptor: type, base: Tensor, **fields) -> None:
        self.descriptor = descriptor
        self.fields = vars(descriptor(base, **fields)) | {"base": None, "tiles": self}
        self.kind = f"{base.dtype}, {fields['block_shape']}, {fields.get('layout')}"

    def of(self, base: Tensor):
        """A descriptor of ``base``, which starts at a multiple of 16 bytes."""
        descriptor = object.__new__(self.descriptor)
        descriptor.__dict__ = {**self.fields, "base": base}
        return descriptor
