"""Spikes in the training loss: a step whose loss stands out from those before it.

Megatron's rerun machine (``check-for-spiky-loss``) compares a microbatch with the largest loss of
the process's first hundred, to find hardware that computes wrongly. Here a step's loss, the mean
over all ranks, is compared with the median of the run's last records: that finds training that goes
wrong, and finds it again at the same step after a resume, as the records are in ``metrics.jsonl``.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import deque

from mhc_megatron.files import read_records

#: Records that the median is taken over, and the fewest that give one.
RECORDS, LEAST = 20, 5


class LossSpike(Exception):
    """A spike that ends this process, because the run's policy is to stop or to skip."""


class SpikeWatch:
    """Tells a spike from the losses before it.

    Args:
        factor: a loss above so many times the median of the last records is a spike; 0 for never.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=RECORDS)

    def record(self, loss: float) -> None:
        """Take the loss (nats a token) of one more training record.

        One that is not finite is left out: ``metrics.jsonl`` has no number for it, and a NaN would
        make the median depend on the order.
        """
        if math.isfinite(loss):
            self._losses.append(loss)

    def resume(self, path: str | os.PathLike[str], iteration: int) -> None:
        """Take the last records up to ``iteration`` from a ``metrics.jsonl``."""
        losses: dict[int, object] = {}
        for record in read_records(path):
            at = record.get("iteration")
            if record.get("event") == "train" and type(at) is int and at <= iteration:
                losses[at] = record.get("loss")  # the last of its iteration holds
        for at in sorted(losses):
            if isinstance(loss := losses[at], float):
                self.record(loss)

    @property
    def usual(self) -> float | None:
        """Median loss of the last records; None while there are too few."""
        return statistics.median(self._losses) if len(self._losses) >= LEAST else None

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` stands out; NaN and infinity are the rerun machine's business."""
        usual = self.usual
        return bool(self.factor) and usual is not None and self.factor * usual < loss < float("inf")
