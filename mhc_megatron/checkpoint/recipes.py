"""What a converted tensor is made of: regions of source tensors and one operation.

A plan of a conversion is data: a list of ``Output``, each with its ``Recipe``. Nothing is read
before the plan is complete, so a wrong name or shape is found before anything is written, and a
plan can be cut into files that several processes write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mhc_megatron.errors import UserError

#: Side of the square blocks that share a scale in fp8 weights (DeepSeek-V3's layout).
FP8_BLOCK = 128


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Region:
    """A tensor of a source, or a box of it; ``squeeze`` leading axes of length one are dropped.

    ``scale`` names the scales of an fp8 weight; it is then read as bfloat16.
    """

    key: str
    offset: tuple[int, ...] | None = None
    size: tuple[int, ...] | None = None
    squeeze: int = 0
    scale: str = ""


class Source(Protocol):
    """Where tensors come from: a folder of safetensors or a torch_dist checkpoint."""

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor."""

    def read(self, region: Region) -> Tensor:
        """One region, nothing more."""


@dataclass(frozen=True)
class Recipe:
    """An operation of ``OPERATIONS``, its inputs and its options; ``then`` is one on its result."""

    op: str
    inputs: tuple[Region, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    then: str = ""


@dataclass(frozen=True)
class Output:
    """One tensor that is written, or one box of a larger one (``offset`` in ``size``).

    ``report`` asks for the error of the cast to ``dtype`` to be measured.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    recipe: Recipe
    offset: tuple[int, ...] | None = None
    size: tuple[int, ...] | None = None
    report: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class CastError:
    """Squared norms of a cast's error and of the tensor."""

    error: float = 0.0
    norm: float = 0.0

    @property
    def relative(self) -> float:
        """Relative error in the Frobenius norm."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


def make(output: Output, source: Source) -> tuple[Tensor, CastError | None]:
    """The tensor of an output, in its dtype and shape, and the error of its cast if asked for.

    Raises:
        UserError: the recipe gives another shape than the plan says.
    """
    inputs = [_read(region, source) for region in output.recipe.inputs]
    value = OPERATIONS[output.recipe.op](inputs, **output.recipe.options)
    del inputs
    if value.numel() != math.prod(output.shape) and not output.recipe.then:
        raise UserError(
            f"{output.key} should have shape {list(output.shape)}, not {list(value.shape)}."
        )
    if output.recipe.then:
        return _quantized(output, value)
    value = value.reshape(output.shape)
    if value.dtype == output.dtype:
        return value, None
    cast = value.to(output.dtype)
    return cast, _cast_error(value, cast) if output.report else None


def _quantized(output: Output, value: Tensor) -> tuple[Tensor, CastError | None]:
    result = OPERATIONS[output.recipe.then]([value])
    if not output.report:
        return result, None
    restored = fp8_value([result, fp8_scale([value])], dtype=torch.float32)
    return result, _cast_error(value, restored)


def _read(region: Region, source: Source) -> Tensor:
    value = source.read(region)
    if region.scale:
        return fp8_value([value, source.read(Region(region.scale))], dtype=torch.bfloat16)
    return value.reshape(value.shape[region.squeeze :]) if region.squeeze else value


def _cast_error(value: Tensor, cast: Tensor, rows: int = 1 << 22) -> CastError:
    """In blocks, so that no second copy of the tensor is made in float64."""
    total = CastError()
    for a, b in zip(value.flatten().split(rows), cast.flatten().split(rows), strict=True):
        wide = a.double()
        total.error += (b.double() - wide).square().sum().item()
        total.norm += wide.square().sum().item()
    return total


# ------------------------------------------------------------------------------------ operations


def copy(inputs: list[Tensor]) -> Tensor:
    """The one input as it is."""
    return inputs[0]


def cat(inputs: list[Tensor]) -> Tensor:
    """Inputs one after the other along the first axis."""
    return torch.cat([torch.atleast_1d(x) for x in inputs])


def rows(inputs: list[Tensor], *, start: int, stop: int) -> Tensor:
    """Rows start..stop of the input."""
    return inputs[0][start:stop].clone()


def permute_rows(inputs: list[Tensor], *, order: list[int]) -> Tensor:
    """Row ``order[k]`` of the input becomes row k."""
    return inputs[0][torch.tensor(order)]


def merge_qkv(inputs: list[Tensor], *, groups: int) -> Tensor:
    """q, k, v of Hugging Face -> Megatron's linear_qkv: each group's queries, key, value."""
    parts = [x.unflatten(0, (groups, x.shape[0] // groups)) for x in inputs]
    return torch.cat(parts, dim=1).flatten(0, 1)


def part_qkv(
    inputs: list[Tensor], *, part: str, groups: int, queries: int, channels: int
) -> Tensor:
    """The inverse of ``merge_qkv``: part ``q``, ``k`` or ``v``; ``queries`` heads a group."""
    begin, end = {
        "q": (0, queries * channels),
        "k": (queries * channels, (queries + 1) * channels),
        "v": ((queries + 1) * channels, (queries + 2) * channels),
    }[part]
    grouped = inputs[0].unflatten(0, (groups, (queries + 2) * channels))
    return grouped[:, begin:end].flatten(0, 1)


def values(inputs: list[Tensor], *, data: list[float]) -> Tensor:
    """A constant vector, float32."""
    return torch.tensor(data, dtype=torch.float32)


def zeros(inputs: list[Tensor], *, shape: list[int]) -> Tensor:
    """Zeros, float32."""
    return torch.zeros(shape)


def mean(inputs: list[Tensor], *, weights: list[float]) -> Tensor:
    """Weighted sum, summed in float64 block by block and returned in the inputs' dtype."""
    flat = [x.flatten() for x in inputs]
    out = torch.empty_like(flat[0])
    for at in range(0, len(out), 1 << 22):
        total = sum(w * x[at : at + (1 << 22)].double() for w, x in zip(weights, flat, strict=True))
        out[at : at + (1 << 22)] = total.to(out.dtype)
    return out.view(inputs[0].shape)


def fp8_scale(inputs: list[Tensor]) -> Tensor:
    """The scales of an fp8 weight: largest magnitude of a block of 128 x 128 over 448, float32."""
    blocks = _blocks(inputs[0].float())
    largest = blocks.abs().amax(dim=(1, 3))
    return torch.where(largest > 0, largest, 1.0) / torch.finfo(torch.float8_e4m3fn).max


def fp8_weight(inputs: list[Tensor]) -> Tensor:
    """The weight over its block's scale, as float8_e4m3fn."""
    weight = inputs[0].float()
    return (weight / _spread(fp8_scale(inputs), weight.shape)).to(torch.float8_e4m3fn)


def fp8_value(inputs: list[Tensor], *, dtype: torch.dtype) -> Tensor:
    """An fp8 weight times its scales, in ``dtype``."""
    weight, scale = inputs
    return (weight.float() * _spread(scale.float(), weight.shape)).to(dtype)


def _blocks(weight: Tensor) -> Tensor:
    """[o, i] -> [o/128, 128, i/128, 128], padded with zeros."""
    o, i = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -i % FP8_BLOCK, 0, -o % FP8_BLOCK))
    return padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    o, i = shape
    return scale.repeat_interleave(FP8_BLOCK, 0)[:o].repeat_interleave(FP8_BLOCK, 1)[:, :i]


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        copy,
        cat,
        rows,
        permute_rows,
        merge_qkv,
        part_qkv,
        values,
        zeros,
        mean,
        fp8_scale,
        fp8_weight,
    )
}
