"""Megatron's torch_dist checkpoints, read and written without a process group.

``megatron.core.dist_checkpointing`` (0.19.2, strategies/torch.py) writes the file format of
torch.distributed.checkpoint: ``*.distcp`` files hold one ``torch.save`` archive for each chunk of a
tensor; ``.metadata`` pickles where each lies; ``metadata.json`` names the backend; the trainer's
settings are the object ``common_state/shard_0_1`` (``common.pt`` in older ones). Here chunks are
read and written one by one.

Names. A homogeneous model's layers are stacked: ``decoder.layers.mlp.linear_fc2.weight`` has the
layers as its first axis. Others have a name for each layer
(transformer/transformer_block.py:728, ``non_homogeneous_layers``). Both are shown here under
Megatron's module names (``modules``): ``decoder.layers.3.mlp.linear_fc2.weight``; the experts of a
layer likewise (``...experts.local_experts.5.linear_fc1.weight``).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import operator
import os
import pickle
import pickletools
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mhc_megatron.checkpoint.recipes import Output, Region, Source, TensorInfo
from mhc_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common_state/shard_0_1"
EXPERTS = "mlp.experts.experts."

_LAYERS = re.compile(r"((?:decoder|mtp)\.layers)\.(?!\d)(.+)")


def resolve(path: str | os.PathLike[str]) -> Path:
    """The folder with ``.metadata``: ``path`` or, below it, the latest of a run's checkpoints.

    Raises:
        UserError: neither is there.
    """
    path = Path(path)
    if (path / ".metadata").exists():
        return path
    tracker = path / TRACKER
    if tracker.exists():
        try:
            said = tracker.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise UserError(f"cannot read {tracker}: {error.strerror}.") from error
        step = re.fullmatch(r"[0-9]{1,12}", said)
        name = said if said == "release" else f"iter_{int(said):07d}" if step else ""
        if not name:
            raise UserError(f"{tracker} is damaged: it must hold an iteration or 'release'.")
        if (path / name / ".metadata").exists():
            return path / name
        raise UserError(f"{path}: {TRACKER} names {name}, which has no .metadata.")
    raise UserError(
        f"{path} is not a torch_dist checkpoint: it has neither .metadata nor {TRACKER}."
    )


def is_torch_dist(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` looks like one (or like a run's folder of them)."""
    return any((Path(path) / name).exists() for name in (".metadata", TRACKER))


class _Unpickler(pickle.Unpickler):
    """``.metadata`` needs these classes and no others; anything else is not executed."""

    ALLOWED = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("collections", "OrderedDict"),
    }
    METADATA = "torch.distributed.checkpoint.metadata"
    CLASSES = {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
    }

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in self.ALLOWED or (module == self.METADATA and name in self.CLASSES)
        if not known and not (module == "torch" and hasattr(torch, name)):
            raise pickle.UnpicklingError(f"unexpected class {module}.{name}")
        value = super().find_class(module, name)
        if module == "torch" and not isinstance(value, torch.dtype) and name != "Size":
            raise pickle.UnpicklingError(f"unexpected object torch.{name}")
        return value


