"""The ``.bin`` / ``.idx`` pair that Megatron's ``IndexedDataset`` reads, and its sidecar.

Layout (megatron/core/datasets/indexed_dataset.py of 0.19.2, ``_IndexWriter``), little-endian::

    .bin   every document's token ids, one after the other, uint16 or int32
    .idx   9 bytes  MMIDIDX\\0\\0
           uint64   version, 1
           uint8    dtype code: 4 = int32, 8 = uint16
           uint64   S, sequences;  uint64  D, document boundaries
           int32[S] tokens of each sequence
           int64[S] byte offset of each sequence in .bin
           int64[D] first sequence of each document, and S at the end

A document is one sequence here, so D = S + 1. ``PREFIX.json`` beside them says what the tokens
mean (vocabulary, end-of-document id, tokenizer) and holds the checksums.

The format is written here and not through Megatron's ``IndexedDatasetBuilder`` because that one
imports torch, keeps two Python lists of a number a document, and writes in place;
tests/test_prepare_data.py holds the two together, byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import struct
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tools.corpus import CorpusError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
SUFFIXES = (".bin", ".idx", ".json")
#: What the sidecar's "format" says; a later layout takes another number.
SIDECAR_FORMAT = "mhc-megatron corpus 1"
#: A sequence's length is an int32 in the index.
MAX_DOCUMENT_TOKENS = 2**31 - 1
#: Items of an index array that are turned over at once (8 MiB of int64).
STRIDE = 1 << 20


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype Megatron takes for a vocabulary (``DType.optimal_dtype``)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def pair_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """PREFIX.bin, PREFIX.idx and PREFIX.json."""
    bin_path, idx_path, json_path = (Path(f"{prefix}{suffix}") for suffix in SUFFIXES)
    return bin_path, idx_path, json_path


def entropy(counts: np.ndarray) -> float:
    """Entropy of the distribution ``counts`` [V], in nats a token."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum()) if p.size > 1 else 0.0


# -- writing ---------------------------------------------------------------------------------


class PairWriter:
    """Writes a pair and its sidecar under ``*.partial`` names and renames them at the very end.

    A context manager: leaving it without ``commit`` removes what was written. A process killed
    outright leaves ``*.partial`` files only, which the next run for the same prefix takes over; a
    lock on them keeps two living runs apart.

    Memory: 4 bytes a document.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, force: bool) -> None:
        self.finals = pair_paths(prefix)
        self.partials = tuple(Path(f"{path}.partial") for path in self.finals)
        self.dtype = dtype
        self.lengths = array("i")
        self.open_tokens = 0  # tokens of a document whose end has not come yet
        self.sha256 = hashlib.sha256()
        self.force = force
        self.committed = False

    def __enter__(self) -> PairWriter:
        refuse_overwrite(self.finals, self.force)
        with writing(self.partials[0]):
            self.finals[0].parent.mkdir(parents=True, exist_ok=True)
            self.file = open_locked(self.partials[0])
        try:  # again, now that no other run can finish in between
            refuse_overwrite(self.finals, self.force)
        except CorpusError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self.committed:  # before the lock goes with the file
            for path in self.partials:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk makes the last flush fail again
            self.file.close()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, goes_on: bool, where: str) -> None:
        """Append documents.

        Args:
            tokens: their ids, one after the other, [sum(lengths)] of the pair's dtype.
            lengths: tokens of each, int64. The first one continues the document left open.
            goes_on: the last one is left open.
            where: the source, for the message.

        Raises:
            CorpusError: the disk is full, or a document is longer than the format can say.
        """
        with writing(self.partials[0]):
            self.file.write(tokens.data)
        self.sha256.update(tokens.data)
        closed = lengths.tolist()
        if closed:
            closed[0] += self.open_tokens
            self.open_tokens = closed.pop() if goes_on else 0
        if max(closed, default=self.open_tokens) > MAX_DOCUMENT_TOKENS:
            raise CorpusError(
                f"{where}: a document of more than {MAX_DOCUMENT_TOKENS} tokens does not fit the "
                "format; divide it (--per-line makes each line of a text file a document)"
            )
        self.lengths.extend(closed)

    def commit(self, sidecar: dict[str, Any]) -> dict[str, Any]:
        """Write the index and the sidecar, then give all three their names.

        Returns the sidecar as written, with the checksums. Signals wait until the renames are
        through. They come .bin, .idx, .json: whoever sees the .json sees a whole pair. With
        ``--force`` the old .json and .idx go first, so old index and new tokens never stand
        together.
        """
        with writing(self.partials[0]):
            sync(self.file)
        with writing(self.partials[1]), open(self.partials[1], "wb") as file:
            idx_sha256 = write_index(file, np.frombuffer(self.lengths, np.int32), self.dtype)
            sync(file)
        checksums = {"bin": self.sha256.hexdigest(), "idx": idx_sha256}
        sidecar = {**sidecar, "sha256": {**checksums, "sidecar": sidecar_sha256(sidecar)}}
        text = json.dumps(sidecar, indent=1) + "\n"
        with writing(self.partials[2]), open(self.partials[2], "wb") as file:
            file.write(text.encode())
            sync(file)
        with signals_wait(), writing(self.finals[0]):
            for path in reversed(self.finals[1:]):
                path.unlink(missing_ok=True)
            rename_all(self.partials, self.finals)
            self.committed = True
            sync_folder(self.finals[0].parent)
        return json.loads(text)


def rename_all(partials: tuple[Path, ...], finals: tuple[Path, ...]) -> None:
    """Give every file its name, or, if the system refuses one, none of them."""
    for done, (partial, final) in enumerate(zip(partials, finals, strict=True)):
        try:
            os.replace(partial, final)
        except OSError:
            for path in finals[:done]:
                path.unlink(missing_ok=True)
            raise


def refuse_overwrite(finals: tuple[Path, ...], force: bool) -> None:
    """Raise CorpusError where writing would take away a file the user has."""
    there = [path for path in finals if os.path.lexists(path)]
    if there and not force:
        raise CorpusError(f"{there[0]} exists; --force overwrites it")
    for path in there:
        if not os.path.isfile(path):
            raise CorpusError(f"{path} is not a regular file and is left alone")
    if finals[2] in there and not is_sidecar(finals[2]):
        raise CorpusError(f"{finals[2]} was not written by this tool and is left alone")


def is_sidecar(path: Path) -> bool:
    """Whether ``path`` is a sidecar of this tool."""
    try:
        return json.loads(path.read_bytes()).get("format") == SIDECAR_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def open_locked(path: Path) -> BinaryIO:
    """Open ``path`` for writing, empty, under a lock that ends with this process.

    Raises CorpusError where another process holds it.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise CorpusError(f"another run is writing {path.with_suffix('')}") from None
        except OSError as error:  # Lustre, NFS without locks: go on unguarded
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        # The other run may have renamed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                return file
        file.close()


