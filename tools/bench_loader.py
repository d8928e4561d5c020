#!/usr/bin/env python3
"""Megatron's data loader beside the DALI one (``run.data_loader``): speed, and what a step waits.

    tools/bench_loader.py --data data/corpus --seq-length 4096 --micro-batch-size 1
    tools/bench_loader.py --tokens 100000000 --workers 0,2 --step-ms 0,20 --cold

Both loaders read the same samples of the same corpus, one data-parallel rank's, and take turns.
``--tokens`` makes a corpus of random tokens (int32) in a temporary folder. With ``--step-ms 0``
batches are taken as fast as they come, which gives samples/s and tokens/s; with more, each is
followed by a pause in place of a step, and ``waited`` is what a step waits beside it. ``CPU`` is
processor time of this process and its workers a sample. ``--cold`` drops the corpus from the page
cache before each round (posix_fadvise; nobody else may have it mapped), otherwise it is read whole
before each. Of the rounds are printed the median, and the slowest and fastest of tokens/s.

With a GPU, batches end in its memory. Exit code 0; 2 for bad arguments or where DALI is missing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for _path in (os.path.join(_ROOT, "kernels"), _ROOT):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from mhc_megatron.errors import Parser, UserError  # noqa: E402

#: Batches before a round's clock starts: workers come up, queues fill.
WARM_UP = 8


@dataclass
class Round:
    """One loader's round: seconds in all, of them waiting, CPU seconds, all for ``batches``."""

    loader: str
    workers: int
    step_ms: float
    batches: int
    seconds: float
    waited: float
    cpu: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            prefix = options.data or os.path.join(folder, "random")
            if options.tokens:
                write_random(prefix, options.tokens)
            return _bench(options, prefix, folder)
    except (UserError, OSError) as error:
        print(f"bench_loader: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bench_loader", description=__doc__.partition("\n\n")[0])
    corpus = parser.add_mutually_exclusive_group(required=True)
    corpus.add_argument("--data", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    corpus.add_argument("--tokens", type=_positive, help="random tokens to make a corpus of")
    parser.add_argument("--folder", help="for the random corpus and the index, meanwhile")
    parser.add_argument("--seq-length", type=_positive, default=4096)
    parser.add_argument("--micro-batch-size", type=_positive, default=1)
    parser.add_argument("--workers", type=_numbers, default=[0, 2], metavar="N,...")
    parser.add_argument("--step-ms", type=_numbers, default=[0], metavar="MS,...")
    parser.add_argument("--batches", type=_positive, default=200, help="a round's")
    parser.add_argument("--rounds", type=_positive, default=5)
    parser.add_argument("--loaders", nargs="+", choices=_LOADERS, default=list(_LOADERS))
    parser.add_argument("--cold", action="store_true", help="not from the page cache")
    parser.add_argument("--json", metavar="FILE", help="write the rounds there too")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def _numbers(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {text}")
    return found


def write_random(prefix: str, tokens: int) -> None:
    """A corpus of ``tokens`` random int32 tokens in documents of about a thousand."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    while tokens > 0:
        length = min(tokens, int(rng.integers(100, 2000)))
        builder.add_document(rng.integers(0, 129280, length, dtype=np.int32), [length])
        tokens -= length
    builder.finalize(prefix + ".idx")


def _bench(options: argparse.Namespace, prefix: str, folder: str) -> int:
    from mhc_megatron import dali
    from mhc_megatron.corpus import check_corpus

    if "dali" in options.loaders and not dali.is_installed():
        raise UserError("nvidia-dali is not installed (the extra [dali]).")
    check_corpus(prefix, sequence_length=options.seq_length, vocab_size=1 << 31)
    logging.disable(logging.INFO)
    needed = (WARM_UP + options.batches) * options.micro_batch_size
    make_dataset(prefix, options.seq_length, needed, folder)  # writes the index, for those below
    rounds: list[Round] = []
    for step_ms, workers, _, loader in itertools.product(  # in turns: a busy machine is so for all
        options.step_ms, options.workers, range(options.rounds), options.loaders
    ):
        gc.collect()  # what is mapped cannot be dropped
        (_drop if options.cold else _read)(prefix + ".bin")
        dataset = make_dataset(prefix, options.seq_length, needed, folder)
        batches = _LOADERS[loader](dataset, options.micro_batch_size, workers)
        measured = measure(batches, options.batches, step_ms / 1e3)
        rounds.append(Round(loader, workers, step_ms, options.batches, *measured))
        del dataset, batches
    if options.json:
        with open(options.json, "w", encoding="utf-8") as f:
            json.dump({"options": vars(options), "rounds": list(map(asdict, rounds))}, f, indent=1)
    print(table(rounds, options.micro_batch_size, options.seq_length))
    return 0


def make_dataset(prefix: str, sequence_length: int, samples: int, cache: str) -> Any:
    """Megatron's GPTDataset as launch/pretrain.py builds it, on one rank; index under ``cache``."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    from mhc_megatron.training import skip_dataset_compilation

    skip_dataset_compilation()
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=sequence_length,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=os.path.join(cache, "index"),
        tokenizer=NullTokenizer(vocab_size=129280),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    build = BlendedMegatronDatasetBuilder(
        GPTDataset, [samples, None, None], lambda: True, config
    )
    return build.build()[0]


def _megatron(dataset: Any, micro_batch: int, workers: int) -> Iterable[dict]:
    """What megatron/training/datasets/data_samplers.py:101 builds, and get_batch's copy."""
    import torch
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=MegatronPretrainingSampler(len(dataset), 0, micro_batch, 0, 1),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )
    if not torch.cuda.is_available():
        return loader
    return ({key: x.cuda(non_blocking=True) for key, x in batch.items()} for batch in loader)


def _dali(dataset: Any, micro_batch: int, workers: int) -> Iterable[dict]:
    import torch

    from mhc_megatron.dali import DaliLoader, Reader

    reader = Reader(dataset, list(dataset[0]), 0, micro_batch, 0, 1)
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return DaliLoader(reader, workers, 2, device)


_LOADERS = {"megatron": _megatron, "dali": _dali}


def measure(batches: Iterable[dict], count: int, pause: float) -> tuple[float, float, float]:
    """(seconds, seconds waited for batches, CPU seconds) of ``count`` batches, after some more."""
    import torch

    taken = iter(batches)
    for _ in range(WARM_UP):
        next(taken)
    waited, cpu, began = 0.0, _cpu_seconds(), time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        next(taken)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        waited += time.perf_counter() - asked
        if pause:
            time.sleep(pause)
    return time.perf_counter() - began, waited, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    """User and system time of this process and of the workers below it."""
    import psutil

    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def _read(path: str) -> None:
    with open(path, "rb", buffering=0) as f:
        while f.read(1 << 24):
            pass


def _drop(path: str) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(rounds: list[Round], micro_batch: int, sequence_length: int) -> str:
    """The medians, in Markdown."""
    lines = ["| step, ms | workers | loader | samples/s | tokens/s | slowest to fastest | "
             "CPU, ms a sample | waited, ms a batch |",
             "|---:|---:|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for step_ms, workers, loader in dict.fromkeys((r.step_ms, r.workers, r.loader) for r in rounds):
        same = [
            r for r in rounds if (r.step_ms, r.workers, r.loader) == (step_ms, workers, loader)
        ]
        speeds = sorted(r.batches * micro_batch / r.seconds for r in same)
        speed = statistics.median(speeds)
        cpu = statistics.median(r.cpu / r.batches / micro_batch for r in same) * 1e3
        waited = statistics.median(r.waited / r.batches for r in same) * 1e3
        low, high = (f"{s * sequence_length:,.0f}" for s in (speeds[0], speeds[-1]))
        lines.append(
            f"| {step_ms:g} | {workers} | {loader} | {speed:,.0f} | {speed * sequence_length:,.0f} "
            f"| {low} to {high} | {cpu:.2f} | {waited:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
