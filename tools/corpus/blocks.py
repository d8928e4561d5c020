"""A block of the corpus to tokens, in this process or in several.

``encoded`` gives the results in the order of the blocks whatever the number of processes, with a
fixed number of blocks under way, so memory does not grow with the corpus.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from tools.corpus import CorpusError
from tools.corpus.encoders import Encoder, EncoderSpec, Ids, load
from tools.corpus.sources import (
    Block,
    Failed,
    Lines,
    Piece,
    Rows,
    SourceError,
    WholeFiles,
    read_document,
    read_piece,
)

#: Blocks under way for each worker: one it works on, one waiting, one on the way back.
UNDER_WAY = 3
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Target:
    """What documents become: the encoder, whether its end-of-document id is appended, the dtype."""

    spec: EncoderSpec
    append_eod: bool
    dtype: np.dtype
    json_key: str


@dataclass
class Encoded:
    """What a block became.

    Attributes:
        source, path, size: the block's.
        tokens: ids of its documents, one after the other.
        lengths: tokens of each, int64.
        goes_on: the last document goes on in the next block.
        ids, counts: the ids that occur, and how often.
        empty: documents without text, left out.
        bad: (place, reason) of what could not be read, left out.
    """

    source: int
    path: str
    size: int
    tokens: np.ndarray
    lengths: np.ndarray
    goes_on: bool
    ids: np.ndarray
    counts: np.ndarray
    empty: int
    bad: list[tuple[str, str]]


@dataclass
class Documents:
    """The documents of a block on their way to the encoder."""

    texts: list[bytes] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    empty: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)

    def put(self, text: bytes, place: str) -> None:
        """Add a document, unless it is empty."""
        if text:
            self.texts.append(text)
            self.places.append(place)
        else:
            self.empty += 1


def documents_of(block: Block, is_text: bool, json_key: str) -> Documents:
    """The documents of a block; with ``is_text`` those that are UTF-8."""
    documents = Documents()
    match block:
        case WholeFiles(paths=paths, compression=compression):
            for path in paths:
                try:
                    documents.put(read_document(path, compression), path)
                except SourceError as error:
                    documents.bad.append((path, str(error)))
        case Piece():
            documents.put(read_piece(block), block.path)
        case Lines():
            put_lines(documents, block, json_key)
        case Rows(values=values, first=first):
            for row, value in enumerate(values, start=first):
                place = f"{block.path}, row {row}"
                if value is None:
                    documents.bad.append((place, "the value is null"))
                else:
                    documents.put(value, place)
        case Failed(reason=reason):
            documents.bad.append((block.path, reason))
    if is_text:
        drop_non_utf8(documents, name_line=isinstance(block, WholeFiles))
    return documents


def put_lines(documents: Documents, block: Lines, json_key: str) -> None:
    """The documents of a block of lines; blank lines are none."""
    for number, line in enumerate(block.data.split(b"\n"), start=block.first):
        line = line.removeprefix(BOM) if number == 1 else line
        line = line.removesuffix(b"\r")
        if not line.strip():
            continue
        place = f"{block.path}, line {number}"
        try:
            documents.put(json_text(line, json_key) if block.form == "jsonl" else line, place)
        except SourceError as error:
            documents.bad.append((place, str(error)))


def json_text(line: bytes, key: str) -> bytes:
    """The text of a JSON line, in UTF-8; SourceError if it holds none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise SourceError("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise SourceError(f"not a JSON object but {type(record).__name__}")
    if key not in record:
        raise SourceError(f"no key {key!r} (--json-key); it has {', '.join(record) or 'none'}")
    if not isinstance(record[key], str):
        raise SourceError(f"{key!r} is not a string but {type(record[key]).__name__}")
    try:
        return record[key].encode()
    except UnicodeEncodeError:
        raise SourceError("half of a surrogate pair, which is no Unicode text") from None


def drop_non_utf8(documents: Documents, name_line: bool) -> None:
    """Move documents that are not UTF-8 to the bad ones, naming the line if the place does not."""
    kept = Documents()
    for text, place in zip(documents.texts, documents.places, strict=True):
        try:
            text.decode()
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            place += f", line {line}" if name_line else ""
            documents.bad.append((place, "not UTF-8, which a tokenizer needs"))
        else:
            kept.put(text, place)
    documents.texts, documents.places = kept.texts, kept.places


def encode_block(block: Block, encoder: Encoder, target: Target) -> Encoded:
    """The tokens of a block; CorpusError if it fails in a way that cannot be skipped."""
    documents = documents_of(block, encoder.is_text, target.json_key)
    goes_on = isinstance(block, Piece) and not block.is_last
    eod = [] if goes_on or not target.append_eod else [encoder.eod_id]
    encodings = encode_documents(documents, encoder)
    lengths = np.array([len(ids) + len(eod) for ids in encodings], np.int64)
    tokens = np.empty(int(lengths.sum()), target.dtype)
    start = 0
    for ids in encodings:
        tokens[start : start + len(ids)] = ids
        tokens[start + len(ids) : start + len(ids) + len(eod)] = eod
        start += len(ids) + len(eod)
    counts = np.bincount(tokens, minlength=encoder.vocab_size)
    (ids,) = np.nonzero(counts)
    return Encoded(
        *(block.source, block.path, block.size, tokens, lengths, goes_on, ids, counts[ids]),
        *(documents.empty, documents.bad),
    )


def encode_documents(documents: Documents, encoder: Encoder) -> list[Ids]:
    """Ids of each document; those the tokenizer refuses or makes nothing of are left out."""
    count = len(documents.texts)
    try:
        encodings = encoder.encode(documents.texts)
    except MemoryError:
        raise no_memory(documents.places[0]) from None
    except Exception:  # one of them is refused; the libraries raise bare Exception
        encodings = [encode_one(documents, number, encoder) for number in range(count)]
    kept = [ids for ids in encodings if len(ids)]
    documents.empty += count - len(kept)
    return kept


def encode_one(documents: Documents, number: int, encoder: Encoder) -> Ids:
    """Ids of one document, none if the tokenizer refuses it."""
    try:
        return encoder.encode([documents.texts[number]])[0]
    except MemoryError:
        raise no_memory(documents.places[number]) from None
    except Exception as error:
        documents.bad.append((documents.places[number], f"the tokenizer refuses it ({error})"))
        documents.empty -= 1  # counted among the bad ones
        return ()


def no_memory(place: str) -> CorpusError:
    """What ends the run where a document, or one of those after it, needs too much."""
    return CorpusError(f"not enough memory for the tokens at {place}; nothing was written")


# -- processes -------------------------------------------------------------------------------


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


_worker: tuple[Encoder, Target]


def start_worker(target: Target) -> None:
    """Load the encoder, leave Ctrl-C to the parent, and end when the parent does."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker = (load(target.spec), target)


def end_with_parent() -> None:
    """End this process when its parent is gone; killed, it cannot tell its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def work(block: Block) -> Encoded:
    """``encode_block`` with the worker's encoder."""
    return encode_block(block, *_worker)


def encoded(
    blocks: Iterable[Block], encoder: Encoder, target: Target, workers: int
) -> Iterator[Encoded]:
    """The tokens of every block, in order.

    ``workers`` processes are started when there is more than one; they are spawned, not forked,
    because the caller may have threads.
    """
    if workers == 1:
        for block in blocks:
            yield encode_block(block, encoder, target)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, start_worker, (target,))
    under_way: deque[Future[Encoded]] = deque()
    try:
        for block in blocks:
            under_way.append(pool.submit(work, block))
            if len(under_way) >= UNDER_WAY * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise CorpusError("a worker process died (out of memory?); nothing was written") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
