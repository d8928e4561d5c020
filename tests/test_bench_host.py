"""tools/bench_host.py without a GPU: its line, and what it says where there is none."""

from __future__ import annotations

import re

import pytest
import torch

from tools import bench_host as bench


@pytest.mark.parametrize("norm", [[], ["--norm"]])
@pytest.mark.filterwarnings("ignore:mhc_kernels runs its eager reference")
def test_it_prints_its_line(capsys, norm):
    options = ["--device", "cpu", "--tokens", "2", "--channels", "16", "--steps", "2", *norm]
    assert bench.main(options) == 0
    assert re.fullmatch(r"forward \d+ us, backward \d+ us a sublayer\n", capsys.readouterr().out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_without_a_gpu(capsys):
    assert bench.main([]) == 2
    assert capsys.readouterr().err == "bench_host.py: needs a CUDA device.\n"
