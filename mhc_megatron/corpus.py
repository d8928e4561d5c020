"""Checks of an indexed corpus before a run reads it."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from mhc_megatron.errors import UserError
from mhc_megatron.files import replacing

#: core/datasets/indexed_dataset.py: magic, version; then dtype code, sequences, documents.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}


#: Bounds of a split as shares of the documents, in Megatron's order; None: not asked for.
Splits = Sequence[tuple[float, float] | None]


def check_corpus(
    prefix: str, *, sequence_length: int, vocab_size: int, splits: Splits = ()
) -> None:
    """That PREFIX.bin / PREFIX.idx are whole, hold a sequence, and fit the model's vocabulary.

    Raises:
        UserError: missing, truncated or not an index; fewer than ``sequence_length`` + 1 tokens; a
            vocabulary (from PREFIX.json, where there is one) larger than ``vocab_size``; one of
            ``splits`` without a document, for which Megatron would look for ever.
    """
    bin_path, idx_path = prefix + ".bin", prefix + ".idx"
    for path in (bin_path, idx_path):
        if not os.path.isfile(path):
            raise UserError(f"data-path: {path} does not exist; tools/prepare_data.py makes it.")
    size, documents, dtype = _index_size(idx_path)
    if os.path.getsize(bin_path) != size * dtype.itemsize:
        raise UserError(
            f"data-path: {bin_path} has {os.path.getsize(bin_path):,} bytes where its index says "
            f"{size * dtype.itemsize:,}; it is truncated or of another corpus."
        )
    if size < sequence_length + 1:
        raise UserError(
            f"data-path: {prefix} has {size:,} tokens, fewer than one sequence of "
            f"{sequence_length:,} and its next token."
        )
    for name, bounds in zip(("training", "validation", "test"), splits):
        # core/datasets/blended_megatron_dataset_builder.py rounds the same way.
        if bounds and round(bounds[0] * documents) >= round(bounds[1] * documents):
            raise UserError(
                f"data-path: of the {documents:,} documents of {prefix} none falls to the {name} "
                "set; change split (100,0,0 with eval-iters: 0 has neither validation nor test)."
            )
    vocab = _vocab_size(prefix)
    if vocab is not None and vocab > vocab_size:
        raise UserError(
            f"data-path: {prefix} was made with a vocabulary of {vocab:,}, larger than the "
            f"model's {vocab_size:,}."
        )


def unigram_entropy(prefix: str) -> float | None:
    """Nats a token of the corpus, from PREFIX.json; None where it does not say."""
    value = _sidecar(prefix).get("unigram_entropy")
    return float(value) if type(value) in (int, float) and abs(value) < 1e9 else None


def _index_size(idx_path: str) -> tuple[int, int, np.dtype]:
    """Tokens and documents of an index, and the tokens' dtype; its own length is checked too."""
    with open(idx_path, "rb") as f:
        head = f.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise UserError(f"data-path: {idx_path} is truncated or is not an index.")
        _, _, code, sequences, documents = _HEADER.unpack(head)
        expected = _HEADER.size + sequences * (4 + 8) + documents * 8
        actual = os.path.getsize(idx_path)
        # Multimodal indices add a byte a sequence.
        if code not in _DTYPES or actual not in (expected, expected + sequences):
            raise UserError(
                f"data-path: {idx_path} has {actual:,} bytes where its header says "
                f"{expected:,}; it is truncated."
            )
        lengths = np.fromfile(f, dtype=np.int32, count=sequences)
    # The index lists where documents begin, and where the last one ends.
    return int(lengths.sum(dtype=np.int64)), documents - 1, np.dtype(_DTYPES[code])


@contextlib.contextmanager
def whole_indices() -> Iterator[None]:
    """Let Megatron's dataset builders write the indices that they cache as a whole or not at all.

    They call ``numpy.save`` on the final name (core/datasets/gpt_dataset.py:608,
    blended_dataset.py:207) and later read what is there: a disk that is full, or a kill, would
    leave a cut file in which every later start ends. A missing one is built again.
    """
    plain = np.save

    def save(file, *args, **kwargs) -> None:
        with replacing(file, "wb") as f:  # given a name, numpy would add .npy
            plain(f, *args, **kwargs)

    np.save = save
    try:
        yield
    finally:
        np.save = plain


def _vocab_size(prefix: str) -> int | None:
    value = _sidecar(prefix).get("vocab_size")
    if value is not None and type(value) is not int:
        raise UserError(f"data-path: {prefix}.json: vocab_size must be a number, not {value!r}.")
    return value


def _sidecar(prefix: str) -> dict:
    try:
        with open(prefix + ".json", encoding="utf-8") as f:
            value = json.load(f)
    except (OSError, ValueError, RecursionError):
        return {}
    # Of another tool, perhaps; only an object can be prepare_data.py's.
    return value if isinstance(value, dict) else {}
