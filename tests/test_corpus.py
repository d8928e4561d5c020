"""mhc_megatron/corpus.py: the indices that Megatron caches. Its checks: test_pretrain.py."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from megatron.core.datasets import gpt_dataset

from mhc_megatron.corpus import whole_indices


def test_megatrons_index_is_written(tmp_path) -> None:
    path = tmp_path / "a-sample_index.npy"
    plain = np.save
    with whole_indices():
        gpt_dataset.numpy.save(str(path), np.arange(5), allow_pickle=True)
    assert np.save is plain
    assert np.array_equal(np.load(path, mmap_mode="r"), np.arange(5))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_what_was_there(there, tmp_path, monkeypatch) -> None:
    """The old index, or none, which Megatron builds again; never a cut one."""
    path = tmp_path / "a-sample_index.npy"
    if there:
        np.save(path, np.zeros(3))

    def half(f, *args, **kwargs):
        f.write(b"\x93NUMPY")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", half)
    with whole_indices(), pytest.raises(OSError, match="No space"):
        gpt_dataset.numpy.save(str(path), np.arange(5))
    assert os.listdir(tmp_path) == ([path.name] if there else [])
    if there:
        assert np.array_equal(np.load(path), np.zeros(3))
