"""What one rank of a test of ``mhc_megatron.recompute`` runs: training with and without it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from mhc_megatron import recompute
from mhc_megatron.recompute import recomputes
from tests.distributed import job as training


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """``train`` of the job without recompute and with ``job["recompute"]``.

    Returns a digest of every step (parameters, gradients and loss of this rank) of both, and of the
    second one the L_r of each chunk, the bytes that were dropped, and those dropped by kind.
    """
    results: dict[str, Any] = {}
    for name, L_r in (("kept", 0), ("recomputed", job["recompute"])):
        with _Watch() as watch:
            mhc = job.get("mhc", {}) | {"recompute": L_r}
            training.train({"steps": 2, **job, "mhc": mhc})
        results[name] = watch.digests
    return results | {"L_r": watch.L_r, "dropped": watch.dropped}


class _Watch:
    """Looks on at every step and every drop."""

    def __init__(self) -> None:
        self.digests: list[str] = []
        self.L_r: list[int] = []
        self.dropped = {"x": 0, "u": 0, "normed": 0}

    def __enter__(self) -> _Watch:
        self._step, self._drop = training.step, recompute.Targets.drop
        training.step = self._see_step
        recompute.Targets.drop = self._see_drop()
        return self

    def __exit__(self, *error: object) -> None:
        training.step, recompute.Targets.drop = self._step, self._drop

    def _see_step(self, model, *rest):
        loss, norm = self._step(model, *rest)
        digest = hashlib.sha256(repr((loss, float(norm))).encode())
        for chunk in unwrap_model(model):
            for parameter in chunk.parameters():
                for tensor in (parameter.detach(), parameter.main_grad):
                    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        self.digests.append(digest.hexdigest())
        self.L_r = [blocks.L_r for chunk in model for blocks in recomputes(chunk)]
        return loss, norm

    def _see_drop(self):
        drop = self._drop

        def counted(targets) -> None:
            held = {k: d and d.tensor.untyped_storage() for k, d in vars(targets).items()}
            drop(targets)
            for kind, dropped in vars(targets).items():
                if dropped is not None:
                    assert held[kind].nbytes() == 0, f"{kind} was not dropped"
                    self.dropped[kind] += dropped.bytes

        return counted
