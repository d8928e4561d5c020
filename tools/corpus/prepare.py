"""A corpus to a pair, and a pair against its corpus: what ``tools/prepare_data.py`` runs.

    from tools.corpus.prepare import Options, prepare, stdlib_corpus
    sidecar = prepare(stdlib_corpus(), "data/stdlib", Options())

With ``workers`` above one the caller's main module must have the ``if __name__ == "__main__"``
guard, as for any process that Python's multiprocessing spawns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from tools.corpus import CorpusError
from tools.corpus.blocks import Encoded, Target, available_cpus, encoded
from tools.corpus.encoders import Encoder, EncoderSpec, dtype_of, load
from tools.corpus.indexed import SIDECAR_FORMAT, PairWriter, check_pair, entropy, read_pair
from tools.corpus.sources import Reading, SourceFile, cut, list_files, stdlib_files

#: Skipped places that the sidecar names; it counts all of them.
RECORDED = 1000


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, and the names of the sources they belong to."""

    sources: tuple[str, ...]
    files: list[SourceFile]


@dataclass(frozen=True)
class Options:
    """How a corpus is made.

    Attributes:
        spec, reading: how text becomes ids, and files become documents.
        append_eod: end every document with the encoder's end-of-document id.
        dtype: "auto" (Megatron's rule for the vocabulary), "uint16" or "int32".
        workers: processes; 0 takes one at byte level, else one for each CPU.
        force: overwrite a pair that exists.
        quiet: no progress bar.
    """

    spec: EncoderSpec = field(default_factory=EncoderSpec)
    reading: Reading = field(default_factory=Reading)
    append_eod: bool = True
    dtype: str = "auto"
    workers: int = 0
    force: bool = False
    quiet: bool = True


@dataclass
class Tally:
    """What has passed so far, a number for each source where it is an array."""

    documents: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray  # [vocab_size], how often each id occurred
    empty: int = 0
    bad: list[str] = field(default_factory=list)

    def add(self, block: Encoded) -> None:
        """Count a block."""
        self.documents[block.source] += len(block.lengths) - block.goes_on
        self.tokens[block.source] += block.tokens.size
        self.counts[block.ids] += block.counts
        self.empty += block.empty

    def by_source(self, corpus: Corpus) -> list[dict[str, Any]]:
        """The sidecar's summary of the sources."""
        files = np.bincount([file.source for file in corpus.files], minlength=len(corpus.sources))
        counts = (corpus.sources, files.tolist(), self.documents.tolist(), self.tokens.tolist())
        return [
            {"name": name, "files": f, "documents": d, "tokens": t}
            for name, f, d, t in zip(*counts, strict=True)
        ]


class Sink(Protocol):
    """Where the tokens go: to a file, or to a comparison."""

    def add(self, tokens: np.ndarray, lengths: np.ndarray, goes_on: bool, where: str) -> None:
        """Take the documents of a block."""


class Comparison:
    """A sink that compares with an existing pair; CorpusError at the first difference."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.pair = prefix, read_pair(prefix)
        self.token = self.document = self.open_tokens = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, goes_on: bool, where: str) -> None:
        """Compare the next documents; arguments as in ``PairWriter.add``."""
        there = self.pair.tokens[self.token : self.token + tokens.size]
        closed = lengths.copy()
        closed[:1] += self.open_tokens
        if goes_on:
            closed, self.open_tokens = closed[:-1], int(closed[-1])
        elif closed.size:
            self.open_tokens = 0
        documents = self.pair.lengths[self.document : self.document + closed.size]
        if not np.array_equal(there, tokens) or not np.array_equal(documents, closed):
            raise CorpusError(
                f"{self.prefix} differs from its sources at or after {where} "
                f"(document {self.document + 1} of the pair)"
            )
        self.token += tokens.size
        self.document += closed.size

    def finish(self) -> None:
        """Raise CorpusError if the pair holds more than was compared."""
        if self.document != self.pair.lengths.size:
            raise CorpusError(f"{self.prefix} holds more documents than its sources")


def corpus_of(sources: Sequence[str], reading: Reading) -> Corpus:
    """The corpus of files and folders; CorpusError if there is none."""
    return Corpus(tuple(map(str, sources)), list_files(sources, reading))


def stdlib_corpus(with_tests: bool = False) -> Corpus:
    """The sources of the running Python's standard library."""
    name = f"standard library of Python {sys.version.split()[0]}"
    return Corpus((name + (" with tests" if with_tests else ""),), stdlib_files(with_tests))


