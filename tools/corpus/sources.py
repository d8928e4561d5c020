"""Which files a corpus consists of, and how they are cut into blocks.

A block is what one worker turns into tokens at a time, about BLOCK_BYTES of source. Blocks come in
the order of the corpus, are the same for any number of workers, and carry raw bytes wherever
parsing can be left to the worker. Memory: one block at a time; where a document, a line or a
parquet column chunk is longer than a block, that.

What cannot be read becomes a ``Failed`` block in its place, so that the run decides what to do
about it and always names the first one in the corpus's order.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

from tools.corpus import CorpusError

BLOCK_BYTES = 1 << 20
#: Compressed bytes read at once. Small, because 64 KiB can stand for 64 MiB of text.
COMPRESSED_READ = 1 << 16
PARQUET_ROWS = 1024
COMPRESSIONS = (".gz", ".zst")
#: Name endings that tell what a file is, without being told by --suffix.
KNOWN = (".txt", ".jsonl", ".parquet")
#: Folders of the standard library that hold no part of it.
STDLIB_OUT = {"site-packages", "dist-packages", "__pycache__"}
STDLIB_TESTS = {"test", "tests", "idle_test"}


class SourceError(Exception):
    """Why one file, line or row cannot be read. Caught within this package."""


@dataclass(frozen=True)
class Reading:
    """How files become documents.

    Attributes:
        json_key: the field of a JSON line that holds the text.
        column: the parquet column that holds it.
        suffixes: of plain text, beside .txt; given, a folder is searched for these alone.
        per_line: each line of a text file is a document, not the file.
    """

    json_key: str = "text"
    column: str = "text"
    suffixes: tuple[str, ...] = ()
    per_line: bool = False


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus; ``form`` is "text", "jsonl" or "parquet"."""

    source: int  # which of the user's sources it belongs to
    path: str
    form: str
    compression: str  # "", ".gz" or ".zst"
    size: int
    error: str = ""  # why it cannot be read


@dataclass(frozen=True)
class Block:
    """What all blocks say: where they come from, and the bytes on disk they account for."""

    source: int
    path: str
    size: int


@dataclass(frozen=True)
class WholeFiles(Block):
    """Text files, each a document; ``path`` is the first."""

    paths: tuple[str, ...]
    compression: str


@dataclass(frozen=True)
class Piece(Block):
    """A part of a text file that is one document."""

    offset: int
    is_last: bool


@dataclass(frozen=True)
class Lines(Block):
    """Whole lines of a .jsonl, or of a text file read by lines."""

    form: str
    first: int  # number of the first line, from 1
    data: bytes


@dataclass(frozen=True)
class Rows(Block):
    """Rows of a parquet column."""

    first: int  # number of the first row, from 1
    values: list[bytes | None]


@dataclass(frozen=True)
class Failed(Block):
    """Something that cannot be read, from here to the end of the file."""

    reason: str


def list_files(sources: Sequence[str], reading: Reading) -> list[SourceFile]:
    """The files of a corpus: sources as given, a folder's files sorted by name.

    Raises:
        CorpusError: no source, one that does not exist, a file of unknown kind, a folder without
            a file that can be used.
    """
    if not sources:
        raise CorpusError("no sources: name files or folders, or give --stdlib")
    files: list[SourceFile] = []
    for number, source in enumerate(sources):
        path = Path(source)
        if os.path.isdir(path):  # unlike Path.is_dir, no exception where the way is barred
            paths = folder_files(path, reading)
        elif os.path.lexists(path):
            paths = [source]
        else:
            raise CorpusError(f"{source} does not exist or cannot be reached")
        files += [describe(number, name, reading) for name in paths]
    if not any(file.size or file.error for file in files):
        raise CorpusError(f"the corpus is empty: every file of {', '.join(sources)} has 0 bytes")
    return files


def folder_files(folder: Path, reading: Reading) -> list[str]:
    """The usable files under a folder, sorted; links to folders are not followed."""
    names: list[str] = []

    def fail(error: OSError) -> None:
        """os.walk would pass over a folder it cannot read."""
        raise CorpusError(f"{error.filename} cannot be read ({error.strerror})")

    for parent, _, files in os.walk(folder, onerror=fail):
        names += [os.path.join(parent, name) for name in files]
    wanted = reading.suffixes or KNOWN
    used = [name for name in names if strip_compression(name)[0].endswith(wanted)]
    if not used:
        seen = sorted({Path(name).suffix or "none" for name in names})
        found = f"it has {', '.join(seen[:8])}" if seen else "it is empty"
        raise CorpusError(f"{folder} holds no file with suffix {', '.join(wanted)} ({found})")
    return sorted(used, key=os.fsencode)


