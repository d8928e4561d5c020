"""GPU tests share a process: what one file sets up is taken down before the next one begins."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="module", autouse=True)
def process_as_it_was():
    """Environment and process groups. Megatron sets NVTE_* for a model's attention, and a model
    with another attention then refuses to be built (language_module.py:118)."""
    import torch

    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
