"""Megatron's batches through an NVIDIA DALI pipeline: the same ones, bit for bit.

What a batch holds is decided by Megatron's dataset (blending, shuffling, the ``.bin`` and ``.idx``
files) and by the place that Megatron's sampler would read at: the k-th microbatch of
data-parallel rank r begins at sample ``consumed + (k * ranks + r) * micro_batch_size``. DALI's
worker processes read it ahead, and its pipeline copies it to the GPU ahead of time. A resumed run
begins at its consumed samples, which Megatron's checkpoint has.

Needs the extra ``[dali]``. Without a GPU the pipeline runs on the CPU alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhc_megatron.errors import UserError


class Reader:
    """The k-th microbatch of one data-parallel rank; DALI calls it in its worker processes.

    Args:
        dataset: Megatron's; ``dataset[i]`` is a dict of tensors.
        keys: what is taken of it, in order.
        consumed: samples that training has seen, over all ranks.
        micro_batch: samples of a rank's microbatch.
        rank, ranks: the data-parallel ones.
    """

    def __init__(
        self, dataset: Any, keys: list[str], consumed: int, micro_batch: int, rank: int, ranks: int
    ) -> None:
        self.dataset, self.keys, self.consumed = dataset, keys, consumed
        self.micro_batch, self.rank, self.ranks = micro_batch, rank, ranks

    def __len__(self) -> int:
        """Microbatches left; an incomplete batch over all ranks is dropped, as Megatron does."""
        return max(0, (len(self.dataset) - self.consumed) // (self.micro_batch * self.ranks))

    def __call__(self, number: int) -> tuple[np.ndarray, ...]:
        if number >= len(self):
            raise StopIteration
        first = self.consumed + (number * self.ranks + self.rank) * self.micro_batch
        samples = [self.dataset[i] for i in range(first, first + self.micro_batch)]
        return tuple(np.stack([np.asarray(sample[key]) for sample in samples]) for key in self.keys)


class DaliLoader:
    """An iterable over microbatches, dicts of tensors [micro_batch, ...] as Megatron's loader has.

    Args:
        reader: what is read.
        workers: processes that read ahead; 0 reads in this one.
        depth: microbatches that are read ahead.
        device: index of the GPU that batches are copied to; None leaves them on the CPU.
    """

    def __init__(
        self, reader: Reader, workers: int = 2, depth: int = 2, device: int | None = None
    ) -> None:
        self.reader, self.workers, self.depth, self.device = reader, workers, depth, device

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        # One DALI sample is a whole microbatch: its first dimension is the microbatch's.
        batches = DALIGenericIterator(
            [self._pipeline()], self.reader.keys, auto_reset=False, prepare_first_batch=False
        )
        dtypes = self._dtypes()
        for (outputs,) in batches:
            yield {key: outputs[key][0].to(dtypes[key]) for key in self.reader.keys}

    def _pipeline(self) -> Any:
        from nvidia.dali import fn, pipeline_def

        options: dict[str, Any] = {"num_outputs": len(self.reader.keys), "batch": False}
        if self.workers:
            options |= {"parallel": True, "prefetch_queue_depth": self.depth}

        @pipeline_def(
            batch_size=1,
            num_threads=1,
            device_id=self.device,
            prefetch_queue_depth=self.depth,
            py_num_workers=max(1, self.workers),
            py_start_method="spawn",  # a fork of a process that uses CUDA and threads is not safe
        )
        def pipeline():
            outputs = fn.external_source(source=_Samples(self.reader), **options)
            if self.device is not None:
                outputs = [output.gpu() for output in outputs]
            return tuple(outputs)

        built = pipeline()
        if self.workers:
            built.start_py_workers()
        built.build()
        return built

    def _dtypes(self) -> dict[str, torch.dtype]:
        sample = self.reader.dataset[0]
        return {key: torch.as_tensor(sample[key]).dtype for key in self.reader.keys}


class _Samples:
    """``Reader`` for DALI, which counts samples in its own way."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, info: Any) -> tuple[np.ndarray, ...]:
        return self.reader(info.idx_in_epoch)


def is_installed() -> bool:
    """Whether DALI can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of NVIDIA's at all
        return False


def install(workers: int | None = None) -> None:
    """Make ``megatron.training`` build its training loader here.

    Replaces ``build_pretraining_data_loader`` as training/training.py:147 imported it; validation
    and test sets keep Megatron's own.

    Raises:
        UserError: DALI is not installed.
    """
    if not is_installed():
        raise UserError("run.data_loader: dali: nvidia-dali is not installed (the extra [dali]).")
    from megatron.core import mpu
    from megatron.core.datasets.utils import Split
    from megatron.training import get_args
    from megatron.training import training as megatron_training

    plain = megatron_training.build_pretraining_data_loader

    def build(dataset: Any, consumed_samples: int) -> Any:
        args = get_args()
        split = getattr(dataset, "split", getattr(dataset, "index_split", None))
        if dataset is None or split in (Split.valid, Split.test):
            return plain(dataset, consumed_samples)
        if args.dataloader_type != "single":
            raise UserError("run.data_loader: dali reads in order: dataloader-type: single.")
        reader = Reader(
            dataset,
            list(dataset[0]),
            consumed_samples,
            args.micro_batch_size,
            mpu.get_data_parallel_rank(),
            mpu.get_data_parallel_world_size(),
        )
        from mhc_megatron import cpu

        device = None if cpu.enabled() else torch.cuda.current_device()
        return DaliLoader(reader, args.num_workers if workers is None else workers, 2, device)

    megatron_training.build_pretraining_data_loader = build