def strip_compression(name: str) -> tuple[str, str]:
    """A file's name without its .gz or .zst, and that."""
    stem, last = os.path.splitext(name)
    return (stem, last) if last in COMPRESSIONS else (name, "")


def describe(source: int, path: str, reading: Reading) -> SourceFile:
    """What is known of a file by its name and its size."""
    name, compression = strip_compression(path)
    if name.endswith((".jsonl", ".parquet")):
        form = name.rpartition(".")[2]
    elif name.endswith((".txt", *reading.suffixes)):
        form = "text"
    else:
        raise CorpusError(
            f"{path}: unknown suffix; known are {', '.join(KNOWN)} (the first two also with "
            f"{' or '.join(COMPRESSIONS)}), --suffix names others that are text"
        )
    try:
        status = os.stat(path)
    except OSError as error:
        return SourceFile(source, path, form, compression, 0, error=error.strerror or str(error))
    refusal = "" if S_ISREG(status.st_mode) else "not a regular file"
    return SourceFile(source, path, form, compression, status.st_size, refusal)


def stdlib_files(with_tests: bool = False) -> list[SourceFile]:
    """The .py files of the running Python's standard library, sorted by name.

    Raises CorpusError where the standard library is not a folder of sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    out = STDLIB_OUT if with_tests else STDLIB_OUT | STDLIB_TESTS
    names: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in out]
        paths = (os.path.join(parent, name) for name in files if name.endswith(".py"))
        names += [path for path in paths if os.path.isfile(path)]  # distributions leave dead links
    if not names:
        raise CorpusError(f"{folder} holds no sources of Python {sys.version.split()[0]}")
    reading = Reading(suffixes=(".py",))
    return [describe(0, name, reading) for name in sorted(names, key=os.fsencode)]


# -- blocks ----------------------------------------------------------------------------------


def cut(files: Sequence[SourceFile], reading: Reading, is_text: bool) -> Iterator[Block]:
    """The blocks of a corpus. ``is_text``: a document must be encoded as a whole."""
    for batch in batches(files, reading):
        file = batch[0]
        try:
            if file.error:
                raise SourceError(file.error)
            if len(batch) > 1 or is_whole_file(file, reading):
                yield from whole_files(batch, is_text)
            elif file.form == "parquet":
                yield from parquet_blocks(file, reading.column)
            else:
                yield from line_blocks(file)
        except OSError as error:
            yield Failed(file.source, file.path, 0, error.strerror or str(error))
        except SourceError as error:
            yield Failed(file.source, file.path, 0, str(error))


def is_whole_file(file: SourceFile, reading: Reading) -> bool:
    """Whether a file is one document."""
    return file.form == "text" and not reading.per_line


def batches(files: Sequence[SourceFile], reading: Reading) -> Iterator[list[SourceFile]]:
    """Neighbouring small text files together, up to a block; every other file alone."""
    batch: list[SourceFile] = []
    size = 0
    for file in files:
        alike = bool(batch) and (batch[0].source, batch[0].compression) == (
            file.source,
            file.compression,
        )
        joins = is_whole_file(file, reading) and not file.error
        if batch and not (alike and joins and size + file.size <= BLOCK_BYTES):
            yield batch
            batch, size = [], 0
        if joins:
            batch.append(file)
            size += file.size
        else:
            yield [file]
    if batch:
        yield batch


def whole_files(batch: list[SourceFile], is_text: bool) -> Iterator[Block]:
    """Text files that are a document each, long ones in pieces if that leaves the ids the same."""
    file = batch[0]
    if len(batch) > 1 or is_text or file.compression or file.size <= BLOCK_BYTES:
        paths = tuple(each.path for each in batch)
        size = sum(each.size for each in batch)
        yield WholeFiles(file.source, file.path, size, paths, file.compression)
        return
    for offset in range(0, file.size, BLOCK_BYTES):
        size = min(BLOCK_BYTES, file.size - offset)
        yield Piece(file.source, file.path, size, offset, offset + size == file.size)


def line_blocks(file: SourceFile) -> Iterator[Block]:
    """Whole lines, a block at a time. What comes before damage is kept, but for a broken line."""
    first, told = 1, 0
    with open(file.path, "rb") as raw:
        for data in whole_lines(decompressed(raw, file.compression)):
            position = raw.tell()
            yield Lines(file.source, file.path, position - told, file.form, first, data)
            told = position
            first += data.count(b"\n")


def whole_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Regroup chunks to blocks that end with a line."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        end = chunk.rfind(b"\n") + 1
        if size >= BLOCK_BYTES and end:
            held[-1] = chunk[:end]
            yield b"".join(held)
            held, size = [chunk[end:]], len(chunk) - end
    if size:
        yield b"".join(held)


def decompressed(raw: BinaryIO, compression: str) -> Iterator[bytes]:
    """The contents of an open file, in chunks.

    Raises SourceError where a compressed file ends early or is damaged, which the libraries' own
    readers do not always tell (zstandard's takes a truncated file for a whole one).
    """
    if not compression:
        while chunk := raw.read(BLOCK_BYTES):
            yield chunk
        return
    new, errors = decompressor(compression)
    stream = new()
    while chunk := raw.read(COMPRESSED_READ):
        while chunk:
            if stream.eof:  # another member, or the zeros that tapes and disks append
                chunk = chunk.lstrip(b"\0")
                stream = new() if chunk else stream
            try:
                data = stream.decompress(chunk) if chunk else b""
            except errors as error:
                raise SourceError(f"damaged {compression} file ({error})") from None
            if data:
                yield data
            chunk = stream.unused_data if stream.eof and chunk else b""
    if not stream.eof:
        raise SourceError(f"truncated {compression} file")


def decompressor(compression: str) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decompressor of one member, and what it raises."""
    if compression == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    try:
        import zstandard
    except ImportError:
        raise CorpusError("reading .zst needs the package zstandard") from None
    # 2 GiB is the window of `zstd --long=31`, the longest there is.
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return reader.decompressobj, zstandard.ZstdError


def read_document(path: str, compression: str) -> bytes:
    """A whole file; SourceError if it cannot be read."""
    try:
        with open(path, "rb") as raw:
            return b"".join(decompressed(raw, compression))
    except OSError as error:
        raise SourceError(error.strerror or str(error)) from None


def read_piece(piece: Piece) -> bytes:
    """A piece of a file; CorpusError if it is no longer there.

    Not to be skipped: what came before it is already part of the document.
    """
    try:
        with open(piece.path, "rb") as raw:
            raw.seek(piece.offset)
            data = raw.read(piece.size)
    except OSError as error:
        raise CorpusError(f"{piece.path}: {error.strerror}; nothing was written") from None
    if len(data) != piece.size:
        raise CorpusError(f"{piece.path} became shorter while it was read; nothing was written")
    return data


def parquet_blocks(file: SourceFile, column: str) -> Iterator[Block]:
    """Rows of a parquet column, a row group at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise CorpusError("reading .parquet needs the package pyarrow") from None
    first, told = 1, 0
    try:
        with parquet.ParquetFile(file.path) as table:
            check_column(table.schema_arrow, column)
            total = max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(PARQUET_ROWS, columns=[column]):
                values = text_of(batch.column(0)).to_pylist()
                done = file.size * (first - 1 + len(values)) // total
                yield Rows(file.source, file.path, done - told, first, values)
                first, told = first + len(values), done
    except (pyarrow.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"truncated or damaged .parquet file ({reason})") from None


def text_of(column: Any) -> Any:
    """An Arrow column of text as bytes, which are checked where they are encoded."""
    import pyarrow

    if isinstance(column, pyarrow.DictionaryArray):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary())


def check_column(schema: Any, column: str) -> None:
    """SourceError unless an Arrow schema has a column of that name that holds text."""
    from pyarrow import types

    if column not in schema.names:
        raise SourceError(f"no column {column!r} (--column); it has {', '.join(schema.names)}")
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind)
            or types.is_large_binary(kind)):  # fmt: skip
        raise SourceError(f"column {column!r} holds {kind}, not text")
