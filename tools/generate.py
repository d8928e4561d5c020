#!/usr/bin/env python3
"""Continue a text with a model that launch/pretrain.py trained.

    tools/generate.py runs/tiny/mhc --prompt 'def main(' --tokens 200
    tools/generate.py runs/tiny/mhc --prompt 'import ' --temperature 0.8 --top-p 0.95 --seed 7

RUN is a run's folder, the folder of its checkpoints, or one checkpoint (iter_0000400). Settings and
hyper-connections come with the checkpoint, whatever layout trained it. The tokenizer is the one
that tools/prepare_data.py recorded beside the run's corpus, or else --tokenizer. Prompt and
continuation go to stdout as they come. Exit code 2: no such or no whole checkpoint, a prompt longer
than the model's positions, and the like; one sentence on stderr says which.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import logging
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from mhc_megatron.errors import UserError, quiet_pipe  # noqa: E402
from tools.corpus import CorpusError  # noqa: E402
from tools.corpus.encoders import Encoder, EncoderSpec, encoder_spec, load  # noqa: E402


@quiet_pipe
def main(arguments: Sequence[str] | None = None) -> int:
    """Generate what the command line asks for; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
        return 0
    except (UserError, CorpusError) as error:
        print(f"generate.py: {str(error).rstrip('.')}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Continue a text with a trained model."
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, its checkpoints' folder, or one checkpoint")
    add("--prompt", required=True, help="the text to continue")
    add("--tokens", type=int, default=100, metavar="N", help="at most this many; default 100")
    add("--step", type=int, metavar="N", help="the checkpoint of this step; default: the latest")
    add("--temperature", type=float, metavar="T",
        help="0 takes the most probable token; default: 0, 1 with --top-k or --top-p")  # fmt: skip
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="draw from the fewest tokens that together have probability P")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draws; default 0")
    add("--tokenizer", metavar="NAME", help="'bytes', tokenizer.json, *.model or *.tiktoken")
    add("--no-cache", action="store_true",
        help="run the whole text again for every token, without a KV cache")  # fmt: skip
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.step is not None and options.step < 0:
        raise UserError(f"the step must be at least 0, not {options.step}")
    with _quiet():
        import torch

        from mhc_megatron import cpu

        if not torch.cuda.is_available():
            cpu.enable()
        from mhc_megatron import generation

        sampling = generation.Sampling(
            _temperature(options), options.top_k, options.top_p, options.seed
        )
        checkpoint = generation.find_checkpoint(options.run, options.step)
        args, mhc = generation.read_arguments(checkpoint)
        encoder = find_encoder(args, options.tokenizer)
        prompt = _encoded(options.prompt, encoder)
        # Before the weights are read: they may be many.
        generation.check_prompt(
            prompt, options.tokens, encoder.vocab_size, args.max_position_embeddings
        )
        if encoder.vocab_size > args.padded_vocab_size:
            raise UserError(
                f"the tokenizer has {encoder.vocab_size:,} tokens, the model "
                f"{args.padded_vocab_size:,}; --tokenizer names another one"
            )
        model = generation.load_model(checkpoint, args, mhc)
    tokens = generation.generate(
        model,
        prompt,
        options.tokens,
        sampling,
        vocab_size=encoder.vocab_size,
        stop=encoder.eod_id,
        cache=not options.no_cache,
    )
    _write(options.prompt, prompt, tokens, encoder)


def _temperature(options: argparse.Namespace) -> float:
    if options.temperature is not None:
        return options.temperature
    return 1.0 if options.top_k or options.top_p != 1.0 else 0.0


def _encoded(text: str, encoder: Encoder) -> list[int]:
    document = _utf8(text)
    try:
        return [int(i) for i in encoder.encode([document])[0]]
    except Exception as error:  # the libraries raise bare Exception
        said = " ".join(str(error).split())
        raise UserError(f"the tokenizer refuses the prompt ({said})") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no text
        raise UserError("the prompt must be UTF-8 text") from None


@contextlib.contextmanager
def _quiet():
    """Without Megatron's messages, which are about training and about packages for GPUs."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _write(text: str, prompt: list[int], tokens, encoder: Encoder) -> None:
    """Prompt and continuation to stdout, a character as soon as all of it is there."""
    out = sys.stdout
    out.write(text)
    out.flush()
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    ids, shown = list(prompt), encoder.decode(prompt)
    for token in tokens:
        ids.append(token)
        # Some tokenizers decide on spaces only when they see what comes before.
        whole = encoder.decode(ids)
        if whole.startswith(shown) and not (encoder.is_text and whole.endswith("\ufffd".encode())):
            out.write(decode(whole[len(shown) :]))
            out.flush()
            shown = whole
    rest = encoder.decode(ids)[len(shown) :]
    out.write(decode(rest, final=True) + "\n")
    out.flush()


# -------------------------------------------------------------------------------------- tokenizer


def find_encoder(args: Namespace, name: str | None) -> Encoder:
    """The tokenizer that the user names, or the one beside the run's corpus.

    Raises:
        UserError: neither is there.
        CorpusError: its file cannot be used.
    """
    if name is not None:
        return load(encoder_spec(name))
    for prefix in prefixes(args):
        recorded = _sidecar(prefix)
        if recorded is not None:
            return load(recorded)
    raise UserError(
        "the run's corpus, which would say what its tokenizer is, is not here; "
        "name one with --tokenizer"
    )


def prefixes(args: Namespace) -> list[str]:
    """What the run gave as paths of data; weights between them do no harm."""
    given = (args.data_path, args.train_data_path, args.valid_data_path)
    return [str(word) for words in given for word in words or []]


def _sidecar(prefix: str) -> EncoderSpec | None:
    """The tokenizer in PREFIX.json, which tools/prepare_data.py writes."""
    try:
        with open(prefix + ".json", encoding="utf-8") as f:
            recorded = json.load(f)["tokenizer"]
        return EncoderSpec(
            **{key: str(recorded[key]) for key in ("kind", "file", "pattern", "eod_token")}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    sys.exit(main())