class _Slice(io.RawIOBase):
    """Bytes start..start+length of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = max(min(len(view), self.length - self.at), 0)
        self.file.seek(self.start + self.at)
        count = self.file.readinto(view[:count])
        self.at += count
        return count


class TorchDistSource(Source):
    """One checkpoint; nothing but ``.metadata`` is read until ``read``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = resolve(path)
        self.metadata = read_metadata(self.path)
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.objects: list[str] = []
        for key, value in self.metadata.state_dict_metadata.items():
            if isinstance(value, TensorStorageMetadata):
                self.tensors[key] = value
            else:
                self.objects.append(key)
        self.places = {(i.fqn, _tuple(i.offset)): s for i, s in self.metadata.storage_data.items()}
        self._check_places()
        self._check_files()
        self._common: dict[str, Any] | None = None

    def _check_places(self) -> None:
        """Every chunk and object has one place in the files, and no place is of another."""
        needed = {(key, offset) for key in self.tensors for offset, _ in self.chunks(key)}
        needed |= {(key, None) for key in self.objects}
        for key, offset in sorted(needed ^ self.places.keys(), key=str):
            at = "" if offset is None else f" at {list(offset)}"
            lack = "no place in the files" if (key, offset) in needed else "a place and no shape"
            raise UserError(f"{self.path}/.metadata is damaged: {key}{at} has {lack}.")

    def check_coverage(self) -> None:
        """Every byte of the shards belongs to one chunk.

        Writers put archives one after the other. A byte left over tells that a name was lost:
        where it became another tensor's, only one of the two entries is read from ``.metadata``.

        Raises:
            UserError: bytes of no chunk, or of two.
        """
        pieces: dict[str, list[tuple[int, int]]] = {}
        for place in self.places.values():
            pieces.setdefault(place.relative_path, []).append((place.offset, place.length))
        for name, found in sorted(pieces.items()):
            end = 0
            for offset, length in [*sorted(found), ((self.path / name).stat().st_size, 0)]:
                if offset != end:
                    which = "to no tensor" if offset > end else "to two tensors"
                    raise UserError(
                        f"{self.path}/.metadata is damaged: bytes {min(offset, end)} to "
                        f"{max(offset, end)} of {name} belong {which}."
                    )
                end = offset + length

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self.places.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), end)
        for name, end in sorted(ends.items()):
            file = self.path / name
            if not file.exists():
                raise UserError(f"{self.path}: the shard {name} is missing (.metadata names it).")
            if file.stat().st_size < end:
                raise UserError(
                    f"{file} is truncated: {file.stat().st_size} bytes where .metadata names {end}."
                )

    def files(self) -> list[Path]:
        """Every file of the checkpoint."""
        return sorted(p for p in self.path.iterdir() if p.is_file())

    @property
    def common(self) -> dict[str, Any]:
        """The state that is no tensor: ``args``, ``iteration``, ``optimizer``, ..."""
        if self._common is None:
            self._common = self._read_common()
        return self._common

    @property
    def args(self) -> Namespace:
        """The trainer's settings; empty where a checkpoint has none."""
        return self.common.get("args") or Namespace()

    def _read_common(self) -> dict[str, Any]:
        if COMMON in self.objects:
            return self.read_object(COMMON)[0]
        legacy = self.path / "common.pt"
        if not legacy.exists():
            raise UserError(f"{self.path} has no common state: it is incomplete.")
        return _load(open(legacy, "rb"), legacy)

    def read_object(self, key: str) -> Any:
        """An object that is no tensor (``common_state``, ``rng_state``)."""
        return _load(io.BytesIO(self.object_bytes(key)), f"{self.path}: {key}")

    def object_bytes(self, key: str) -> bytes:
        """The same, as its ``torch.save`` archive."""
        place = self.places[(key, None)]
        with open(self.path / place.relative_path, "rb") as f:
            f.seek(place.offset)
            return f.read(place.length)

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every stored tensor, under its name in the files."""
        return {
            key: TensorInfo(tuple(value.size), value.properties.dtype)
            for key, value in self.tensors.items()
        }

    def chunks(self, key: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offsets and sizes of the boxes in which a tensor is stored."""
        return [(tuple(c.offsets), tuple(c.sizes)) for c in self.tensors[key].chunks]

    def read(self, region: Region) -> Tensor:
        """A box of a tensor, put together from the chunks it meets."""
        info = self.infos_of(region.key)
        offset = region.offset or (0,) * len(info.shape)
        size = region.size if region.size is not None else info.shape
        found = [(c, _overlap(offset, size, *c)) for c in self.chunks(region.key)]
        found = [(chunk, box) for chunk, box in found if box is not None]
        if sum(math.prod(size for _, size in box) for _, box in found) != math.prod(size):
            raise UserError(f"{self.path}: {region.key} is incomplete; chunks are missing.")
        if len(found) == 1 and found[0][0] == (tuple(offset), tuple(size)):
            return self.read_chunk(region.key, tuple(offset))
        out = torch.empty(tuple(size), dtype=info.dtype)
        for (start, _), box in found:
            chunk = self.read_chunk(region.key, start)
            inside = tuple(slice(b - s, b - s + n) for (b, n), s in zip(box, start, strict=True))
            there = tuple(slice(b - o, b - o + n) for (b, n), o in zip(box, offset, strict=True))
            out[there] = chunk[inside]
        return out

    def infos_of(self, key: str) -> TensorInfo:
        """Shape and dtype of one stored tensor."""
        value = self.tensors[key]
        return TensorInfo(tuple(value.size), value.properties.dtype)

    def read_chunk(self, key: str, offset: tuple[int, ...]) -> Tensor:
        """One stored chunk.

        The archive's checksums (CRC-32) are checked first: torch.load does not.

        Raises:
            UserError: damaged, or not what ``.metadata`` says.
        """
        place, where = self.places.get((key, offset)), f"{self.path}: {key}"
        if place is None:
            raise UserError(f"{where} at {list(offset)} has no place in the files.")
        with open(self.path / place.relative_path, "rb", buffering=0) as f:
            archive = _Slice(f, place.offset, place.length)
            check_archive(archive, where)
            archive.seek(0)
            value = _load(archive, where)
        size = dict(self.chunks(key))[offset]
        if not isinstance(value, Tensor) or value.dtype != self.infos_of(key).dtype:
            raise UserError(f"{where} is not of the dtype that .metadata says.")
        if tuple(value.shape) != size:
            raise UserError(f"{where} has shape {list(value.shape)}; .metadata says {list(size)}.")
        return value

    def modules(self) -> dict[str, tuple[Region, TensorInfo]]:
        """Module name -> where it is: the model's tensors, layer by layer and expert by expert."""
        found: dict[str, tuple[Region, TensorInfo]] = {}
        for key, info in self.infos().items():
            if key.startswith("optimizer."):
                continue
            for name, region in unstack(key, info.shape):
                shape = (region.size or info.shape)[region.squeeze :]
                found[name] = (region, TensorInfo(tuple(shape), info.dtype))
        return found