def prepare(corpus: Corpus, prefix: str, options: Options = Options()) -> dict[str, Any]:
    """Make PREFIX.bin, PREFIX.idx and PREFIX.json; returns the contents of the last.

    A file, line or row that cannot be read is left out and named in ``skipped``.

    Raises:
        CorpusError: why there is no pair. Nothing is written and nothing overwritten then.
    """
    encoder = load(options.spec)
    if options.append_eod and encoder.eod_id is None:
        raise CorpusError(
            f"tokenizer {options.spec.file} has no end-of-document token of a known name; give "
            "--eod-token or --no-eod"
        )
    dtype = dtype_of(encoder, options.dtype)
    with PairWriter(prefix, dtype, options.force) as writer:
        tally = feed(corpus, options, encoder, dtype, writer)
        if not tally.documents.sum():
            raise CorpusError(f"the corpus is empty: no text in {', '.join(corpus.sources)}")
        facts = {
            "format": SIDECAR_FORMAT,
            "vocab_size": encoder.vocab_size,
            "eod_id": encoder.eod_id,
            "append_eod": options.append_eod,
            "documents": int(tally.documents.sum()),
            "tokens": int(tally.tokens.sum()),
            "dtype": dtype.name,
            "unigram_entropy": entropy(tally.counts),
            "tokenizer": {**asdict(options.spec), "sha256": options.spec.sha256()},
            "reading": asdict(options.reading),
            "sources": tally.by_source(corpus),
            "empty_documents": tally.empty,
            "skipped": {"count": len(tally.bad), "first": tally.bad[:RECORDED]},
        }
        return writer.commit(facts)


def verify(
    prefix: str,
    corpus: Callable[[Reading], Corpus] | None = None,
    tokenizer: str = "",
    workers: int = 0,
    quiet: bool = True,
) -> dict[str, Any]:
    """Check a pair against its sidecar and, given its sources, against what they encode to.

    ``corpus`` receives the recorded way of reading. The other options are the recorded ones too,
    but for where the ``tokenizer`` lies now.

    Returns the sidecar. Raises CorpusError for the first thing that is wrong.
    """
    sidecar = check_pair(prefix)
    if corpus is None:
        return sidecar
    options = replace(recorded_options(sidecar), workers=workers, quiet=quiet)
    if tokenizer:
        options = replace(options, spec=replace(options.spec, file=tokenizer))
    encoder = load(options.spec)
    if options.spec.sha256() != sidecar["tokenizer"]["sha256"]:
        raise CorpusError(f"{options.spec.file} is not the tokenizer {prefix} was made with")
    comparison = Comparison(prefix)
    feed(corpus(options.reading), options, encoder, np.dtype(sidecar["dtype"]), comparison)
    comparison.finish()
    return sidecar


def recorded_options(sidecar: dict[str, Any]) -> Options:
    """The options that a sidecar records."""
    spec = {key: value for key, value in sidecar["tokenizer"].items() if key != "sha256"}
    reading = dict(sidecar["reading"])
    reading["suffixes"] = tuple(reading["suffixes"])
    return Options(
        spec=EncoderSpec(**spec),
        reading=Reading(**reading),
        append_eod=sidecar["append_eod"],
        dtype=sidecar["dtype"],
    )


def feed(corpus: Corpus, options: Options, encoder: Encoder, dtype: np.dtype, sink: Sink) -> Tally:
    """Pass every document of a corpus to a sink, in order; what cannot be read is noted."""
    tally = Tally(
        documents=np.zeros(len(corpus.sources), np.int64),
        tokens=np.zeros(len(corpus.sources), np.int64),
        counts=np.zeros(encoder.vocab_size, np.int64),
    )
    target = Target(options.spec, options.append_eod, dtype, options.reading.json_key)
    workers = options.workers or (available_cpus() if encoder.is_text else 1)
    blocks = encoded(cut(corpus.files, options.reading, encoder.is_text), encoder, target, workers)
    size = sum(file.size for file in corpus.files)
    is_silent = options.quiet or not sys.stderr.isatty()
    with tqdm(total=size, unit="B", unit_scale=True, disable=is_silent) as bar:
        for block in blocks:
            tally.bad += [f"{place}: {reason}" for place, reason in block.bad]
            sink.add(block.tokens, block.lengths, block.goes_on, block.path)
            tally.add(block)
            if not is_silent:
                bar.update(block.size)
                rate = tally.tokens.sum() / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
    return tally
