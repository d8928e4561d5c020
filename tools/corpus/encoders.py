"""Bytes to token ids: plain bytes, or a tokenizer the user has on disk.

An ``EncoderSpec`` names the tokenizer and can be sent to a worker process; ``load`` turns it into
an ``Encoder`` there. A document's text is never searched for special tokens: a literal
``<|endoftext|>`` in a source is encoded as the characters it consists of, and the only
end-of-document id in the corpus is the one appended after a document.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.corpus import CorpusError
from tools.corpus.indexed import dtype_for

#: Names that Hugging Face tokenizers give their end-of-document token, in the order looked for.
EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<eod>",
    "[EOS]",
)

_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    (
        rf"""[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        rf"""[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    )
)
#: Encodings that tiktoken names: how text is split, and the id of <|endoftext|>
#: (tiktoken_ext/openai_public.py). A .tiktoken file holds neither.
PATTERNS: dict[str, tuple[str, int]] = {
    "gpt2": (_GPT2, 50256),
    "r50k_base": (_GPT2, 50256),
    "p50k_base": (_GPT2, 50256),
    "cl100k_base": (_CL100K, 100257),
    "o200k_base": (_O200K, 199999),
}


#: Token ids of one document, as the libraries give them.
Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder.

    Attributes:
        kind: ``bytes``, ``huggingface``, ``sentencepiece`` or ``tiktoken``.
        file: the tokenizer's file; empty for bytes.
        pattern: tiktoken only: a name in PATTERNS, or a regular expression.
        eod_token: text of the end-of-document token, where the default is not wanted.
    """

    kind: str = "bytes"
    file: str = ""
    pattern: str = ""
    eod_token: str = ""

    def sha256(self) -> str | None:
        """Checksum of the tokenizer's file."""
        return hashlib.sha256(read_file(self.file)).hexdigest() if self.file else None


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    Attributes:
        encode: ids of each document, none appended. Documents of a text encoder are UTF-8.
        vocab_size: one more than the largest id, the end-of-document id included.
        eod_id: the end-of-document id; None if the tokenizer has none.
        is_text: documents must be UTF-8.
        decode: the text of ids, without the end-of-document token; ids may end within a character.
    """

    encode: Callable[[Sequence[bytes]], list[Ids]]
    vocab_size: int
    eod_id: int | None
    decode: Callable[[Sequence[int]], bytes]
    is_text: bool = True


def encoder_spec(tokenizer: str, pattern: str = "", eod_token: str = "") -> EncoderSpec:
    """The spec of what a user names: ``bytes``, or a path that tells its kind by its name.

    ``tokenizer.json`` (or a folder that holds one) is Hugging Face's, ``*.model`` SentencePiece's,
    ``*.tiktoken``, or any file given together with a pattern, tiktoken's.
    """
    if tokenizer == "bytes":
        if pattern or eod_token:
            raise CorpusError("--pattern and --eod-token need a --tokenizer file")
        return EncoderSpec()
    path = Path(encoder_path(tokenizer))
    kinds = {".json": "huggingface", ".model": "sentencepiece", ".tiktoken": "tiktoken"}
    kind = "tiktoken" if pattern else kinds.get(path.suffix)
    if kind is None:
        raise CorpusError(
            f"--tokenizer {tokenizer}: the kind is not known from its name; known are "
            "tokenizer.json, *.model, *.tiktoken, and any ranks file with --pattern"
        )
    if kind == "tiktoken":
        if eod_token:
            raise CorpusError("--eod-token: a tiktoken file names no special tokens")
        pattern = pattern or path.stem
        if pattern == path.stem and pattern not in PATTERNS:
            raise CorpusError(
                f"--tokenizer {tokenizer}: give --pattern, a regular expression or one of "
                f"{', '.join(PATTERNS)}"
            )
    return EncoderSpec(kind, str(path), pattern, eod_token)


def encoder_path(tokenizer: str) -> str:
    """The file of a tokenizer that is named by its file or by the folder around it."""
    path = Path(tokenizer)
    return str(path / "tokenizer.json" if os.path.isdir(path) else path)


def load(spec: EncoderSpec) -> Encoder:
    """Load an encoder; CorpusError if its file or its library cannot be used."""
    if spec.kind == "bytes":
        return Encoder(encode_bytes, 257, eod_id=256, decode=decode_bytes, is_text=False)
    makers = {"huggingface": huggingface, "sentencepiece": sentencepiece, "tiktoken": tiktoken}
    read_file(spec.file)
    try:
        encoder = makers[spec.kind](spec)
    except ImportError as error:
        raise CorpusError(f"{spec.file} needs the package {error.name}") from None
    if encoder.vocab_size > 2**31:
        raise CorpusError(f"{spec.file}: token id {encoder.vocab_size - 1} does not fit int32")
    return encoder


def dtype_of(encoder: Encoder, wanted: str = "auto") -> np.dtype:
    """The dtype of a corpus; CorpusError if ``wanted`` does not hold the vocabulary."""
    dtype = dtype_for(encoder.vocab_size) if wanted == "auto" else np.dtype(wanted)
    if encoder.vocab_size - 1 > np.iinfo(dtype).max:
        raise CorpusError(f"token id {encoder.vocab_size - 1} does not fit --dtype {dtype.name}")
    return dtype


def read_file(path: str) -> bytes:
    """The bytes of a tokenizer's file; CorpusError if there are none."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CorpusError(f"tokenizer {path} cannot be read ({error.strerror})") from None
    if not data:
        raise CorpusError(f"tokenizer {path} is empty")
    return data


@contextlib.contextmanager
def panics_are_errors() -> Iterator[None]:
    """A panic of a library in Rust as a ValueError, without the stack that it prints.

    tiktoken's regular expressions give up on a million spaces with one. It is no Exception, so that
    nothing would catch it, and no process can send it to another.
    """
    sys.stderr.flush()
    held = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise ValueError(" ".join(str(error).split())) from None
    finally:
        os.dup2(held, 2)
        os.close(held)


def encode_bytes(documents: Sequence[bytes]) -> list[Ids]:
    """The byte values themselves."""
    return [np.frombuffer(document, np.uint8) for document in documents]


def decode_bytes(ids: Sequence[int]) -> bytes:
    """The bytes that the ids are; the end-of-document id is none."""
    return bytes(value for value in ids if value < 256)


def huggingface(spec: EncoderSpec) -> Encoder:
    """A ``tokenizer.json``, without its templates, truncation and padding."""
    # The worker processes are the parallelism; set before the library reads it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(spec.file)
    except Exception as error:  # the library raises bare Exception
        raise CorpusError(f"tokenizer {spec.file} is no tokenizer.json ({error})") from None
    tokenizer.no_truncation()  # many files carry a limit of 512 tokens
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if not vocab:
        raise CorpusError(f"tokenizer {spec.file} has an empty vocabulary")
    names = (spec.eod_token,) if spec.eod_token else EOD_NAMES
    eod_id = next((vocab[name] for name in names if name in vocab), None)
    require_eod_token(spec, eod_id)

    def encode(documents: Sequence[bytes]) -> list[Ids]:
        """Ids of each document."""
        texts = [document.decode() for document in documents]
        with panics_are_errors():
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(ids: Sequence[int]) -> bytes:
        """The text of ids."""
        return tokenizer.decode(list(ids), skip_special_tokens=True).encode()

    return Encoder(encode, max(vocab.values()) + 1, eod_id, decode)


def sentencepiece(spec: EncoderSpec) -> Encoder:
    """A SentencePiece ``.model``."""
    import sentencepiece as library

    try:
        model = library.SentencePieceProcessor(model_file=spec.file)
    except (OSError, RuntimeError):
        raise CorpusError(f"tokenizer {spec.file} is no SentencePiece model") from None
    eod_id = model.eos_id() if model.eos_id() >= 0 else None
    if spec.eod_token:
        piece = model.piece_to_id(spec.eod_token)
        eod_id = piece if model.id_to_piece(piece) == spec.eod_token else None
    require_eod_token(spec, eod_id)

    def encode(documents: Sequence[bytes]) -> list[Ids]:
        """Ids of each document."""
        texts = [document.decode() for document in documents]
        return model.encode(texts, out_type=int, num_threads=1)

    def decode(ids: Sequence[int]) -> bytes:
        """The text of ids."""
        return model.decode(list(ids)).encode()

    return Encoder(encode, model.get_piece_size(), eod_id, decode)


def tiktoken(spec: EncoderSpec) -> Encoder:
    """A tiktoken ranks file: a line a token, its bytes in base64 and its rank.

    Read here because tiktoken's own reader caches by path and so misses a changed file.
    """
    from tiktoken import Encoding

    ranks = read_ranks(spec.file)
    pattern, eod_id = PATTERNS.get(spec.pattern, (spec.pattern, max(ranks.values()) + 1))
    if eod_id in ranks.values():
        raise CorpusError(
            f"tokenizer {spec.file}: rank {eod_id} is the end-of-document id of "
            f"{spec.pattern}; the file belongs to another --pattern"
        )
    try:
        encoding = Encoding(
            spec.pattern,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": eod_id},
        )
    except ValueError as error:
        raise CorpusError(f"--pattern {pattern!r} is no regular expression ({error})") from None

    def encode(documents: Sequence[bytes]) -> list[Ids]:
        """Ids of each document."""
        with panics_are_errors():
            return [encoding.encode_ordinary(document.decode()) for document in documents]

    def decode(ids: Sequence[int]) -> bytes:
        """The bytes of ids."""
        return encoding.decode_bytes([value for value in ids if value != eod_id])

    return Encoder(encode, max(*ranks.values(), eod_id) + 1, eod_id, decode)


def read_ranks(path: str) -> dict[bytes, int]:
    """The ranks of a .tiktoken file; CorpusError with the line that is wrong."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CorpusError(f"tokenizer {path}, line {number}: no 'base64 rank' pair") from None
    if any(bytes([value]) not in ranks for value in range(256)):
        raise CorpusError(f"tokenizer {path} lacks some of the 256 single bytes")
    if len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0:
        raise CorpusError(f"tokenizer {path}: its ranks are not different numbers from 0")
    if max(ranks.values()) >= 2**31 - 1:
        raise CorpusError(f"tokenizer {path}: token id {max(ranks.values())} does not fit int32")
    return ranks


def require_eod_token(spec: EncoderSpec, eod_id: int | None) -> None:
    """Raise CorpusError where the token the user named does not exist."""
    if spec.eod_token and eod_id is None:
        raise CorpusError(f"tokenizer {spec.file} has no token {spec.eod_token!r} (--eod-token)")
