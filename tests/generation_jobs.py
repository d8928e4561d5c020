"""What tests/test_generate.py runs in forked processes (tests/distributed/cluster.py)."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any


def train(job: dict[str, Any]) -> int:
    """A run of launch/pretrain.py; its exit code."""
    from launch.pretrain import main

    return main(job["arguments"])


def generate(job: dict[str, Any]) -> tuple[int, str, str]:
    """tools/generate.py: exit code, stdout, stderr."""
    from tools.generate import main

    os.environ.pop("WORLD_SIZE")  # as without torchrun
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(job["arguments"])
    return code, out.getvalue(), err.getvalue()


def logits(job: dict[str, Any]) -> dict[str, float]:
    """Errors of the logits of one sequence: by prefill and decode, against the full forward.

    Largest absolute differences, relative to the standard deviation of the logits.
    """
    import torch
    from megatron.core.inference.contexts import StaticInferenceContext

    from mhc_megatron import generation

    checkpoint = generation.find_checkpoint(job["run"])
    args, mhc = generation.read_arguments(checkpoint)
    model = generation.load_model(checkpoint, args, mhc)
    tokens = torch.randint(256, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        positions = torch.arange(len(tokens))[None]
        full = model(torch.tensor([tokens]), positions, None).float()[0]
        context = StaticInferenceContext(1, len(tokens))
        errors = []
        for length in (9, *range(10, len(tokens) + 1)):
            cached = generation.next_logits(model, tokens[:length], context).float()
            errors.append((cached - full[length - 1]).abs().max())
    hc = [p.dtype for name, p in model.named_parameters() if "_hc." in name]
    return {
        "error": float(max(errors) / full.std()),
        "spread": float(full.std()),
        "connections": len(hc),
        "fp32": all(dtype == torch.float32 for dtype in hc),
    }
