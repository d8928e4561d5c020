#!/usr/bin/env python3
"""Make a Megatron ``.bin`` / ``.idx`` pair from the text a user has.

    python tools/prepare_data.py --stdlib --output data/stdlib
    tools/prepare_data.py books/ more.jsonl.zst --output data/books --tokenizer tokenizer.json
    tools/prepare_data.py --verify data/books [SOURCE ...]

Sources are files or folders (searched through, sorted by name): .txt, .jsonl, both also .gz or
.zst, .parquet, and with ``--suffix`` any other text. Without ``--tokenizer`` a token is a byte:
ids 0-255, end of document 256. ``PREFIX.json`` records vocabulary, end-of-document id, counts,
unigram entropy, tokenizer and checksums. Megatron divides training from validation (``--split``).

The corpus is the same to the byte for any number of workers. Memory does not grow with it but for
4 bytes a document: each worker has three blocks of 1 MiB under way (or one document, line or
parquet column chunk, where that is longer; plain text at byte level is cut, however long).

A pair appears whole or not at all. A file, line or row that cannot be read is named and left out;
the rest is kept, and the exit code is 2 unless ``--skip-bad`` says that this will do.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mhc_megatron.errors import Parser, quiet_pipe
from tools.corpus import CorpusError
from tools.corpus.encoders import PATTERNS, encoder_path, encoder_spec
from tools.corpus.prepare import Corpus, Options, corpus_of, prepare, stdlib_corpus, verify
from tools.corpus.sources import Reading

#: Skipped places that are named on the terminal.
SHOWN = 20


class Interrupted(BaseException):
    """A signal asks the run to end."""


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="prepare_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="files and folders")
    add("--stdlib", action="store_true", help="the Python standard library's sources, as bytes")
    add("--stdlib-tests", action="store_true", help="the same with its tests")
    add("--output", metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx and PREFIX.json")
    add("--verify", metavar="PREFIX", help="check a pair, against its sources too if given")
    add("--suffix", action="append", default=[], help="read such files as text, e.g. .py")
    add("--per-line", action="store_true", help="each line of a text file is a document")
    add("--json-key", default="text", help="field of a JSON line (default: text)")
    add("--column", default="text", help="parquet column (default: text)")
    add("--tokenizer", default="bytes", help="tokenizer.json, *.model or *.tiktoken file")
    add("--pattern", default="", help=f"tiktoken: regular expression or {', '.join(PATTERNS)}")
    add("--eod-token", default="", help="text of the tokenizer's end-of-document token")
    add("--no-eod", action="store_true", help="append no end-of-document id")
    add("--dtype", default="auto", choices=("auto", "uint16", "int32"))
    add("--workers", type=int, help="processes (default: 1 for bytes, else one for each CPU)")
    add("--skip-bad", action="store_true", help="exit with 0 though input was left out")
    add("--force", action="store_true", help="overwrite an existing pair")
    add("--quiet", action="store_true", help="no progress bar, no summary")
    return parser


def requested_corpus(arguments: argparse.Namespace, reading: Reading) -> Corpus:
    """The corpus that the command line names."""
    if arguments.stdlib or arguments.stdlib_tests:
        return stdlib_corpus(arguments.stdlib_tests)
    return corpus_of(arguments.sources, reading)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise CorpusError for a contradiction."""
    has_stdlib = arguments.stdlib or arguments.stdlib_tests
    if (arguments.output is None) == (arguments.verify is None):
        raise CorpusError("give either --output PREFIX or --verify PREFIX")
    if arguments.verify is not None:
        check_recorded(arguments)
    if has_stdlib and (arguments.sources or arguments.suffix):
        raise CorpusError("--stdlib takes no other sources and no --suffix")
    if arguments.workers is not None and arguments.workers < 1:
        raise CorpusError(f"--workers {arguments.workers}: at least 1 is needed")
    if any(not suffix.strip(".") for suffix in arguments.suffix):
        raise CorpusError("--suffix is empty")
    prefix = arguments.output if arguments.verify is None else arguments.verify
    if not Path(prefix).name or prefix.endswith("/") or os.path.isdir(prefix):
        raise CorpusError(f"{prefix!r} is a folder; give a PREFIX such as {prefix or '.'}/corpus")