def unstack(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Region]]:
    """The module names that share a stored tensor, with their boxes."""
    stacked = _LAYERS.fullmatch(key)
    layers: list[int | None] = list(range(shape[0])) if stacked else [None]
    lead = 1 if stacked else 0
    experts: list[int | None] = [None]
    if EXPERTS in key:
        experts, lead = list(range(shape[lead])), lead + 1
    for layer in layers:
        for expert in experts:
            at = tuple(i for i in (layer, expert) if i is not None)
            name = f"{stacked[1]}.{layer}.{stacked[2]}" if stacked else key
            if expert is not None:
                name = name.replace(EXPERTS, f"mlp.experts.local_experts.{expert}.")
            if not lead:
                yield name, Region(key)
                continue
            offset = at + (0,) * (len(shape) - lead)
            yield name, Region(key, offset, (1,) * lead + tuple(shape[lead:]), lead)


def stacked_layers(source: TorchDistSource) -> int:
    """The number of layers where they are stacked, else 0."""
    for key, info in source.infos().items():
        if key.startswith("decoder.layers.") and _LAYERS.fullmatch(key):
            return info.shape[0]
    return 0


def place(
    name: str, layer: int, shape: tuple[int, ...], layers: int, stacked: bool
) -> tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]:
    """Stored name, offset and size of a layer's tensor; ``name`` has ``{l}`` for its number."""
    if not stacked:
        return name.format(l=layer), None, None
    return name.replace("{l}.", ""), (layer,) + (0,) * len(shape), (layers, *shape)


def read_metadata(path: Path) -> Metadata:
    """``.metadata`` of a checkpoint.

    Raises:
        UserError: unreadable, damaged, or holding what a checkpoint does not hold.
    """
    try:
        data = (path / ".metadata").read_bytes()
        _check_memo(data)
        metadata = _Unpickler(io.BytesIO(data)).load()
        for value in metadata.state_dict_metadata.values():
            if not isinstance(value, BytesStorageMetadata):
                _check_chunks(value)
        for index, place in metadata.storage_data.items():
            _check_place(index, place)
        return metadata
    except OSError as error:
        raise UserError(f"cannot read {path}/.metadata: {error.strerror}.") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path}/.metadata is damaged ({error}).") from error


def _check_memo(data: bytes) -> None:
    """A pickle numbers what it remembers 0, 1, 2, ...

    The unpickler makes room for any number: four bytes of damage ask for 64 GB.
    """
    remembered = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > remembered:
                raise ValueError("an object's number is too large")
            remembered += 1


def _check_chunks(value: TensorStorageMetadata) -> None:
    size = tuple(value.size)
    assert isinstance(value.properties.dtype, torch.dtype)
    total = 0
    for chunk in value.chunks:
        box = list(zip(chunk.offsets, chunk.sizes, size, strict=True))
        if not all(0 <= offset and offset + length <= end for offset, length, end in box):
            raise ValueError("a chunk lies outside its tensor")
        total += math.prod(chunk.sizes)
    ends = [
        max((c.offsets[axis] + c.sizes[axis] for c in value.chunks), default=0)
        for axis in range(len(size))
    ]
    if total != math.prod(size) or ends != list(size):
        raise ValueError("chunks do not fill their tensor")


