"""Collectives of several dtypes at once on CPU processes, as Megatron issues them on NCCL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _coalescing_manager

from mhc_megatron import cpu
from tests.distributed.cluster import Cluster

pytestmark = pytest.mark.distributed

BF16, FP32 = torch.bfloat16, torch.float32
ORDERS = [(BF16, FP32), (FP32, BF16), (BF16, FP32, BF16), (BF16, BF16)]


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster


def gather(job: dict[str, Any]) -> list[bool]:
    """Whether each tensor is whole after the ranks' shards, [8 + 4 i] in all, were gathered."""
    if job.get("bare"):
        cpu.disable()
    rank, world = dist.get_rank(), dist.get_world_size()
    # Thirds: values whose float32 bits are no bfloat16 number.
    whole = [(torch.arange(8 + 4 * i) / 3 + i).to(dtype) for i, dtype in enumerate(job["dtypes"])]
    arrived = [torch.full_like(tensor, -1) for tensor in whole]
    for tensor, shards in zip(whole, arrived, strict=True):
        shards.chunk(world)[rank].copy_(tensor.chunk(world)[rank])
    with _coalescing_manager(async_ops=job["asynchronous"]) as handle:
        for tensor in arrived:
            dist.all_gather_into_tensor(
                tensor, tensor.chunk(world)[rank], async_op=job["asynchronous"]
            )
    if job["asynchronous"]:
        handle.wait()
    return [torch.equal(*pair) for pair in zip(arrived, whole, strict=True)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("dtypes", ORDERS, ids=str)
def test_shards_of_several_dtypes_arrive(cluster, dtypes, asynchronous) -> None:
    job = {"dtypes": dtypes, "asynchronous": asynchronous}
    for rank in cluster.run("tests.distributed.test_gloo:gather", 2, job):
        assert rank == [True] * len(dtypes)


def test_gloo_alone_still_scrambles_them(cluster) -> None:
    """When this fails torch has mended it, and ``cpu._by_dtype`` can go."""
    job = {"dtypes": (BF16, FP32), "asynchronous": False, "bare": True}
    for rank in cluster.run("tests.distributed.test_gloo:gather", 2, job):
        assert rank == [False, False]
