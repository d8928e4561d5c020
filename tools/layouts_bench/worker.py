"""One rank's process: runs jobs of tests/distributed/job.py, one after the other.

    python worker.py --gpu 0 --device cuda --store-port 29500

Reads (key, rank, world, job) from standard input and answers (failed, value) on standard output,
as tests/distributed/cluster.py frames them. Every job makes its process groups and ends them, under
``key`` in the store that the parent serves: a new job may have other ranks and another layout.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
for _path in (str(_ROOT / "tools"), str(_ROOT / "kernels"), str(_ROOT)):
    if _path not in sys.path:
        sys.path.insert(0, _path)

#: Seconds after which NCCL or gloo gives a collective up.
COLLECTIVE_SECONDS = 120
#: Seconds for the end of a job's groups.
TIDY_SECONDS = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu", type=int, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--store-port", type=int, required=True)
    options = parser.parse_args()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log
    import torch

    if options.device == "cpu":
        torch.set_num_threads(1)
        from mhc_megatron import cpu

        cpu.enable()
    from layouts_bench import plan  # noqa: F401  (the sizes of tests/distributed/data.py)

    from tests.distributed import cluster, job

    while True:
        try:
            key, rank, world, work = cluster._receive(requests)
        except cluster.RankError:
            os._exit(0)
        try:
            answer, clean = (False, run(options, job, key, rank, world, work)), tidied(options)
        except BaseException:
            answer, clean = (True, traceback.format_exc()), False
            print(answer[1], file=sys.stderr, flush=True)
        cluster._send(answers, answer)
        if not clean:
            os._exit(1)  # another process takes the GPU


def run(options: argparse.Namespace, jobs, key: str, rank: int, world: int, work: dict[str, Any]):
    """The job's result on this rank."""
    import torch
    import torch.distributed as dist

    if options.device == "cuda":
        torch.cuda.set_device(options.gpu)
    deterministic = "0" if work["deterministic"] else "1"
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(options.gpu),
        # Read when Transformer Engine's attention is built.
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": deterministic,
    }  # fmt: skip
    store = dist.TCPStore("127.0.0.1", options.store_port, is_master=False)
    dist.init_process_group(
        "nccl" if options.device == "cuda" else "gloo",
        store=dist.PrefixStore(key, store),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    with untouched():
        result = jobs.train_both(work)
    dist.barrier()
    gc.collect()
    return result


def tidied(options: argparse.Namespace) -> bool:
    """Whether the job's groups and models are gone; a result is not lost because they are not."""
    done = threading.Event()

    def tidy() -> None:
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state

        if options.device == "cuda":
            torch.cuda.set_device(options.gpu)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        forget()
        done.set()

    # NCCL's end of a communicator waits for the other rank's.
    threading.Thread(target=tidy, daemon=True).start()
    return done.wait(TIDY_SECONDS)


class untouched:
    """Puts back what a layout replaces in Megatron (tests/distributed/models.py)."""

    def __enter__(self) -> None:
        from megatron.core.transformer import multi_latent_attention
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        name = "gather_from_tensor_model_parallel_region"
        places = ((DotProductAttention, "__init__"), (DotProductAttention, "forward"),
                  (multi_latent_attention, name))  # fmt: skip
        self._saved = [(place, name, getattr(place, name)) for place, name in places]

    def __exit__(self, *error: object) -> None:
        for place, name, value in self._saved:
            setattr(place, name, value)


def forget() -> None:
    """Drop what Megatron and Transformer Engine keep from one model for the next."""
    import torch
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker = {}
    destroy_moe_metrics_tracker()
    try:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager
    except ImportError:
        pass
    else:
        FP8GlobalStateManager.reset()
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