def check_recorded(arguments: argparse.Namespace) -> None:
    """Raise CorpusError for an option that --verify takes from the sidecar."""
    free = {"sources", "stdlib", "stdlib_tests", "output", "verify"}
    free |= {"tokenizer", "workers", "quiet"}
    for name, value in vars(arguments).items():
        if name not in free and value != parser().get_default(name):
            option = name.replace("_", "-")
            raise CorpusError(f"--{option}: --verify takes it as PREFIX.json recorded it")


def options_of(arguments: argparse.Namespace) -> Options:
    """What the command line asks for."""
    return Options(
        spec=encoder_spec(arguments.tokenizer, arguments.pattern, arguments.eod_token),
        reading=Reading(
            json_key=arguments.json_key,
            column=arguments.column,
            suffixes=tuple("." + suffix.lstrip(".") for suffix in arguments.suffix),
            per_line=arguments.per_line,
        ),
        append_eod=not arguments.no_eod,
        dtype=arguments.dtype,
        workers=arguments.workers or 0,
        force=arguments.force,
        quiet=arguments.quiet,
    )


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; the exit code. CorpusError if it cannot be done."""
    check_arguments(arguments)
    start = time.perf_counter()
    if arguments.verify is not None:
        has_sources = arguments.sources or arguments.stdlib or arguments.stdlib_tests
        corpus = (lambda reading: requested_corpus(arguments, reading)) if has_sources else None
        moved = "" if arguments.tokenizer == "bytes" else encoder_path(arguments.tokenizer)
        sidecar = verify(arguments.verify, corpus, moved, arguments.workers or 0, arguments.quiet)
        if not arguments.quiet:
            print(f"{arguments.verify} is sound: {summary(sidecar)}")
        return 0
    options = options_of(arguments)
    sidecar = prepare(requested_corpus(arguments, options.reading), arguments.output, options)
    report_skipped(sidecar["skipped"])
    if not arguments.quiet:
        seconds = time.perf_counter() - start
        rate = f"{seconds:.1f} s, {sidecar['tokens'] / seconds:,.0f} tokens/s"
        print(f"{arguments.output}: {summary(sidecar)}; {rate}")
    if sidecar["skipped"]["count"] and not arguments.skip_bad:
        print(
            f"prepare_data.py: {arguments.output} is without what was skipped above; mend it and "
            "use --force, or accept it with --skip-bad",
            file=sys.stderr,
        )
        return 2
    return 0


def summary(sidecar: dict[str, Any]) -> str:
    """A corpus in a line."""
    return (
        f"{sidecar['documents']:,} documents, {sidecar['tokens']:,} tokens ({sidecar['dtype']}), "
        f"vocabulary {sidecar['vocab_size']:,}, unigram entropy "
        f"{sidecar['unigram_entropy']:.4f} nats a token"
    )


def report_skipped(skipped: dict[str, Any]) -> None:
    """Name on stderr what was left out."""
    for place in skipped["first"][:SHOWN]:
        print(f"skipped {place}", file=sys.stderr)
    rest = skipped["count"] - min(skipped["count"], SHOWN)
    if rest:
        print(f"skipped {rest} more, see the sidecar", file=sys.stderr)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler: unwind once; further signals wait for the clean-up."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)


@quiet_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for bad input, 128 + the signal's number."""
    arguments = parser().parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a shell's background job
            signal.signal(number, interrupt)
    try:
        return run(arguments)
    except CorpusError as error:
        print(f"prepare_data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as error:
        name = signal.Signals(error.args[0]).name
        print(f"prepare_data.py: stopped by {name}; no unfinished pair is left", file=sys.stderr)
        return 128 + error.args[0]


if __name__ == "__main__":
    sys.exit(main())
