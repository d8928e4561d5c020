"""Fixtures that start Megatron-Core on the CPU: inside the test process, or on forked ranks."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes test, and start others

import pytest
import torch

from tests.distributed.cluster import Cluster

torch.set_num_threads(1)

#: Files that take the longest, in that order: they are begun first, so that processes end together.
LONG = (
    "test_slurm.py",
    "test_layouts.py",
    "test_pretrain.py",
    "test_checkpoint.py",
    "test_kernels.py",
    "test_faults.py",
    "test_convert_huggingface.py",
    "test_overlap.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Runs jobs on forked ranks; one server for all tests, as its imports take seconds."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def megatron_cpu():
    """Megatron-Core on one CPU 'device', one rank; undone when the module's tests are done."""
    if torch.cuda.is_available():
        pytest.skip("Megatron runs on the GPU here")
    import torch.distributed as dist

    from mhc_megatron import cpu

    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    cpu.disable()
