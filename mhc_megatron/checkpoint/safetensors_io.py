"""Folders of safetensors as Hugging Face writes them: headers, index, one tensor at a time.

A file is an 8-byte little-endian header length N, N bytes of JSON (name -> dtype, shape,
data_offsets), then the tensors' bytes without gaps (huggingface/safetensors, README "Format"). The
reader checks all of that before it trusts a number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_megatron.checkpoint.recipes import Output, Region, Source, TensorInfo
from mhc_megatron.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: The format's own limit.
MAX_HEADER = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, first byte, number of bytes."""

    path: str
    info: TensorInfo
    start: int
    length: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file.

    Raises:
        UserError: truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise UserError(f"{path} is truncated or not a safetensors file.")
            header = json.loads(f.read(length).decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} has a damaged header.") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} has a damaged header.")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    try:
        dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
        start, end = value["data_offsets"]
        numbers = (*shape, start, end)
        if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a damaged header: the entry of {name!r}.") from error
    info = TensorInfo(shape, dtype)
    if end - start != info.nbytes:
        raise UserError(f"{path} has a damaged header: {name!r} does not fit its bytes.")
    return Entry(str(path), info, base + start, end - start)


def _check_layout(path: Path, entries: dict[str, Entry], base: int, size: int) -> None:
    """Tensors follow one another and fill the file."""
    end = base
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.length)):
        if entry.start != end:
            raise UserError(f"{path} has a damaged header: tensors overlap or leave gaps.")
        end += entry.length
    if end != size:
        what = "truncated" if end > size else "longer than its tensors"
        raise UserError(f"{path} is {what}: {size} bytes where the header names {end}.")


class SafetensorsSource(Source):
    """A folder of safetensors (or one file); nothing but headers is read until ``read``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        for file in self.files():
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise UserError(f"{self.path}: the tensor {name!r} is in two files.")
                self.entries[name] = entry
        self._check_index()

    def files(self) -> list[Path]:
        """The files with tensors, by name."""
        if self.path.is_file():
            return [self.path]
        index = self._index()
        if index is None:
            found = sorted(self.path.glob("*.safetensors"))
            if not found:
                raise UserError(f"{self.path} holds no safetensors.")
            return found
        names = sorted(set(index.values()))
        for name in names:
            if not (self.path / name).exists():
                raise UserError(f"{self.path}: the shard {name} is missing ({INDEX} names it).")
        return [self.path / name for name in names]

    def _index(self) -> dict[str, str] | None:
        path = self.path / INDEX
        if self.path.is_file() or not path.exists():
            return None
        try:
            weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not all(isinstance(v, str) and "/" not in v for v in weights.values()):
                raise ValueError
            return weights
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{path} is damaged.") from error

    def _check_index(self) -> None:
        index = self._index()
        if index is None:
            return
        for name, file in index.items():
            if name not in self.entries:
                raise UserError(f"{self.path}: {name!r} is missing from {file} ({INDEX} names it).")
        extra = sorted(set(self.entries) - set(index))
        if extra:
            raise UserError(f"{self.path}: {INDEX} does not name {extra[0]!r}.")

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return {name: entry.info for name, entry in self.entries.items()}

    def read(self, region: Region) -> Tensor:
        """A tensor, or consecutive rows of one; no more than that is read."""
        entry = self.entries[region.key]
        shape, start, length = entry.info.shape, entry.start, entry.length
        if region.offset is not None and region.size is not None:
            row = length // shape[0] if shape and shape[0] else 0
            start, length = start + region.offset[0] * row, region.size[0] * row
            shape = tuple(region.size)
        data = torch.empty(length, dtype=torch.uint8)
        with open(entry.path, "rb", buffering=0) as f:
            f.seek(start)
            read_into(f, data, entry.path)
        return data.view(entry.info.dtype).view(shape)


def read_into(file: Any, data: Tensor, path: str) -> None:
    """Fill ``data`` (uint8) from ``file``."""
    view, done = memoryview(data.numpy()), 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise UserError(f"{path} is truncated.")
        done += count


def write_file(path: Path, outputs: Sequence[Output], tensors: Iterator[Tensor]) -> dict[str, Any]:
    """Write one file, a tensor at a time; the header is known before the tensors are.

    Returns its record: sha256 and bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in outputs:
        end = at + TensorInfo(output.shape, output.dtype).nbytes
        header[output.key] = {
            "dtype": NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as f:
        for part in (len(text).to_bytes(8, "little"), text):
            f.write(part)
            digest.update(part)
        for tensor in tensors:
            data = tensor.contiguous().flatten().view(torch.uint8).numpy()
            f.write(data)
            digest.update(data)
        f.flush()
        os.fsync(f.fileno())
        size = f.tell()
    return {"sha256": digest.hexdigest(), "bytes": size}


def index_of(files: dict[str, list[Output]]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    outputs = [output for listed in files.values() for output in listed]
    total = sum(TensorInfo(output.shape, output.dtype).nbytes for output in outputs)
    weights = {output.key: name for name, listed in files.items() for output in listed}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
