"""NCCL takes tensors of several dtypes in one coalesced gather or scatter, as gloo does not.

Megatron's buckets of a later model chunk are one group (core/distributed/param_and_grad_buffer.py
:504, :702): bfloat16 weights and the connections' float32 ones. One rank: what is asked is whether
torch hands each tensor to NCCL as its own dtype, outputs apart from inputs so that data must move.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _coalescing_manager

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def nccl():
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors() -> list[torch.Tensor]:
    dtypes = (torch.bfloat16, torch.float32)
    return [(torch.arange(64 + i, device="cuda") / 3).to(dtype) for i, dtype in enumerate(dtypes)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("collective", [dist.all_gather_into_tensor, dist.reduce_scatter_tensor])
def test_each_tensor_goes_as_its_own_dtype(collective, asynchronous) -> None:
    sent = tensors()
    arrived = [torch.full_like(tensor, -1) for tensor in sent]
    with _coalescing_manager(async_ops=asynchronous) as handle:
        for pair in zip(arrived, sent, strict=True):
            collective(*pair, async_op=asynchronous)
    if asynchronous:
        handle.wait()
    assert all(torch.equal(*pair) for pair in zip(arrived, sent, strict=True))


def test_an_all_reduce_of_two_dtypes_is_refused() -> None:
    """Why ``training.check_arguments`` refuses half-precision gradients that need one."""
    with pytest.raises(TypeError, match="identical type"), _coalescing_manager():
        for tensor in tensors():
            dist.all_reduce(tensor)