def _check_place(index: MetadataIndex, place: _StorageInfo) -> None:
    if not isinstance(index.fqn, str) or not isinstance(place.relative_path, str):
        raise ValueError("a name is no text")
    if index.offset is not None and not all(isinstance(i, int) for i in index.offset):
        raise ValueError("an offset is no number")
    if not place.relative_path or "/" in place.relative_path or "\0" in place.relative_path:
        raise ValueError(f"{place.relative_path!r} is no file's name")
    if min(operator.index(place.offset), operator.index(place.length)) < 0:
        raise ValueError("a place in the files is negative")


def check_archive(archive: Any, where: str) -> None:
    """The CRC-32 of every record of a ``torch.save`` archive.

    Raises:
        UserError: damaged.
    """
    try:
        with zipfile.ZipFile(archive) as z:
            bad = z.testzip()
    except Exception as error:  # zipfile raises several kinds on a damaged directory
        raise UserError(f"{where} is damaged ({error}).") from error
    if bad is not None:
        raise UserError(f"{where} is damaged: the checksum of {bad} is wrong.")


def _load(file: Any, where: Any) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass  # Megatron's own classes: enums of its arguments
    except Exception as error:
        raise UserError(f"{where} is damaged ({str(error).splitlines()[0]}).") from error
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{where} is damaged ({str(error).splitlines()[0]}).") from error


def _overlap(offset, size, start, length) -> list[tuple[int, int]] | None:
    """Per axis (begin, length) of the common part of two boxes."""
    box = []
    for a, n, b, m in zip(offset, size, start, length, strict=True):
        begin, end = max(a, b), min(a + n, b + m)
        if begin >= end:
            return None
        box.append((begin, end - begin))
    return box


def _tuple(offset: Any) -> tuple[int, ...] | None:
    return None if offset is None else tuple(offset)


# --------------------------------------------------------------------------------------- writing


class _Hashed:
    """A file that hashes what goes through it; ``torch.save`` only writes forward."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(memoryview(data).cast("B"))
        return self.size

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, outputs: Sequence[Output], tensors: Iterator[Tensor]) -> dict[str, Any]:
    """Write one ``.distcp`` file, a chunk at a time.

    Returns its record: sha256, bytes and [offset, length] of each output.
    """
    places: list[list[int]] = []
    with open(path, "wb") as f:
        file = _Hashed(f)
        for tensor in tensors:
            start = file.size
            # A view would be saved with all of its storage.
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
            torch.save(tensor if whole and tensor.is_contiguous() else tensor.clone(), file)
            places.append([start, file.size - start])
        f.flush()
        os.fsync(f.fileno())
    return {"sha256": file.digest.hexdigest(), "bytes": file.size, "places": places}


def write_objects(path: Path, objects: dict[str, bytes]) -> dict[str, Any]:
    """Write the objects' file (``torch.save`` archives one after the other)."""
    digest, at, places = hashlib.sha256(), 0, []
    with open(path, "wb") as f:
        for data in objects.values():
            f.write(data)
            digest.update(data)
            places.append([at, len(data)])
            at += len(data)
        f.flush()
        os.fsync(f.fileno())
    return {"sha256": digest.hexdigest(), "bytes": at, "places": places}


def archive(value: Any) -> bytes:
    """An object as torch_dist stores it: a list of one, through ``torch.save``."""
    buffer = io.BytesIO()
    torch.save([value], buffer)
    return buffer.getvalue()


def write_metadata(
    folder: Path,
    files: dict[str, tuple[Sequence[Output], dict[str, Any]]],
    objects: tuple[str, dict[str, bytes], dict[str, Any]],
) -> None:
    """``.metadata`` and ``metadata.json`` for files that are written.

    Args:
        files: file name -> its outputs and its record.
        objects: name, content and record of the objects' file.
    """
    states: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, (outputs, record) in files.items():
        for output, (start, length) in zip(outputs, record["places"], strict=True):
            size = output.size if output.size is not None else output.shape
            offset = output.offset if output.offset is not None else (0,) * len(size)
            state = states.get(output.key)
            if state is None:
                properties = TensorProperties(dtype=output.dtype)
                state = TensorStorageMetadata(properties, torch.Size(size), [])
                states[output.key] = state
            state.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(output.shape)))
            index = MetadataIndex(output.key, torch.Size(offset))
            places[index] = _StorageInfo(name, start, length)
    name, content, record = objects
    for key, (start, length) in zip(content, record["places"], strict=True):
        states[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _StorageInfo(name, start, length)
    metadata = Metadata(states, storage_data=places, storage_meta=StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    text = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    (folder / "metadata.json").write_text(text, encoding="utf-8")