def write_index(file: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> str:
    """Write an .idx for documents of ``lengths`` [S] int32; its sha256 in hexadecimal."""
    sha256 = hashlib.sha256()

    def put(data: bytes) -> None:
        """Write and sum up."""
        file.write(data)
        sha256.update(data)

    code = next(code for code, known in DTYPES.items() if known == dtype)
    put(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
    for start in range(0, len(lengths), STRIDE):
        put(lengths[start : start + STRIDE].astype("<i4").tobytes())
    for pointers in pointers_of(lengths, dtype):
        put(pointers.tobytes())
    for start in range(0, len(lengths) + 1, STRIDE):
        stop = min(start + STRIDE, len(lengths) + 1)
        put(np.arange(start, stop, dtype="<i8").tobytes())
    return sha256.hexdigest()


def pointers_of(lengths: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Byte offsets of sequences of ``lengths`` tokens, int64, STRIDE at a time."""
    offset = 0
    for start in range(0, len(lengths), STRIDE):
        ends = np.cumsum(lengths[start : start + STRIDE], dtype="<i8") * dtype.itemsize + offset
        yield np.concatenate(([offset], ends[:-1])).astype("<i8")
        offset = int(ends[-1])


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside into one sentence about ``path``."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk or the quota is full" if full else "cannot be written"
        raise CorpusError(f"{path}: {reason} ({error.strerror})") from None


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Hold back the signals that end a run until the block is through."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread only
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def sync(file: BinaryIO) -> None:
    """Bring a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where its file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A pair whose structure is sound. ``tokens`` and ``lengths`` are memory maps."""

    tokens: np.ndarray  # [T], the dtype of the index
    lengths: np.ndarray  # [S] int32


def read_pair(prefix: str | Path) -> Pair:
    """Open a pair after checking its structure: header, sizes, offsets, boundaries.

    Costs a pass over the index, none over the tokens, and works for any pair of one sequence a
    document, also one that Megatron's own tool made.

    Raises:
        CorpusError: which file is missing, truncated or inconsistent.
    """
    bin_path, idx_path, _ = pair_paths(prefix)
    raw = open_map(idx_path, np.dtype(np.uint8))
    if raw.size < HEADER.size:
        raise CorpusError(f"{idx_path} is truncated: {raw.size} bytes are no whole header")
    magic, version, code, sequences, boundaries = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise CorpusError(f"{idx_path} is no Megatron index of uint16 or int32 tokens")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if raw.size != expected:
        what = "is truncated" if raw.size < expected else "is too long"
        raise CorpusError(f"{idx_path} {what}: {raw.size} bytes, its header says {expected}")
    dtype = DTYPES[int(code)]
    body = raw[HEADER.size :]
    lengths = body[: 4 * sequences].view("<i4")
    pointers = body[4 * sequences : 12 * sequences].view("<i8")
    check_index(idx_path, lengths, pointers, body[12 * sequences :].view("<i8"), dtype)
    size = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    found = file_size(bin_path)
    if found != size:
        what = "is truncated" if found < size else "is too long"
        raise CorpusError(f"{bin_path} {what}: {found} bytes, its index says {size}")
    return Pair(open_map(bin_path, dtype), lengths)


def check_index(
    path: Path, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, dtype: np.dtype
) -> None:
    """Raise CorpusError where the three arrays of an index contradict each other."""
    if lengths.size == 0:
        raise CorpusError(f"{path} holds no documents")
    if lengths.min() < 1:
        raise CorpusError(f"{path}: a sequence has length {lengths.min()}")
    if documents.size != lengths.size + 1:
        raise CorpusError(f"{path}: {documents.size} boundaries for {lengths.size} documents")
    for chunk, expected in enumerate(pointers_of(lengths, dtype)):
        start = chunk * STRIDE
        if not np.array_equal(pointers[start : start + STRIDE], expected):
            raise CorpusError(f"{path}: the offsets do not follow from the lengths")
    for start in range(0, documents.size, STRIDE):
        part = documents[start : start + STRIDE]
        if not np.array_equal(part, np.arange(start, start + part.size)):
            raise CorpusError(f"{path}: the document boundaries are not 0, 1, 2, ...")


def open_map(path: Path, dtype: np.dtype) -> np.ndarray:
    """A read-only memory map of a whole file; CorpusError if it is missing or unreadable."""
    if not file_size(path):
        return np.empty(0, dtype)
    try:
        return np.memmap(path, dtype, mode="r")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror})") from None


def file_size(path: Path) -> int:
    """Bytes of a regular file; CorpusError if it is none."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror})") from None
    if not path.is_file():
        raise CorpusError(f"{path} is not a regular file")
    return size


def read_sidecar(prefix: str | Path) -> dict[str, Any]:
    """PREFIX.json; CorpusError if it is missing, damaged or another program's."""
    path = pair_paths(prefix)[2]
    try:
        sidecar = json.loads(path.read_bytes())
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise CorpusError(f"{path} is not valid JSON") from None
    if not isinstance(sidecar, dict) or sidecar.get("format") != SIDECAR_FORMAT:
        raise CorpusError(f"{path} was not written by this tool")
    return sidecar


def sidecar_sha256(sidecar: dict[str, Any]) -> str:
    """Checksum of a sidecar's fields, whatever their order, leaving out the checksums."""
    fields = {key: value for key, value in sidecar.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_pair(prefix: str | Path) -> dict[str, Any]:
    """Check a pair against its sidecar, token by token; the sidecar.

    Raises:
        CorpusError: the first thing that is missing, truncated, altered or out of range.
    """
    bin_path, idx_path, json_path = pair_paths(prefix)
    pair, sidecar = read_pair(prefix), read_sidecar(prefix)
    checksums = sidecar.get("sha256")
    if not isinstance(checksums, dict) or checksums.get("sidecar") != sidecar_sha256(sidecar):
        raise CorpusError(f"{json_path} was altered: its checksum does not match its fields")
    stated = (sidecar["documents"], sidecar["tokens"], sidecar["dtype"])
    found = (pair.lengths.size, pair.tokens.size, pair.tokens.dtype.name)
    if found != stated:
        raise CorpusError(f"{json_path} says (documents, tokens, dtype) {stated}, found {found}")
    counts = count_tokens(pair.tokens, sidecar["vocab_size"], bin_path)
    for path, key in ((bin_path, "bin"), (idx_path, "idx")):
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != checksums.get(key):
                raise CorpusError(f"{path} was altered: its checksum is not the one in {json_path}")
    # Not to the bit: the logarithm's last digit depends on the machine.
    if abs(entropy(counts) - sidecar["unigram_entropy"]) > 1e-9:
        raise CorpusError(f"{json_path} states an entropy that is not that of the tokens")
    return sidecar


def count_tokens(tokens: np.ndarray, vocab_size: int, path: Path) -> np.ndarray:
    """How often each id occurs, [vocab_size] int64; CorpusError for an id outside."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, tokens.size, STRIDE):
        part = tokens[start : start + STRIDE]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise CorpusError(f"{path}: token id {wrong} is outside the vocabulary of {vocab_size}")
        counts += np.bincount(part, minlength=vocab_size)
    return counts
